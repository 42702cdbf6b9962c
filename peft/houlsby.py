"""Bottleneck adapters behind attention and MLP (arXiv:1902.00751)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..model import Weight
from .base import Method
from .targets import each_matrix, wrap


class AdapterWeight(Weight):
    """y + gelu(y @ down + down_bias) @ up + up_bias with y = x @ w."""

    linear = False

    w: Any  # [D, F] frozen
    down: Array  # [F, R]
    down_bias: Array  # [R]
    up: Array  # [R, F]
    up_bias: Array  # [F]

    def __rmatmul__(self, x: Array) -> Array:
        y = x @ self.w
        return y + jax.nn.gelu(y @ self.down + self.down_bias) @ self.up + self.up_bias


def bottleneck(key: Array, D: int, R: int) -> dict[str, Array]:
    """down [D, R] ~ N(0, 1/D), up [R, D] = 0, and their biases 0: an adapter that adds nothing yet."""
    down = D**-0.5 * jax.random.normal(key, (D, R))
    return {"down": down, "down_bias": jnp.zeros(R), "up": jnp.zeros((R, D)), "up_bias": jnp.zeros(D)}


class Houlsby(Method):
    """y + gelu(y W_down + b_down) W_up + b_up behind both sublayers, W_up = 0 at init (arXiv:1902.00751)."""

    rank: int = 16
    where: str = "layers/(attn/o|mlp/down)"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        one = lambda key, _, F: bottleneck(key, F, self.rank)  # noqa: E731
        return each_matrix(key, params, self.where, one, "houlsby", "down")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, AdapterWeight)
