"""Prefix tuning as its paper trains it: an MLP makes the keys and values of all layers (arXiv:2101.00190)."""

from typing import Annotated, Any

import jax.numpy as jnp
from jax import Array

from ...bounds import Bounds, Size
from ...model import Context
from ..base import Method
from .encoder import encode, encoder
from .prefix import past


class PrefixMLP(Method):
    """attention over [past_k; k], [past_v; v], past = tanh(prompt W1 + b1) W2 + b2 of all layers (arXiv:2101.00190).

    Weight decay shrinks W1 and W2, not the prompt, which is a state.
    """

    identity = False
    rate = 10.0
    decayed = r".*/w\d"
    demo = False

    tokens: Size = 20
    hidden: Annotated[int, Bounds(0, 65_536)] = 0  # 0: the width of the keys, K H

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        found = past(params)
        width, depth = found[0].shape[1], max(t.layers.stop for t in found if t.layers)
        return {"prefix/mlp": encoder(key, self.tokens, width, self.hidden or width, depth * 2 * width)}

    def context(self, trainable: Any) -> Context:
        arrays = trainable["prefix/mlp"]
        P, width = arrays["prompt"].shape
        k, v = encode(arrays, jnp.tanh).reshape(P, -1, 2, width).transpose(2, 1, 0, 3)  # [L, P, K*H] each
        return Context(past={"layers": {"attn": {"k": k, "v": v}}})
