"""Subset: train a part of the base itself. All of it is pretraining or full fine-tuning; a mask freezes the rest."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...model import Weight
from ...model.tree import is_stacked, named, nested
from ..base import Method
from ..masks import select
from ..targets import group, targets


class Gaps(Weight):
    """What stays frozen of a stacked array of which a method trains some layers."""

    parts: tuple[Array, ...]


class Subset(Method):
    """W = trainable where the mask picks, the base's elsewhere; fp32. `where`: a mask's name or a rule over paths."""

    rate = 1.0
    replaces = True

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
        for path, parts in group(trainable).items():
            flat[path] = parts[None] if None in parts else weave(flat.get(path), parts)
        return nested(flat)

    def freeze(self, params: Any) -> Any:
        flat = dict(named(params))
        for path, ranges in self.chosen(params).items():
            leaf = flat.pop(path)
            if is_stacked(path) and ranges != [(0, len(leaf))]:
                edges = [0, *(edge for pair in ranges for edge in pair), len(leaf)]
                flat[path] = Gaps(tuple(leaf[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)))
        return nested(flat)


def weave(held: Any, parts: dict[tuple[int, int], Array]) -> Array:
    """A stacked array with the trained layers in their places; `held` is all of it, or the gaps between them."""
    if isinstance(held, Gaps):
        slices = list(parts.values())
        dtype = jnp.result_type(held.parts[0], *slices)  # what trains is not rounded to a bfloat16 base
        woven = [x for gap, piece in zip(held.parts, slices, strict=False) for x in (gap, piece)]
        return jnp.concatenate([x.astype(dtype) for x in (*woven, held.parts[-1])])
    held = held.astype(jnp.result_type(held, *parts.values()))
    for (start, _), piece in parts.items():
        held = jax.lax.dynamic_update_slice_in_dim(held, piece.astype(held.dtype), start, 0)
    return held
