"""Subset: train a part of the base itself. All of it is pretraining or full fine-tuning; a mask freezes the rest."""

from typing import Any

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
    """What stays frozen of a stacked array of which a method trains some layers."""

    parts: tuple[Array, ...]


class Subset(Method):
    """W = trainable where the mask picks, the base's elsewhere; fp32. `where`: a mask's name or a rule over paths."""

    lr_multiplier = 1.0
    replaces_base = True

    where: str = "all"

    def chosen(self, params: Any) -> dict[str, list[tuple[int, int]]]:
        """{path: layer ranges} of what trains. Raises InputError for a weight, of which nothing can."""
        ranges, flat = select(self.where, params), named(params)
        for path in ranges:
            if isinstance(flat[path], Weight):
                kind = type(flat[path]).__name__
                raise InputError(f"{type(self).__name__.lower()}: {path} is {kind} and cannot train; narrow where="
                                 f"{self.where!r}, or take a base that is not quantised")  # fmt: skip
        return ranges

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        self.chosen(params)
        flat = named(params)
        picked = {t.key: flat[t.path] if t.key == t.path else flat[t.path][t.layers.start : t.layers.stop]
                  for t in targets(self.where, params)}  # fmt: skip
        return {key: jnp.array(leaf, jnp.float32, copy=True) for key, leaf in picked.items()}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        flat = dict(named(params))
        for path, parts in group_by_path(trainable).items():
            flat[path] = parts[None] if None in parts else join_layers(flat.get(path), parts)
        return nested(flat)

    def frozen_params(self, params: Any) -> Any:
        flat = dict(named(params))
        for path, ranges in self.chosen(params).items():
            leaf = flat.pop(path)
            if is_stacked(path) and ranges != [(0, len(leaf))]:
                edges = [0, *(edge for pair in ranges for edge in pair), len(leaf)]
                flat[path] = FrozenLayers(tuple(leaf[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)))
        return nested(flat)


def join_layers(held: Any, parts: dict[tuple[int, int], Array]) -> Array:
    """A stacked array with the trained layers in their places; `held` is all of it, or the gaps between them."""
    if isinstance(held, FrozenLayers):
        slices = list(parts.values())
        dtype = jnp.result_type(held.parts[0], *slices)  # what trains is not rounded to a bfloat16 base
        woven = [x for gap, piece in zip(held.parts, slices, strict=False) for x in (gap, piece)]
        return jnp.concatenate([x.astype(dtype) for x in (*woven, held.parts[-1])])
    held = held.astype(jnp.result_type(held, *parts.values()))
    for (start, _), piece in parts.items():
        held = jax.lax.dynamic_update_slice_in_dim(held, piece.astype(held.dtype), start, 0)
    return held


class BitFit(Subset):
    """Subset of the biases that the base has (arXiv:2106.10199)."""

    lr_multiplier = 10.0
    demo = False

    where: str = "biases"


class LNTuning(Subset):
    """Subset of the norms' scales and biases (arXiv:2312.11420)."""

    lr_multiplier = 30.0
    demo = False

    where: str = "norms"


class Gradual(Subset):
    """W += [step >= start] update, start later from the head by layers down to the embeddings (arXiv:1801.06146).

    The parts (what stands after the layers, each layer, the embeddings; only those that `where` picks) fall into
    `stages` groups of about equal size, which begin evenly from step 0 to `until` of all steps; then all train. Nothing
    is compiled again. It saves no memory and no time: all parts have gradients and optimizer state from the start, so
    that a part begins with warm moments, at the size of step that Adam gives the others, and clipping by the global
    norm counts gradients that do not move anything yet. Tied embeddings begin with the embeddings, head or not.
    """

    demo = False

    stages: Count = 4
    until: Share = 0.15  # part of the steps after which all train

    def starts(self, trainable: Any, steps: int) -> dict[str, list[int]]:
        """{key of the trainable tree: the first step of each of its layers} (one number outside of layers)."""
        places = {}  # from the top down: infinity, the layer, -1
        for key, name, layers in iter_layers(trainable):
            places[key] = list(layers) if layers else [-1 if name.startswith("embed/") else float("inf")]
        order = sorted({place for row in places.values() for place in row}, reverse=True)
        stages = min(self.stages, len(order))
        stage = {place: i * stages // len(order) for i, place in enumerate(order)}
        first = [int(self.until * steps * s / max(stages - 1, 1) + 1e-6) for s in range(stages)]
        return {key: [first[stage[place]] for place in row] for key, row in places.items()}

    def update_transform(self, steps: int) -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            starts = {key: np.array(row) for key, row in self.starts(updates, steps).items()}

            def one(key: str, u: Any) -> Any:
                start = starts[key].reshape(-1, *[1] * (u.ndim - 1)) if len(starts[key]) > 1 else starts[key][0]
                return jnp.where(state >= start, u, -0.0)  # x + -0.0 is x bit for bit, also where x is -0.0

            return {key: one(key, u) for key, u in updates.items()}, state + 1

        init: Any = lambda trainable: jnp.int32(0)  # noqa: E731  # steps done
        return optax.GradientTransformation(init, update)
