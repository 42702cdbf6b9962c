"""Bottleneck adapters behind attention and MLP (arXiv:1902.00751)."""

from typing import Any

import jax
from jax import Array

from ... import InputError
from ...bounds import Real, Size
from ...model import Weight, static
from ...model.tree import named, nested
from ..base import Method
from ..targets import each_matrix, init_bottleneck, iter_full_arrays, wrap_weights


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
        one = lambda key, _, F: init_bottleneck(key, F, self.rank)  # noqa: E731
        return each_matrix(key, params, self.where, one, "houlsby", "down")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, trainable, AdapterWeight)


class Pfeiffer(Houlsby):
    """y + gelu(y W_down + b_down) W_up + b_up behind the MLP alone, W_up = 0 at init (arXiv:2005.00247)."""

    demo = False

    where: str = "layers/mlp/down"


class ParallelAdapterWeight(Weight):
    """scale (relu(x @ down + down_bias) @ up + up_bias), which the sublayer adds to its output."""

    linear = False

    down: Array  # [D, R]
    down_bias: Array  # [R]
    up: Array  # [R, D]
    up_bias: Array  # [D]
    w: Any = None  # what stood there before
    scale: float = static(default=1.0)

    def __rmatmul__(self, x: Array) -> Array:
        y = self.scale * (jax.nn.relu(x @ self.down + self.down_bias) @ self.up + self.up_bias)
        return y if self.w is None else x @ self.w + y


class Parallel(Method):
    """f(x) + scale (relu(x W_down + b_down) W_up + b_up) of a sublayer f, W_up = 0 at init (arXiv:2110.04366).

    `where` picks sublayers by the matrix they end with; x is what the sublayer reads, behind its norm.
    """

    demo = False

    rank: Size = 16
    scale: Real = 4.0
    where: str = "layers/mlp/down"  # or layers/attn/o, or both

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        one = lambda key, _, D: init_bottleneck(key, D, self.rank)  # noqa: E731
        made = each_matrix(key, params, self.where, one, "parallel", "down")
        if wrong := [key for key in made if not key.split("[")[0].endswith(("attn/o", "mlp/down"))]:
            raise InputError(f"parallel: {wrong[0]} ends no sublayer; where= picks layers/attn/o and layers/mlp/down")
        return made

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        flat = dict(named(params))
        for path, _, arrays in iter_full_arrays(params, trainable):
            parallel = f"{path.rpartition('/')[0]}/parallel_adapter"
            flat[parallel] = ParallelAdapterWeight(**arrays, w=flat.get(parallel), scale=self.scale)
        return nested(flat)
