"""Prefix tuning: P learned keys and values before the text, in every layer (arXiv:2101.00190)."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Bounds, Count, Size
from ...model import Context, Weight, static
from ...model.tree import named, nested
from ..base import Method
from ..targets import Target, each_layer, each_matrix, iter_full_arrays, layer_keys, targets
from .encoder import encode, encoder


class Prefix(Method):
    """attention over [past_k; k], [past_v; v], with P = tokens learned positions a layer (arXiv:2101.00190).

    No weight decay: keys and values are states; a key of 0 is not unseen but takes part in the softmax with exp(0).
    """

    identity = False
    lr_multiplier = 100.0
    decay_rule = ""

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


class PrefixMLP(Method):
    """attention over [past_k; k], [past_v; v], past = tanh(prompt W1 + b1) W2 + b2 of all layers (arXiv:2101.00190).

    Weight decay shrinks W1 and W2, not the prompt, which is a state.
    """

    identity = False
    lr_multiplier = 10.0
    decay_rule = r".*/w\d"
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


class GatedPrompt(Weight):
    """States that a layer's queries attend to apart from the text; added before the output projection or behind it."""

    linear = False

    prompt: Array  # [P, D]
    gate: Array  # [1]
    after_output_proj: bool = static(default=False)


class LLaMAAdapter(Method):
    """o(attn(x) + gate softmax(q k(prompt)^T) v(prompt)), prompt N(0, 1), gate 0 at init (arXiv:2303.16199).

    No weight decay: the prompt holds states; the gate says how much of them is added.
    """

    lr_multiplier = 100.0
    decay_rule = ""
    demo = False

    tokens: Size = 10
    layers: Count = 30  # the topmost ones, all if there are fewer
    after_output_proj: bool = False  # added behind o, as HF PEFT does in GPT-2

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, width: int, D: int) -> dict[str, Array]:
            if self.after_output_proj and width != D:
                raise InputError(
                    f"llamaadapter: after_output_proj=True wants heads of {D} together, this base's have {width}"
                )
            return {"prompt": jax.random.normal(key, (self.tokens, D)), "gate": jnp.zeros(1)}

        return each_matrix(key, params, f"layers/[-{self.layers}:]/attn/o", one, "llamaadapter", "prompt")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        found, flat = iter_full_arrays(params, trainable), named(params)
        new = {
            path[:-1] + "prompt": GatedPrompt(**arrays, after_output_proj=self.after_output_proj)
            for path, _, arrays in found
        }
        if twice := next((path for path in new if path in flat), ""):
            raise InputError(f"chain: {twice} has a prompt of an earlier method; keep one of them")
        return nested(flat | new)
