"""Prefix tuning: P learned keys and values before the text, in every layer (arXiv:2101.00190)."""

from typing import Any

import jax
from jax import Array

from ..model import Context
from ..model.tree import nested
from .base import Method
from .targets import each_layer, layer_keys, targets


class Prefix(Method):
    """attention over [past_k; k], [past_v; v], with P = tokens learned positions a layer (arXiv:2101.00190)."""

    identity = False
    rate = 100.0

    tokens: int = 20
    std: float = 0.02

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, width: int) -> Array:
            return self.std * jax.random.normal(key, (self.tokens, width))

        found = targets("layers/attn/[kv]", params, ndim=2)
        return {t.key: each_layer(t, lambda k, t=t: one(k, t.shape[1]), layer_keys(key, t)) for t in found}

    def context(self, trainable: Any) -> Context:
        return Context(past=nested(trainable))
