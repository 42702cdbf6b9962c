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
from ..hf_spec import IDENTITY, PREFIX, TRANSPOSED, AdapterFile, Companion, HFModel, HFSpec, HFTensor, Picked, Place
from ..masks import select
from ..targets import group_by_path, targets


class FrozenLayers(Weight):
    """The frozen layers of a stacked parameter, as the slices between those that train."""

    parts: tuple[Array, ...]


def _read_beside(c: Any, picked: Picked, model: HFModel) -> "Subset | None":
    """Return the modules and biases that train beside a method. Of a tied table Head and Lookup train copies."""
    copied = (model.table.path, "head/matrix") if model.config.tied else ()
    places = [place for m in picked.saved if m.path not in copied for place in m.places]
    places += [(m.bias, m.layer) for m in picked.biased if m.bias]
    return Subset(model.where(places)) if places else None


def _write_beside(method: Any, places: set[Place], targets: list[Any], spec: HFSpec, model: HFModel) -> dict[str, Any]:
    """Return the bias and modules_to_save of a Subset. Raises InputError for a part of either."""
    modules = list(model.modules.values())
    scopes = {"none": [], "all": modules, spec.own_bias or f"{spec.type.lower()}_only": targets}
    for scope, owners in scopes.items():
        biases = {(m.bias, m.layer) for m in owners if m.bias}
        saved = [m for m in modules if (m.path, m.layer) in places - biases]
        covered = {place for m in saved for place in m.places}
        if biases <= places and places - biases <= covered <= places:
            # Whole paths: HF PEFT takes every module whose path ends with a name, from a dot on or not.
            return {"modules_to_save": sorted(m.name for m in saved)} | ({} if scope == "none" else {"bias": scope})
    raise InputError(f"{sorted(places, key=str)[0][0]} beside {spec.type}: HF PEFT saves whole modules, or all biases, "
                     "or those of its targets")  # fmt: skip


def _ln_tuning(places: set[Place], model: HFModel) -> HFSpec | None:
    """Return the spec of LN_TUNING if only norms train. Raises InputError for a part of one."""
    if not all("norm/" in path for path, _ in places):
        return None
    for module in (model.at[place] for place in places if place in model.at):
        if not places.issuperset(module.places):
            raise InputError(f"{module.name}: LN_TUNING trains scale and bias of a norm together; take where='norms'")
    return LNTuning.hf


def _locate(path: str, layer: int | None, file: AdapterFile) -> list[tuple[str, HFTensor]]:
    module = file.model.at.get((path, layer))
    if module is None:
        raise InputError(f"{path}: transformers has no module of that name")
    is_bias = path == module.bias
    middle = "base_layer." if is_bias and module.path in file.adapted else ""
    if file.alone and module.kind == "norm":
        middle = "ln_tuning_layers."
    turned = module.kind == "matrix" and not is_bias and (not file.model.conv1d or path == "head/matrix")
    name = f"{PREFIX}{module.name}.{middle}{'bias' if is_bias else 'weight'}"
    return [("", HFTensor(name, TRANSPOSED if turned else IDENTITY))]


class Subset(Method):
    """W = trainable where the mask picks, the base's elsewhere; fp32. `where`: a mask's name or a rule over paths.

    The arrays have the shapes and values of the base. HF PEFT: modules_to_save, beside another method.
    """

    lr_multiplier = 1.0
    replaces_base = True
    axes: ClassVar = {"": "DF"}

    where: str = "all"

    hf = HFSpec(locate=_locate, companion=Companion(_read_beside, _write_beside, _ln_tuning))

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


_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class LNTuning(Subset):
    """Subset of the norms' scales and biases (arXiv:2312.11420).

    HF PEFT: LN_TUNING.
    """

    lr_multiplier = 30.0
    demo = False

    where: str = "norms"

    hf = Subset.hf.variant(
        type="LN_TUNING",
        kinds=("norm",),
        default_targets={
            **dict.fromkeys(("llama", "mistral", "gemma"), _NORMS),
            **dict.fromkeys(
                ("gemma2", "gemma3_text"), (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
            ),
            **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
            "gpt2": ("ln_1", "ln_2", "ln_f"),
        },
        own_bias="",
        where=lambda c, modules, model: {"where": model.where(place for m in modules for place in m.places)},
        companion=Companion(lambda *_: None, _write_beside, _ln_tuning),
    )


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
