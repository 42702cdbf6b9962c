"""Train a part of the base itself: all of it is pretraining or full fine-tuning, a mask freezes the rest."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ... import InputError
from ...bounds import Count, Share
from ...model import Weight
from ...model.tree import is_stacked, iter_layers, named, nested
from ..base import Method
from ..masks import select
from ..targets import group_by_path, targets


class FrozenLayers(Weight):
    """The frozen layers of a stacked parameter, as the slices between those that train."""

    parts: tuple[Array, ...]


class Subset(Method):
    """W = trainable where the mask picks, the base's elsewhere; fp32. `where`: a mask's name or a rule over paths.

    The arrays have the shapes and values of the base. HF PEFT: modules_to_save, beside another method.
    """

    lr_multiplier = 1.0
    replaces_base = True
    axes: ClassVar = {"": "DF"}

    where: str = "all"

    def selected(self, params: Any) -> dict[str, list[tuple[int, int]]]:
        """Return {path: layer ranges} of what trains. Raises InputError for a weight (a quantised matrix)."""
        ranges, flat = select(self.where, params), named(params)
        for path in ranges:
            if isinstance(flat[path], Weight):
                kind = type(flat[path]).__name__
                raise InputError(f"{self.name}: {path} is {kind} and cannot train; narrow where="
                                 f"{self.where!r}, or take a base that is not quantised")  # fmt: skip
        return ranges

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        self.selected(params)
        flat, trainable = named(params), {}
        for target in targets(self.where, params):
            whole = target.key == target.path
            leaf = flat[target.path] if whole else flat[target.path][target.layers.start : target.layers.stop]
            trainable[target.key] = jnp.array(leaf, jnp.float32, copy=True)
        return trainable

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        flat = dict(named(params))
        for path, parts in group_by_path(trainable).items():
            flat[path] = parts[None] if None in parts else join_layers(flat.get(path), parts)
        return nested(flat)

    def frozen_params(self, params: Any) -> Any:
        flat = dict(named(params))
        for path, ranges in self.selected(params).items():
            leaf = flat.pop(path)
            if is_stacked(path) and ranges != [(0, len(leaf))]:
                edges = [0, *(edge for pair in ranges for edge in pair), len(leaf)]
                flat[path] = FrozenLayers(tuple(leaf[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)))
        return nested(flat)


def join_layers(base: Any, parts: dict[tuple[int, int], Array]) -> Array:
    """Return a stacked array with the trained layers in place; `base` is the whole array, or its FrozenLayers."""
    if isinstance(base, FrozenLayers):
        dtype = jnp.result_type(base.parts[0], *parts.values())  # what trains is not rounded to a bfloat16 base
        pairs = zip(base.parts, parts.values(), strict=False)
        slices = [x for pair in pairs for x in pair] + [base.parts[-1]]
        return jnp.concatenate([x.astype(dtype) for x in slices])
    base = base.astype(jnp.result_type(base, *parts.values()))
    for (start, _), layers in parts.items():
        base = jax.lax.dynamic_update_slice_in_dim(base, layers.astype(base.dtype), start, 0)
    return base


class BitFit(Subset):
    """Subset of the biases that the base has (arXiv:2106.10199).

    HF PEFT: bias="all", beside another method.
    """

    lr_multiplier = 10.0
    demo = False

    where: str = "biases"


class LNTuning(Subset):
    """Subset of the norms' scales and biases (arXiv:2312.11420).

    HF PEFT: LN_TUNING.
    """

    lr_multiplier = 30.0
    demo = False

    where: str = "norms"


class Gradual(Subset):
    """W += [step >= start] update, start later from the head by layers down to the embeddings (arXiv:1801.06146).

    The parts (head and final norm, each layer, the embeddings; only those that `where` picks) fall into `stages` groups
    of about equal size, which start evenly from step 0 to `until` of all steps; afterwards all train. Nothing is
    compiled again. It saves no memory and no time: all parts have gradients and optimizer state from step 0, so that a
    part starts with warm moments and full Adam steps, and clipping by the global norm counts gradients that move
    nothing yet. A tied table starts with the embeddings. HF PEFT: none.
    """

    demo = False

    stages: Count = 4
    until: Share = 0.15  # fraction of the steps after which all train

    def starts(self, trainable: Any, steps: int) -> dict[str, list[int]]:
        """Return {key: the first step of each of its layers}, one number outside of layers."""
        heights = {}  # infinity above the layers, the layer's index, -1 below them
        for key, name, layers in iter_layers(trainable):
            heights[key] = list(layers) if layers else [-1 if name.startswith("embed/") else float("inf")]
        order = sorted({height for row in heights.values() for height in row}, reverse=True)
        stages = min(self.stages, len(order))
        stage = {height: i * stages // len(order) for i, height in enumerate(order)}
        first = [int(self.until * steps * s / max(stages - 1, 1) + 1e-6) for s in range(stages)]
        return {key: [first[stage[height]] for height in row] for key, row in heights.items()}

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        def masked(update: Any, starts: np.ndarray, step: Any) -> Any:
            start = starts.reshape(-1, *[1] * (update.ndim - 1)) if len(starts) > 1 else starts[0]
            return jnp.where(step >= start, update, -0.0)  # x + -0.0 is x bit for bit, also where x is -0.0

        def update(updates: Any, step: Any, params: Any = None) -> tuple[Any, Any]:
            starts = {key: np.array(row) for key, row in self.starts(updates, steps).items()}
            return {key: masked(u, starts[key], step) for key, u in updates.items()}, step + 1

        return optax.GradientTransformation(lambda trainable: jnp.int32(0), update)  # type: ignore[arg-type]
