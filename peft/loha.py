"""LoHa: an elementwise product of two low-rank updates (FedPara, arXiv:2108.06098)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..model import Weight, static
from .base import Method
from .targets import each_matrix, uniform, wrap


class LoHaWeight(Weight):
    """x @ (w + scale (a1 b1) * (a2 b2)): its rank is up to the square of the factors'."""

    w: Any  # [D, F] frozen
    a1: Array  # [D, R]
    b1: Array  # [R, F]
    a2: Array  # [D, R]
    b2: Array  # [R, F]
    scale: float = static()

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + self.scale * (x @ ((self.a1 @ self.b1) * (self.a2 @ self.b2)))


class LoHa(Method):
    """W + (alpha / rank) (A1 B1) * (A2 B2), with A2 = 0 at first (arXiv:2108.06098)."""

    demo = False

    rank: int = 8
    alpha: float = 8.0
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            k, R = jax.random.split(key, 3), self.rank
            first = {"a1": uniform(k[0], (D, R), D), "b1": uniform(k[1], (R, F), R)}
            return first | {"a2": jnp.zeros((D, R)), "b2": uniform(k[2], (R, F), R)}

        return each_matrix(key, params, self.where, one, "loha")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, lambda w, **t: LoHaWeight(w, **t, scale=self.alpha / self.rank))
