"""Bottleneck adapters: after both sublayers (arXiv:1902.00751), after the MLP, or in parallel to a sublayer."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Real, Size
from ...model import Weight, static
from ...model.tree import named, nested
from ..base import Method
from ..targets import Target, init_matrices, iter_full_arrays


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
    """y + gelu(y W_down + b_down) W_up + b_up behind both sublayers, W_up = 0 at init (arXiv:1902.00751).

    y [F], W_down [F, R] ~ N(0, 1/F), W_up [R, F]. HF PEFT: none.
    """

    weight = AdapterWeight
    axes: ClassVar = {"down": "FR", "down_bias": "R", "up": "RF", "up_bias": "F"}

    rank: Size = 16
    where: str = "layers/(attn/o|mlp/down)"

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        F, R = target.shape[1], self.rank
        down = F**-0.5 * jax.random.normal(key, (F, R))
        return {"down": down, "down_bias": jnp.zeros(R), "up": jnp.zeros((R, F)), "up_bias": jnp.zeros(F)}

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return init_matrices(key, params, self.where, self.arrays, self.name, "down")


class Pfeiffer(Houlsby):
    """y + gelu(y W_down + b_down) W_up + b_up behind the MLP alone, W_up = 0 at init (arXiv:2005.00247).

    Shapes and init as Houlsby. HF PEFT: none.
    """

    demo = False

    where: str = "layers/mlp/down"


class ParallelAdapterWeight(Weight):
    """scale (relu(x @ down + down_bias) @ up + up_bias), which the sublayer adds to its output."""

    linear = False

    down: Array  # [D, R]
    down_bias: Array  # [R]
    up: Array  # [R, D]
    up_bias: Array  # [D]
    w: Any = None  # the parallel adapter of an earlier method
    scale: float = static(default=1.0)

    def __rmatmul__(self, x: Array) -> Array:
        y = self.scale * (jax.nn.relu(x @ self.down + self.down_bias) @ self.up + self.up_bias)
        return y if self.w is None else x @ self.w + y


class Parallel(Houlsby):
    """f(x) + scale (relu(x W_down + b_down) W_up + b_up) of a sublayer f, W_up = 0 at init (arXiv:2110.04366).

    `where` picks sublayers by their last matrix; x is the normalised input of the sublayer. Shapes and init as Houlsby.
    HF PEFT: none.
    """

    demo = False

    scale: Real = 4.0
    where: str = "layers/mlp/down"  # or layers/attn/o, or both

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        if not target.path.endswith(("attn/o", "mlp/down")):
            raise InputError(f"parallel: {target.key} ends no sublayer; where= picks layers/attn/o and layers/mlp/down")
        return super().arrays(key, target)

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        flat = dict(named(params))
        for path, _, arrays in iter_full_arrays(params, trainable):
            parallel = f"{path.rpartition('/')[0]}/parallel_adapter"
            flat[parallel] = ParallelAdapterWeight(**arrays, w=flat.get(parallel), scale=self.scale)
        return nested(flat)
