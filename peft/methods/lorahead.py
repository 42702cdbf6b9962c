"""LoRA of the output projection alone, of a base that shares it with the token table."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Decay, Real, Size
from ...model import Weight
from ...model.tree import named, replace
from ..base import Method
from .lora import LoRAWeight
from ..targets import seeded, uniform


class LoRAHeadTable(Weight):
    """The token table for lookups; its transpose, the output projection, has a low-rank update: w.T + a b."""

    linear = False
    projects = True

    w: Any  # [V, D] frozen
    a: Array  # [D, R]
    b: Array  # [R, V], the scale in it
    seed: Any = None  # uint32 [2], in training with dropout
    dropout: Any = None

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids]

    @property
    def T(self) -> LoRAWeight:
        return LoRAWeight(self.w.T, self.a, self.b, self.seed, self.dropout)


class LoRAHead(Method):
    """logits = x (table.T + (alpha / rank) A B), lookups unchanged: of a tied base (HF PEFT's LoRA of lm_head).

    A [D, R] is uniform in +-D^-1/2 and B [R, V] = 0 at first, as LoRA's (arXiv:2106.09685). Raises InputError for a
    base with a head of its own, whose matrix `lora` adapts.
    """

    demo = False

    rank: Size = 8
    alpha: Real = 16.0
    dropout: Decay = 0.0  # of x before A, in training
    rslora: bool = False  # alpha / rank^1/2 in place of alpha / rank

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        flat = named(params)
        if "head/matrix" in flat:
            raise InputError("lorahead: this base has a head of its own; take --method lora --method.where head/matrix")
        V, D = flat["embed/table"].shape
        return {"head/matrix": {"a": uniform(key, (D, self.rank), D), "b": jnp.zeros((self.rank, V))}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        a, b = trainable["head/matrix"]["a"], trainable["head/matrix"]["b"]
        scale = self.alpha / b.shape[0] ** (0.5 if self.rslora else 1)
        return replace(params, {"embed/table": LoRAHeadTable(named(params)["embed/table"], a, scale * b)})

    def noisy(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        return seeded(self.bind(params, trainable), {"embed/table": None}, key, self.dropout)
