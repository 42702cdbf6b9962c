"""MiSS by blocks of the matrix itself, called Bat (arXiv:2409.15371)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Size
from ...model import Weight
from ..base import Method
from ..random_projections import recomputed
from ..targets import each_matrix, targets, wrap


class BatWeight(Weight):
    """x @ w with the block w_ja of R rows and R columns as w_ja + s_a^T w_ja + s_a^T."""

    w: Any  # [D, F] frozen
    s: Array  # [F / R, R, R]

    def __rmatmul__(self, x: Array) -> Array:
        def update(x: Array, w: Any, s: Array) -> Array:
            w = w.dense() if isinstance(w, Weight) else w
            blocks = jnp.einsum("api,jpao->jiao", s, w.reshape(-1, s.shape[1], *s.shape[:2]))
            return x @ (blocks + jnp.einsum("aoi->iao", s)).reshape(w.shape)

        return x @ self.w + recomputed(update)(x, self.w, self.s)


class MiSSBat(Method):
    """W + (W + 1) S by blocks of rank x rank, S [F / R, R, R] = 0 at first (arXiv:2409.15371)."""

    demo = False
    rank: Size = 8  # a divisor of D and of F
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        for t in targets(self.where, params, 2, "missbat"):
            if t.shape[0] % self.rank or t.shape[1] % self.rank:
                raise InputError(f"missbat: {t.path} is {list(t.shape)}, wanted multiples of rank={self.rank}")
        one = lambda key, D, F: {"s": jnp.zeros((F // self.rank, self.rank, self.rank))}  # noqa: E731
        return each_matrix(key, params, self.where, one, "missbat")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, BatWeight)
