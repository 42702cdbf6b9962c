"""A table of its own for the lookup, of a base whose output projection shares the token table."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...model import Weight
from ...model.tree import named, replace
from ...model.weight import stack
from ..base import Method


class OwnTable(Weight):
    """Another table for lookups, and the base's own where the output projection asks for its transpose."""

    linear = False

    w: Any  # [V, D] frozen
    table: Array  # [V, D]

    def __getitem__(self, ids: Array) -> Array:
        return self.table[ids]

    @property
    def T(self) -> Any:
        return self.w.T


class Lookup(Method):
    """x = table[ids], a tied output projection stays as it was (HF PEFT's modules_to_save of embed_tokens)."""

    rate = 1.0
    demo = False

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if "head/matrix" in named(params):
            raise InputError("lookup: this base has a head of its own; take --method subset --method.where embed/table")
        return {"embed/table": {"table": jnp.array(named(params)["embed/table"], jnp.float32, copy=True)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        if not all(w.projects for w in stack(table)[:-1]):
            raise InputError("chain: lookup replaces the table that an earlier method has taken; put lookup first, or "
                             "let only one of them have it")  # fmt: skip
        return replace(params, {"embed/table": OwnTable(table, **trainable["embed/table"])})
