"""LoRA: low-rank updates of matrices (arXiv:2106.09685)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..model import Weight, static
from ..model.tree import replace
from .base import Method, each_layer, layer_keys, targets, whole


class LoRAWeight(Weight):
    """x @ w + (scale x @ a) @ b: the small product is scaled, and w + scale a b never exists."""

    w: Any  # [D, F] frozen
    a: Array  # [D, R]
    b: Array  # [R, F]
    scale: float = static()

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + (self.scale * (x @ self.a)) @ self.b


class LoRA(Method):
    """W + (alpha / rank) A B, with A [D, R] uniform in +-D^-1/2 and B [R, F] = 0 (arXiv:2106.09685)."""

    rank: int = 8
    alpha: float = 16.0
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            a = jax.random.uniform(key, (D, self.rank), minval=-(D**-0.5), maxval=D**-0.5)
            return {"a": a, "b": jnp.zeros((self.rank, F))}

        found = targets(self.where, params, ndim=2, what="lora")
        return {t.key: each_layer(t, lambda k, t=t: one(k, *t.shape), layer_keys(key, t, "a")) for t in found}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scale = self.alpha / self.rank
        return replace(params, {path: LoRAWeight(w, **t, scale=scale) for path, w, t in whole(params, trainable)})
