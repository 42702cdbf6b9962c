"""(IA)3: learned scales of keys, values and the MLP's inner activations (arXiv:2205.05638)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ...model import Weight
from ..base import Method
from ..targets import each_matrix, replace_biases, wrap_weights


class ScaledWeight(Weight):
    """(x * before) @ w * after; one of the two is given."""

    w: Any  # [D, F] frozen
    before: Any = None  # [D]
    after: Any = None  # [F]

    def __rmatmul__(self, x: Array) -> Array:
        y = (x if self.before is None else x * self.before) @ self.w
        return y if self.after is None else y * self.after


class IA3(Method):
    """l * (x W_k + b), l * (x W_v + b), and (l * h) W_down + b, with l = 1 at first (arXiv:2205.05638)."""

    demo = False
    lr_multiplier = 50.0

    where: str = "layers/attn/[kv]"  # what comes out is scaled
    inner: str = "layers/mlp/down"  # what goes in is scaled

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        after, before = (lambda k, D, F: {"after": jnp.ones(F)}), (lambda k, D, F: {"before": jnp.ones(D)})
        outputs = each_matrix(key, params, self.where, after, "ia3") if self.where else {}
        return outputs | (each_matrix(key, params, self.inner, before, "ia3") if self.inner else {})

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        def scaled(bias: Array, before: Any = None, after: Any = None) -> Array:
            return bias if after is None else bias * after

        bound = wrap_weights(params, trainable, ScaledWeight, before=1.0, after=1.0)
        return replace_biases(bound, trainable, scaled, after=1.0)
