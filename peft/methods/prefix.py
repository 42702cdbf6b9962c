"""Prefix tuning: P learned keys and values before the text, in every layer (arXiv:2101.00190)."""

from typing import Any

import jax
from jax import Array

from ...bounds import Size
from ...model import Context
from ...model.tree import named, nested
from ..base import Method
from ..targets import Target, each_layer, layer_keys, targets


class Prefix(Method):
    """attention over [past_k; k], [past_v; v], with P = tokens learned positions a layer (arXiv:2101.00190).

    No weight decay: keys and values are states; a key of 0 is not unseen but takes part in the softmax with exp(0).
    """

    identity = False
    rate = 100.0
    decayed = ""

    tokens: Size = 20
    std: float = 0.02

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, width: int) -> Array:
            return self.std * jax.random.normal(key, (self.tokens, width))

        return {t.key: each_layer(t, lambda k, t=t: one(k, t.shape[1]), layer_keys(key, t)) for t in past(params)}

    def context(self, trainable: Any) -> Context:
        return Context(past=nested(trainable))


def past(params: Any) -> list[Target]:
    """Where keys and values are made: the matrix of each, or its columns [D, K H] of the one that makes all three."""
    flat, found = named(params), list(targets("layers/attn/([kv]|qkv)", params, ndim=2))
    parts = []
    for t in found:
        if not t.path.endswith("qkv"):
            parts.append(t)
            continue
        queries = flat[t.path.replace("qkv", "o")].shape[-2]
        width = max(t.shape[1] - queries, 0) // 2
        change = {n: {f: getattr(t, f).replace("qkv", n) for f in ("key", "path", "name")} for n in "kv"}
        parts += [t._replace(**change[n], shape=(t.shape[0], width)) for n in "kv"]
    return parts
