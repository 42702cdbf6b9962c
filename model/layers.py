"""The parts of the decoder that own parameters: norm, attention, MLP, embedding, head. Axes: model/transformer.py."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .. import InputError
from .attention import attend
from .config import Config, init_parameter
from .rope import rotate
from .sharding import constrain
from .tree import name_and_layers
from .weight import matmul


class Part(nn.Module):
    """A module that owns parameters by name."""

    config: Config

    def leaf(self, name: str, *shape: int) -> Any:
        """The parameter `name` as it is stored; made when initialising, so no shape check meets a weight node."""
        if self.is_initializing():
            path, _ = name_and_layers("/".join((*self.scope.path, name)))  # type: ignore[union-attr]
            return self.param(name, lambda key: init_parameter(self.config, path, key, shape))
        return self.get_variable("params", name)

    def bias(self, y: Array, name: str, on: bool) -> Array:
        return y + self.leaf(name, y.shape[-1]).astype(y.dtype) if on else y

    def beside(self, y: Array, x: Array) -> Array:
        """The sublayer's output y for its input x, plus x @ w of a weight that a method bound beside it."""
        w = self.get_variable("params", "beside")
        return y if w is None else y + matmul(x, w)


class Norm(Part):
    """RMSNorm x / rms(x) * (offset + scale) (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), in fp32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype, x = self.config, x.dtype, x.astype(jnp.float32)
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + c.norm_eps)
        x = x * (c.norm_offset + self.leaf("scale", x.shape[-1]).astype(x.dtype))
        if c.norm == "layer":
            x = x + self.leaf("bias", x.shape[-1]).astype(x.dtype)
        return x.astype(dtype)


class LayerInputs(NamedTuple):
    """What a layer sees: which keys, and the (sin, cos) that its queries and keys are turned by."""

    mask_BTS: Array | None  # None: causal
    sin_cos: tuple[Array, Array] | None


class Attention(Part):
    """Grouped-query attention with rotary positions, a read-only past (prefixes) and a key/value cache."""

    @nn.compact
    def __call__(self, x_BTD: Array, view: LayerInputs, index: Array | None) -> Array:
        c, (B, T, _) = self.config, x_BTD.shape
        norms = {name: Norm(c, name=f"{name}_norm") for name in "qk"} if c.qk_norm != "none" else {}
        q, k, v = self.projected(x_BTD)
        q, k = self.heads(q, norms.get("q"), view.sin_cos), self.heads(k, norms.get("k"), view.sin_cos)
        v, prompt = self.heads(v), self.get_variable("params", "prompt")
        if index is not None:
            k, v = self.cached("k", k, index), self.cached("v", v, index)
        if self.has_variable("past", "k"):
            k, v = self.behind_past("k", k), self.behind_past("v", v)
        ahead = k.shape[1] - T if index is None else None
        y = attend(q, k, v, view.mask_BTS, c.attention, ahead, c.query_scale, c.attn_cap)
        y = checkpoint_name(y.reshape(B, T, c.N * c.H), "attention")
        seen = None if prompt is None else self.prompted(q, prompt, norms.get("k"))
        y = y if seen is None or prompt.behind else y + seen
        y = self.bias(matmul(y, self.leaf("o", c.N * c.H, c.D)), "o_bias", c.o_bias)
        return self.beside(y if seen is None or not prompt.behind else y + seen, x_BTD)

    def projected(self, x: Array) -> list[Array]:
        """Queries [..., N*H], keys and values [..., K*H] of states [..., D]."""
        c, widths = self.config, {"q": self.config.N, "k": self.config.K, "v": self.config.K}
        if c.fused_qkv:
            y = matmul(x, self.leaf("qkv", c.D, (c.N + 2 * c.K) * c.H))
            return jnp.split(self.bias(y, "qkv_bias", c.qkv_bias), [c.N * c.H, (c.N + c.K) * c.H], axis=-1)
        made = {name: matmul(x, self.leaf(name, c.D, n * c.H)) for name, n in widths.items()}
        return [self.bias(y, f"{name}_bias", c.qkv_bias) for name, y in made.items()]

    def heads(self, y: Array, norm: Norm | None = None, turn: tuple[Array, Array] | None = None) -> Array:
        """A projection [B, T, heads*H] as heads [B, T, heads, H], normed as the config says and turned."""
        c, (B, T, _) = self.config, y.shape
        y = norm(y) if norm and c.qk_norm == "full" else y
        y = y.reshape(B, T, -1, c.H)
        y = norm(y) if norm and c.qk_norm == "head" else y
        return rotate(y, turn) if turn else y

    def prompted(self, q_BTNH: Array, w: Any, norm: Norm | None) -> Array:
        """w.gate softmax(q k^T) v [B, T, N*H] over the P states of w.prompt [P, D] alone, whose keys do not turn."""
        c, (B, T, _, _) = self.config, q_BTNH.shape
        _, k, v = self.projected(w.prompt.astype(q_BTNH.dtype)[None])
        mask, (k, v) = jnp.ones((1, 1, 1), bool), (self.heads(k, norm), self.heads(v))
        y = attend(q_BTNH, k, v, mask, "reference", scale=c.query_scale, cap=c.attn_cap)
        return w.gate.astype(y.dtype) * y.reshape(B, T, c.N * c.H)

    def cached(self, name: str, new_BTKH: Array, index: Array) -> Array:
        """Write new keys or values at `index` of the cache [B, S, K, H] and return all of it."""
        cache = self.get_variable("cache", name)
        cache = jax.lax.dynamic_update_slice(cache, new_BTKH.astype(cache.dtype), (0, index, 0, 0))
        self.put_variable("cache", name, cache)
        return cache

    def behind_past(self, name: str, x_BSKH: Array) -> Array:
        """Prepend the learned past [P, K*H], the same for every row."""
        B, _, K, H = x_BSKH.shape
        past_PKH = self.get_variable("past", name).astype(x_BSKH.dtype).reshape(-1, K, H)
        return jnp.concatenate([jnp.broadcast_to(past_PKH, (B, *past_PKH.shape)), x_BSKH], axis=1)


ACTIVATIONS = {"silu": nn.silu, "gelu": partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu, "relu": nn.relu}


class MLP(Part):
    """Gated act(x @ gate) * (x @ up) @ down (arXiv:2002.05202), or plain act(x @ up) @ down."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        y = self.bias(matmul(x_BTD, self.leaf("up", c.D, c.F)), "up_bias", c.mlp_bias)
        if c.gated:
            y = act(self.bias(matmul(x_BTD, self.leaf("gate", c.D, c.F)), "gate_bias", c.mlp_bias)) * y
        else:
            y = act(y)
        return self.beside(self.bias(matmul(y, self.leaf("down", c.F, c.D)), "down_bias", c.mlp_bias), x_BTD)


def max_text_length(config: Config, virtual: int = 0) -> int:
    """How many positions a text may take: the context, less the virtual tokens before it where positions are learned;
    no limit where RoPE stretches as the text grows (dynamic)."""
    if config.rope is not None and config.rope.kind == "dynamic":
        return sys.maxsize
    return config.context - (virtual if config.learned_positions else 0)


def check_prompt_lengths(
    config: Config, prompts: Sequence[Sequence[int]], more: int, virtual: int = 0, where: Sequence[str] = ()
) -> None:
    """InputError naming the first of the prompts that, with `more` tokens behind it, is longer than `room`."""
    most = max_text_length(config, virtual)
    for i, prompt in enumerate(prompts):
        if len(prompt) + more > most:
            name = where[i] if where else f"prompt {i + 1}"
            taken = f" ({virtual} virtual tokens taken off)" if most < config.context else ""
            raise InputError(f"{name}: a prompt of {len(prompt)} tokens and {more} behind it exceed the model's "
                             f"context of {most}{taken}; shorten it, or leave it out")  # fmt: skip


def check_positions(config: Config, length: int) -> None:
    """Raise InputError for a row longer than a table of learned positions, which jax would read its last row for."""
    if config.learned_positions and length > config.context:
        raise InputError(f"a row of {length} positions, but the base has learned {config.context}; shorten the rows")


class Embed(Part):
    """The token table [V, D], to which a tied model projects, and learned positions [context, D] if it has them."""

    def setup(self) -> None:
        c = self.config
        self.table = self.leaf("table", c.V, c.D)
        if c.learned_positions:
            self.positions = self.leaf("positions", c.context, c.D)

    def __call__(self, ids_BT: Array, positions_BT: Array) -> Array:
        c, ids_BT = self.config, constrain(ids_BT, "data", "context")
        x_BTD = self.table[ids_BT].astype(c.dtype)
        x_BTD = constrain(x_BTD, "data", "context", "fsdp")  # as the table has it; then the rows are exchanged for D
        if c.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(c.embed_scale, x_BTD.dtype)
        if c.learned_positions:
            check_positions(c, ids_BT.shape[1])
            x_BTD = x_BTD + self.positions[positions_BT].astype(x_BTD.dtype)
        return x_BTD

    def logits(self, x_BTD: Array) -> Array:
        return matmul(x_BTD, self.table.T)


class Head(Part):
    """The untied output projection [D, V]."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        return matmul(x_BTD, self.leaf("matrix", self.config.D, self.config.V))
