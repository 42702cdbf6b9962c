"""LoHa: an elementwise product of two low-rank updates (FedPara, arXiv:2108.06098)."""

from typing import Any

import jax.numpy as jnp
from jax import Array, random

from ...bounds import Real, Size
from ...model import Weight
from ..base import Method
from ..random_projections import recomputed
from ..targets import each_matrix, uniform_fan_in, wrap_weights


class LoHaWeight(Weight):
    """x @ (w + (a1 b1) * (a2 b2)): its rank is up to the square of the factors'. b1 has the scale in it."""

    w: Any  # [D, F] frozen
    a1: Array  # [D, R]
    b1: Array  # [R, F]
    a2: Array  # [D, R]
    b2: Array  # [R, F]

    def __rmatmul__(self, x: Array) -> Array:
        update = recomputed(lambda x, a, b, c, d: x @ ((a @ b) * (c @ d)))
        return x @ self.w + update(x, self.a1, self.b1, self.a2, self.b2)


class LoHa(Method):
    """W + (alpha / rank) (A1 B1) * (A2 B2), with A2 = 0 at first (arXiv:2108.06098)."""

    demo = False
    rank: Size = 8
    alpha: Real = 8.0
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            (k, m, n), R = random.split(key, 3), self.rank
            a1, b1, b2 = uniform_fan_in(k, (D, R), D), uniform_fan_in(m, (R, F), R), uniform_fan_in(n, (R, F), R)
            return {"a1": a1, "b1": b1, "a2": jnp.zeros((D, R)), "b2": b2}

        return each_matrix(key, params, self.where, one, "loha")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(
            params, {k: t | {"b1": self.alpha / self.rank * t["b1"]} for k, t in trainable.items()}, LoHaWeight
        )
