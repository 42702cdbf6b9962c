"""HRA: a chain of Householder reflections of the input (arXiv:2405.17484)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import Size
from ...model import Weight, static
from ..base import Method
from ..targets import each_matrix, uniform_fan_in, wrap_weights


def unit(u: Array) -> Array:
    """The columns of u [D, ...] at length 1; a column of zeros stays."""
    return u * jax.lax.rsqrt(jnp.maximum(jnp.square(u).sum(0), 1e-24))


def orthogonal(u: Array) -> Array:
    """The columns of u [D, R] at length 1, each without what it shares with those before it (Gram-Schmidt)."""
    columns = []
    for i in range(u.shape[1]):
        columns.append(unit(u[:, i]))
        u = u - jnp.outer(columns[i], columns[i] @ u)
    return jnp.stack(columns, 1)


class HRAWeight(Weight):
    """(x H_r ... H_1) @ w with H_i = I - 2 u u^T / |u|^2, one after the other; u = 0 reflects nothing."""

    w: Any  # [D, F] frozen
    u: Array  # [D, R]
    gram_schmidt: bool = static(default=False)

    def __rmatmul__(self, x: Array) -> Array:
        u = self.u.astype(jnp.float32)
        if self.gram_schmidt:  # the order of reflections does not matter, so all are one
            u = orthogonal(u).astype(x.dtype)
            return (x - 2 * (x @ u) @ u.T) @ self.w
        u = unit(u).astype(x.dtype)
        for i in reversed(range(u.shape[1])):
            x = x - 2 * (x @ u[:, i : i + 1]) * u[:, i]
        return x @ self.w


class HRA(Method):
    """W turned by `rank` reflections, which undo each other in pairs at first (arXiv:2405.17484).

    No weight decay: H = I - 2 u u^T / |u|^2 does not depend on the length of u.
    """

    demo = False
    decay_rule = ""

    rank: Size = 8  # even, or what begins is not the base
    where: str = "linear"
    gram_schmidt: bool = False  # make the reflections orthogonal to each other; then they cannot undo each other

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.rank % 2 == 0 and not self.gram_schmidt

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            if self.gram_schmidt:
                return {"u": uniform_fan_in(key, (D, self.rank), self.rank)}
            half = (self.rank + 1) // 2
            return {"u": jnp.repeat(uniform_fan_in(key, (D, half), half), 2, axis=1)[:, : self.rank]}

        return each_matrix(key, params, self.where, one, "hra")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, trainable, lambda w, **t: HRAWeight(w, **t, gram_schmidt=self.gram_schmidt))
