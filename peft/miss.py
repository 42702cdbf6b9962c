"""MiSS: one small matrix shared by all shards of the input (arXiv:2409.15371)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from .. import InputError
from ..model import Weight
from .base import Method
from .targets import each_matrix, targets, wrap


class MiSSWeight(Weight):
    """x @ w + (the sum of x's shards of width R) @ s: row i of w gets row i mod R of s added.

    A narrower s serves one stretch of columns after another. With s a stack of square blocks, the block w_ja of R rows
    and R columns becomes w_ja + s_a^T w_ja + s_a^T.
    """

    w: Any  # [D, F] frozen
    s: Array  # [R, F], [R, a divisor of F], or [F / R, R, R]

    def __rmatmul__(self, x: Array) -> Array:
        y, R = x @ self.w, self.s.shape[-2]
        if self.s.ndim == 3:
            w = self.w.dense() if isinstance(self.w, Weight) else self.w
            blocks = w.reshape(-1, R, len(self.s), R)
            blocks = jnp.einsum("api,jpao->jiao", self.s, blocks) + jnp.einsum("aoi->iao", self.s)
            return y + x @ blocks.reshape(w.shape)
        shards = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % R)]).reshape(*x.shape[:-1], -1, R)
        added = shards.sum(-2) @ self.s
        return y + jnp.tile(added, y.shape[-1] // added.shape[-1])


class MiSS(Method):
    """W + S repeated over the input, S [R, F] = 0 at first (arXiv:2409.15371)."""

    demo = False

    rank: int = 64
    where: str = "linear"
    mode: str = "plain"  # mini: S is `mini` wide and repeated; bat: W + (W + 1) S by blocks of rank x rank
    mini: int = 1

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        R = self.rank
        if self.mode not in ("plain", "mini", "bat"):
            raise InputError(f"miss: no mode {self.mode!r}; there are plain, mini, bat")
        for t in targets(self.where, params, 2, "miss"):
            if self.mode == "mini" and t.shape[1] % self.mini:
                raise InputError(f"miss: {t.path} has {t.shape[1]} outputs, wanted a multiple of mini={self.mini}")
            if self.mode == "bat" and (t.shape[0] % R or t.shape[1] % R):
                raise InputError(f"miss: {t.path} is {list(t.shape)}, wanted multiples of rank={R}; take another rank")

        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            return {"s": jnp.zeros({"plain": (R, F), "mini": (R, self.mini), "bat": (F // R, R, R)}[self.mode])}

        return each_matrix(key, params, self.where, one, "miss")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, MiSSWeight)
