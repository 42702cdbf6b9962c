"""LoRA: low-rank updates of matrices and tables (arXiv:2106.09685)."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import FINITE, Bounds, Decay, Real, Size
from ...model import Weight
from ..base import Method
from ..targets import Target, by_value, dropout, each_layer, layer_keys, layer_values, seeded, targets, uniform, wrap


class LoRAWeight(Weight):
    """x @ w + (x @ a) @ b: b has the scale in it, and w + a b never exists. A table's projection keeps its own rows."""

    w: Any  # [D, F] frozen
    a: Array  # [D, R]
    b: Array  # [R, F]
    seed: Any = None  # uint32 [2], in training with dropout
    dropout: Any = None  # a number; [L] of stacked layers

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + (self.dropped(x) @ self.a) @ self.b

    def dropped(self, x: Array) -> Array:
        return x if self.seed is None else dropout(x, self.seed, self.dropout)

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids] + self.a[ids] @ self.b

    @property
    def T(self) -> Any:
        return self.w.T


class LoRA(Method):
    """W + (alpha / rank) A B, with A [D, R] uniform in +-D^-1/2 and B [R, F] = 0 (arXiv:2106.09685)."""

    weight: ClassVar[type[LoRAWeight]] = LoRAWeight

    rank: Size = 8  # above min(D, F) of a matrix it costs more and expresses no more
    alpha: Real = 16.0
    where: str = "linear"
    dropout: Decay = 0.0  # of x before A, in training
    ranks: Annotated[tuple[tuple[str, int], ...], Bounds(0, 65_536)] = ()  # rules -> rank, for some matrices or layers
    alphas: Annotated[tuple[tuple[str, float], ...], FINITE] = ()  # rules -> alpha

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """A and B of every target; layers of one stack are apart where their ranks differ."""

        def one(key: Array, t: Target, rank: int) -> dict[str, Array]:
            D, F = t.shape
            if t.path == "embed/table":  # as torch's Embedding: the update begins at 0 by A
                return {"a": jnp.zeros((D, rank)), "b": jax.random.normal(key, (rank, F))}
            return {"a": uniform(key, (D, rank), D), "b": jnp.zeros((rank, F))}

        found = by_value(self.ranks, self.rank, targets(self.where, params, 2, "lora"), params, "rank rule")
        return {t.key: each_layer(t, partial(one, t=t, rank=r), layer_keys(key, t, "a")) for t, r in found}

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / rank

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        """What B of one key is multiplied by: a number, or [L, 1, 1] where its layers differ."""
        return self.scale(arrays["b"].shape[-2], layer_values(self.alphas, self.alpha, params, key, "alpha rule"))

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scaled = {key: t | {"b": self.factor(params, key, t) * t["b"]} for key, t in trainable.items()}
        return wrap(params, scaled, self.weight, m=jnp.nan)

    def noisy(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        return seeded(self.bind(params, trainable), trainable, key, self.dropout)

    def padded(self, largest: Self) -> Method | None:  # zeros of A against zeros of B: neither has a gradient
        if self.ranks or self.alphas or largest != replace(self, rank=largest.rank):
            return None
        return replace(largest, alpha=self.alpha * self.scale(self.rank, 1.0) / self.scale(largest.rank, 1.0))
