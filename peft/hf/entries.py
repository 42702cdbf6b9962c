"""Where each tensor of an adapter file goes: its name there, the place in a trainable tree here, and how it lies."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ... import InputError
from ...model import Config, shapes_of
from ...model.hf.families import families
from ...model.tree import is_stacked, name_and_layers, split_layer_index
from ..base import Chain, Method
from ..methods.subset import Subset
from .names import PREFIX, Module, family_of, modules
from .types import IDENTITY, TRANSPOSED, Form, kinds


class Entry(NamedTuple):
    """One tensor of a file and the array, or the layer of an array, that it is here."""

    name: str
    form: Form
    branch: str  # of a chain, else empty
    key: str
    leaf: str  # empty: the key holds the array itself
    layer: int | None  # index into a stacked array

    def of(self, trainable: Any, gradient: bool = False) -> Any:
        """The array as the file has it; of shapes, its shape; of gradients, that of the file's array."""
        form = self.form.slope or self.form.theirs if gradient else self.form.theirs
        at = trainable[self.branch] if self.branch else trainable
        at = at[self.key][self.leaf] if self.leaf else at[self.key]
        take = lambda x: form(x if self.layer is None else x[self.layer])  # noqa: E731
        return jax.eval_shape(take, at) if isinstance(at, jax.ShapeDtypeStruct) else take(at)


def parts(method: Method) -> list[tuple[str, Method]]:
    """The links of a chain with their branches; a method alone has none."""
    return list(method.methods) if isinstance(method, Chain) else [("", method)]


def shapes_like(config: Config, trainable: Any) -> Any:
    """The shapes of a base in the layout, stacked or not, that a method's tree is of."""
    unrolled = any(re.search(r"layers/\d", key) for key in trainable)
    return shapes_of(dataclasses.replace(config, scan=not unrolled))


def kind_of(method: Method) -> str:
    """The peft_type of a method by its class, or an empty string."""
    names = [name for name, kind in kinds.items() if type(method).__name__ in kind.classes and name != "LN_TUNING"]
    return names[0] if names else ""


def is_main(method: Method) -> bool:
    """Whether a link is what a file is of, not a part of the base or a token beside it."""
    return kind_of(method) not in ("", "TRAINABLE_TOKENS")


def entries(method: Method, structure: Any, config: Config) -> list[Entry]:
    """All tensors of a method's file but the constants; `structure` is its trainable tree, or the shapes of it.

    Raises InputError for a method that HF PEFT has no file for.
    """
    mods, found = modules(config), []
    links = parts(method)
    mains = [(b, m) for b, m in links if is_main(m)]
    touched = {name_and_layers(key)[0] for b, m in mains for key in (structure[b] if b else structure)}
    for branch, part in links:
        tree = structure[branch] if branch else structure
        for key, arrays in tree.items():
            for layer, place in _layers(key, arrays):
                alone = (part, bool(mains), touched)
                for leaf, name, form in _names(key, arrays, place, mods, config, *alone):
                    found.append(Entry(name, form, branch, key, leaf, layer))
    return found


def _layers(key: str, arrays: Any) -> Iterator[tuple[int | None, tuple[str, int | None]]]:
    """(index into the array, (path, layer of the model)) of each layer that a key holds."""
    (path, layers), depth = name_and_layers(key), jax.tree.leaves(arrays)[0].shape[0] if jax.tree.leaves(arrays) else 0
    if not is_stacked(split_layer_index(key)[0]):
        yield None, (path, layers[0] if layers else None)
        return
    for i, layer in enumerate(layers or range(depth)):
        yield i, (path, layer)


def _names(
    key: str, arrays: Any, place: tuple[str, int | None], mods: Mapping[str, Module], config: Config,
    part: Method, beside: bool, touched: set[str],
) -> Iterator[tuple[str, str, Form]]:  # fmt: skip
    """(leaf, tensor name, form) of one key of a method at one layer."""
    kind, (path, layer) = kind_of(part), place
    if isinstance(part, Subset):
        yield from _absolute(place, mods, config, beside, touched)
        return
    if type(part).__name__ == "Head":
        yield "head", f"{PREFIX}lm_head.weight", TRANSPOSED
        return
    if type(part).__name__ == "Lookup":
        yield "table", f"{PREFIX}{next(m for m, at in mods.items() if at.path == path)}.weight", IDENTITY
        return
    if kind == "PREFIX_TUNING":  # joined in the file
        yield "", f"prompt_embeddings.{layer}.{path[-1]}", IDENTITY
        return
    module = next((m for m, at in mods.items() if (at.path, at.layer) == (path, layer)), None)
    if not kind or module is None:
        raise InputError(f"{type(part).__name__} of {key}: HF PEFT has no file for it; merge it: --format hf")
    if kind == "TRAINABLE_TOKENS":
        yield "rows", f"{PREFIX}{module}.{'token_adapter.' if beside else ''}trainable_tokens_delta", IDENTITY
        if config.tied and not beside:
            yield "rows", f"{PREFIX}lm_head.trainable_tokens_delta", IDENTITY
        return
    if kind == "ADAPTION_PROMPT":
        module = module.rsplit(".", 1)[0]
    known = kinds[kind].tables if mods.get(module, Module("", None, "", "")).kind == "table" else kinds[kind].leaves
    for leaf in arrays:
        if leaf not in known:
            raise InputError(f"{type(part).__name__} of {key}: HF PEFT has no {leaf} there; merge it: --format hf")
        suffix, form = known[leaf]
        if kind == "PROMPT_TUNING":  # put behind the scale of Gemma's embeddings there, before it here
            yield leaf, suffix, _times(config.embed_scale, form)
        elif (kind, leaf) == ("HIRA", "b") and path == "embed/table":  # likewise
            yield leaf, f"{PREFIX}{module}.{suffix}", _times(config.embed_scale, form)
        else:
            yield leaf, f"{PREFIX}{module}.{suffix}", form


def _times(by: float, form: Form) -> Form:
    """Theirs is `by` times ours."""
    return form if by == 1 else Form(lambda x: form.ours(x) / by, lambda x: form.theirs(x) * by,
                                     lambda x: form.theirs(x) / by)  # fmt: skip


def _absolute(
    place: tuple[str, int | None], mods: Mapping[str, Module], config: Config, beside: bool, touched: set[str]
) -> Iterator[tuple[str, str, Form]]:
    """What a Subset trains: norms of LN tuning, or beside another method biases and whole modules."""
    for module, at in mods.items():
        if at.layer != place[1] or place[0] not in (at.path, at.bias):
            continue
        what = "bias" if place[0] == at.bias else "weight"
        middle = "base_layer." if what == "bias" and at.path in touched else ""
        if not beside and at.kind == "norm":
            middle = "ln_tuning_layers."
        turned = at.kind == "matrix" and what == "weight"
        turned &= not families[family_of(config)].conv1d or at.path == "head/matrix"
        yield "", f"{PREFIX}{module}.{middle}{what}", TRANSPOSED if turned else IDENTITY
        return
    raise InputError(f"{place[0]}: transformers has no module of that name")


def filled(structure: Any, found: list[Entry], tensors: Mapping[str, np.ndarray]) -> Any:
    """The trainable tree with the tensors of a file in their places; fp32."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), structure)
    for e in found:
        at = tree[e.branch] if e.branch else tree
        value = np.asarray(e.form.ours(tensors[e.name]), np.float32)
        if e.leaf:
            at = at[e.key]
        if e.layer is None:
            at[e.leaf or e.key] = value
        else:
            at[e.leaf or e.key][e.layer] = value
    return jax.tree.map(jax.numpy.asarray, tree)
