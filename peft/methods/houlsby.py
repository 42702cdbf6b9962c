"""Bottleneck adapters behind attention and MLP (arXiv:1902.00751)."""

from typing import Any

import jax
from jax import Array

from ...bounds import Size
from ...model import Weight
from ..base import Method
from ..targets import bottleneck, each_matrix, wrap


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


class Houlsby(Method):
    """y + gelu(y W_down + b_down) W_up + b_up behind both sublayers, W_up = 0 at init (arXiv:1902.00751)."""

    rank: Size = 16
    where: str = "layers/(attn/o|mlp/down)"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        one = lambda key, _, F: bottleneck(key, F, self.rank)  # noqa: E731
        return each_matrix(key, params, self.where, one, "houlsby", "down")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, AdapterWeight)
