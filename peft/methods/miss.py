"""MiSS: one small matrix shared by all shards of the input (arXiv:2409.15371)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Size
from ...model import Weight
from ..base import Method
from ..random_projections import recomputed
from ..targets import each_matrix, targets, wrap_weights


class MiSSWeight(Weight):
    """x @ w + (the sum of x's shards of width R) @ s: entry (i, j) of w gets s[i mod R, j mod M] more."""

    w: Any  # [D, F] frozen
    s: Array  # [R, M], M a divisor of F

    def __rmatmul__(self, x: Array) -> Array:
        y, R = x @ self.w, self.s.shape[-2]
        shards = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % R)]).reshape(*x.shape[:-1], -1, R)
        added = shards.sum(-2) @ self.s
        return y + jnp.tile(added, y.shape[-1] // added.shape[-1])


class MiSS(Method):
    """W + S repeated over the input, S [R, F] = 0 at first (arXiv:2409.15371)."""

    demo = False

    rank: Size = 64
    where: str = "linear"
    mini: int = 0  # columns of S, repeated over the output too; 0: as many as W has

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        for t in targets(self.where, params, 2, "miss"):
            if self.mini and t.shape[1] % self.mini:
                raise InputError(f"miss: {t.path} has {t.shape[1]} outputs, wanted a multiple of mini={self.mini}")
        one = lambda key, D, F: {"s": jnp.zeros((self.rank, self.mini or F))}  # noqa: E731
        return each_matrix(key, params, self.where, one, "miss")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, trainable, MiSSWeight)


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
        return wrap_weights(params, trainable, BatWeight)
