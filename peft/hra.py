"""HRA: a chain of Householder reflections of the input (arXiv:2405.17484)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..model import Weight
from .base import Method
from .targets import each_matrix, uniform, wrap


class HRAWeight(Weight):
    """(x H_r ... H_1) @ w with H_i = I - 2 u u^T / |u|^2, one after the other; u = 0 reflects nothing."""

    w: Any  # [D, F] frozen
    u: Array  # [D, R]

    def __rmatmul__(self, x: Array) -> Array:
        u = self.u * jax.lax.rsqrt(jnp.maximum(jnp.square(self.u).sum(0), 1e-30))
        for i in reversed(range(u.shape[1])):
            x = x - 2 * (x @ u[:, i : i + 1]) * u[:, i]
        return x @ self.w


class HRA(Method):
    """W turned by `rank` reflections, which undo each other in pairs at first (arXiv:2405.17484)."""

    demo = False

    rank: int = 8  # even
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            half = (self.rank + 1) // 2
            return {"u": jnp.repeat(uniform(key, (D, half), half), 2, axis=1)[:, : self.rank]}

        return each_matrix(key, params, self.where, one, "hra")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, HRAWeight)
