"""An output projection of its own for a base that shares it with the token table."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...model import Weight
from ...model.tree import named, replace
from ...model.weight import stack
from ..base import Method


class OwnHead(Weight):
    """The token table for lookups, and another matrix where the output projection asks for its transpose."""

    linear = False
    projects = True

    w: Any  # [V, D] frozen
    head: Array  # [D, V]

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids]

    @property
    def T(self) -> Any:
        return self.head


class Head(Method):
    """logits = x H with H = table.T at first, the table itself frozen: of a tied base (HF PEFT's modules_to_save)."""

    rate = 1.0
    demo = False

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if "head/matrix" in named(params):
            raise InputError("head: this base has a head of its own; take --method subset --method.where head/matrix")
        return {"embed/table": {"head": jnp.array(named(params)["embed/table"], jnp.float32, copy=True).T}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        if any(isinstance(w, Weight) and w.projects for w in stack(table)):
            raise InputError("chain: head replaces the output projection, which an earlier method has taken; put head "
                             "first, or let only one of them have it")  # fmt: skip
        return replace(params, {"embed/table": OwnHead(table, **trainable["embed/table"])})
