"""MiSS: one small matrix shared by all shards of the input (arXiv:2409.15371)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..model import Weight
from .base import Method
from .targets import each_matrix, wrap


class MiSSWeight(Weight):
    """x @ w + (the sum of x's shards of width R) @ s: row i of w gets row i mod R of s added."""

    w: Any  # [D, F] frozen
    s: Array  # [R, F]

    def __rmatmul__(self, x: Array) -> Array:
        R = self.s.shape[0]
        shards = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % R)]).reshape(*x.shape[:-1], -1, R)
        return x @ self.w + shards.sum(-2) @ self.s


class MiSS(Method):
    """W + S repeated over the input, S [R, F] = 0 at first (arXiv:2409.15371)."""

    demo = False

    rank: int = 64
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return each_matrix(key, params, self.where, lambda k, D, F: {"s": jnp.zeros((self.rank, F))}, "miss")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, MiSSWeight)
