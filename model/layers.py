"""The modules of the decoder that own parameters: norm, attention, MLP, embedding, head. Axes: model/transformer.py."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .. import InputError
from .attention import attend
from .config import Config
from .rope import rotate
from .sharding import constrain
from .tree import name_and_layers
from .weight import matmul

ACTIVATIONS = {"silu": nn.silu, "gelu": partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu, "relu": nn.relu}


def init_parameter(config: Config, name: str, key: Any, shape: tuple[int, ...]) -> Array:
    """Initial value of the parameter `name` of one layer: norms 1, biases 0, matrices normal with std fan_in^-1/2.

    Tables have std 0.02. Projections into the residual stream are scaled by (2L)^-1/2 in addition (GPT-2).
    """
    dtype = jnp.dtype(config.param_dtype)
    if name.endswith("norm/scale"):
        return jnp.full(shape, 1 - config.norm_offset, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    std = 0.02 if name.startswith("embed/") else shape[0] ** -0.5
    if name.endswith(("attn/o", "mlp/down")):
        std *= (2 * config.L) ** -0.5
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class ParamModule(nn.Module):
    """Base class of modules that own parameters, which may be weights."""

    config: Config

    def parameter(self, name: str, *shape: int) -> Any:
        """The parameter `name` as it is stored. It is created when initialising, and a weight meets no shape check."""
        if self.is_initializing():
            path, _ = name_and_layers("/".join((*self.scope.path, name)))  # type: ignore[union-attr]
            return self.param(name, lambda key: init_parameter(self.config, path, key, shape))
        return self.get_variable("params", name)

    def add_bias(self, y: Array, name: str, enabled: bool) -> Array:
        return y + self.parameter(name, y.shape[-1]).astype(y.dtype) if enabled else y

    def add_parallel_adapter(self, y: Array, x: Array) -> Array:
        """Add the output of a parallel adapter, if a method bound one; x and y are input and output of the sublayer."""
        w = self.get_variable("params", "parallel_adapter")
        return y if w is None else y + matmul(x, w)


class Norm(ParamModule):
    """RMSNorm x / rms(x) * (offset + scale) (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), in fp32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype, x = self.config, x.dtype, x.astype(jnp.float32)
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + c.norm_eps)
        x = x * (c.norm_offset + self.parameter("scale", x.shape[-1]).astype(x.dtype))
        return self.add_bias(x, "bias", c.norm == "layer").astype(dtype)


class LayerInputs(NamedTuple):
    """What attention needs besides the states: the mask, and (sin, cos) of the rotary positions."""

    mask_BTS: Array | None  # None: causal
    sin_cos: tuple[Array, Array] | None


class Attention(ParamModule):
    """Grouped-query attention with rotary positions, a read-only past (prefixes) and a key/value cache."""

    @nn.compact
    def __call__(self, x_BTD: Array, inputs: LayerInputs, cache_index: Array | None) -> Array:
        c, (B, T, _) = self.config, x_BTD.shape
        norms = {name: Norm(c, name=f"{name}_norm") for name in "qk"} if c.qk_norm != "none" else {}
        q, k, v = self.project(x_BTD)
        q = self.split_heads(q, norms.get("q"), inputs.sin_cos)
        k, v = self.split_heads(k, norms.get("k"), inputs.sin_cos), self.split_heads(v)
        if cache_index is not None:
            k, v = self.update_cache("k", k, cache_index), self.update_cache("v", v, cache_index)
        if self.has_variable("past", "k"):
            k, v = self.prepend_past("k", k), self.prepend_past("v", v)
        kv_offset = k.shape[1] - T if cache_index is None else None
        y = attend(q, k, v, inputs.mask_BTS, c.attention, kv_offset, c.query_scale, c.attn_cap)
        y = checkpoint_name(y.reshape(B, T, c.N * c.H), "attention")
        prompt = self.get_variable("params", "prompt")
        prompt_out = None if prompt is None else self.attend_prompt(q, prompt, norms.get("k"))
        if prompt_out is not None and not prompt.after_output_proj:
            y = y + prompt_out
        y = self.add_bias(matmul(y, self.parameter("o", c.N * c.H, c.D)), "o_bias", c.o_bias)
        if prompt_out is not None and prompt.after_output_proj:
            y = y + prompt_out
        return self.add_parallel_adapter(y, x_BTD)

    def project(self, x: Array) -> list[Array]:
        """Queries [..., N*H], keys and values [..., K*H] of states [..., D]."""
        c = self.config
        if c.fused_qkv:
            y = matmul(x, self.parameter("qkv", c.D, (c.N + 2 * c.K) * c.H))
            return jnp.split(self.add_bias(y, "qkv_bias", c.qkv_bias), [c.N * c.H, (c.N + c.K) * c.H], axis=-1)
        qkv = {
            name: matmul(x, self.parameter(name, c.D, n * c.H)) for name, n in zip("qkv", (c.N, c.K, c.K), strict=True)
        }
        return [self.add_bias(y, f"{name}_bias", c.qkv_bias) for name, y in qkv.items()]

    def split_heads(self, y: Array, norm: Norm | None = None, sin_cos: tuple[Array, Array] | None = None) -> Array:
        """Reshape a projection [B, T, N*H] to heads [B, T, N, H]; normalise them as configured and rotate them."""
        c, (B, T, _) = self.config, y.shape
        y = norm(y) if norm and c.qk_norm == "full" else y
        y = y.reshape(B, T, -1, c.H)
        y = norm(y) if norm and c.qk_norm == "head" else y
        return rotate(y, sin_cos) if sin_cos else y

    def attend_prompt(self, q_BTNH: Array, w: Any, norm: Norm | None) -> Array:
        """w.gate softmax(q k^T) v [B, T, N*H] over the P states w.prompt [P, D] alone, whose keys are not rotated."""
        c, (B, T, _, _) = self.config, q_BTNH.shape
        _, k, v = self.project(w.prompt.astype(q_BTNH.dtype)[None])
        mask, (k, v) = jnp.ones((1, 1, 1), bool), (self.split_heads(k, norm), self.split_heads(v))
        y = attend(q_BTNH, k, v, mask, "reference", scale=c.query_scale, logit_softcap=c.attn_cap)
        return w.gate.astype(y.dtype) * y.reshape(B, T, c.N * c.H)

    def update_cache(self, name: str, new_BTKH: Array, index: Array) -> Array:
        """Write new keys or values at `index` of the cache [B, S, K, H], and return the whole cache."""
        cache = self.get_variable("cache", name)
        cache = jax.lax.dynamic_update_slice(cache, new_BTKH.astype(cache.dtype), (0, index, 0, 0))
        self.put_variable("cache", name, cache)
        return cache

    def prepend_past(self, name: str, x_BSKH: Array) -> Array:
        """Prepend the learned past [P, K*H], the same for every row, to keys or values."""
        B, _, K, H = x_BSKH.shape
        past_PKH = self.get_variable("past", name).astype(x_BSKH.dtype).reshape(-1, K, H)
        return jnp.concatenate([jnp.broadcast_to(past_PKH, (B, *past_PKH.shape)), x_BSKH], axis=1)


class MLP(ParamModule):
    """Gated (act(x @ gate) * (x @ up)) @ down (arXiv:2002.05202), or plain act(x @ up) @ down."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, act = self.config, ACTIVATIONS[self.config.activation]
        y = self.add_bias(matmul(x_BTD, self.parameter("up", c.D, c.F)), "up_bias", c.mlp_bias)
        if c.gated:
            y = act(self.add_bias(matmul(x_BTD, self.parameter("gate", c.D, c.F)), "gate_bias", c.mlp_bias)) * y
        else:
            y = act(y)
        y = self.add_bias(matmul(y, self.parameter("down", c.F, c.D)), "down_bias", c.mlp_bias)
        return self.add_parallel_adapter(y, x_BTD)


class Embed(ParamModule):
    """The token table [V, D], which is also the output projection of a tied model, and learned positions if any."""

    def setup(self) -> None:
        c = self.config
        self.table = self.parameter("table", c.V, c.D)
        if c.learned_positions:
            self.positions = self.parameter("positions", c.context, c.D)

    def __call__(self, ids_BT: Array, positions_BT: Array) -> Array:
        c, ids_BT = self.config, constrain(ids_BT, "data", "context")
        x_BTD = self.table[ids_BT].astype(c.dtype)
        x_BTD = constrain(x_BTD, "data", "context", "fsdp")  # the table's own layout; the caller then splits the rows
        if c.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(c.embed_scale, x_BTD.dtype)
        if c.learned_positions:
            check_positions(c, ids_BT.shape[1])
            x_BTD = x_BTD + self.positions[positions_BT].astype(x_BTD.dtype)
        return x_BTD

    def logits(self, x_BTD: Array) -> Array:
        return matmul(x_BTD, self.table.T)


def check_positions(config: Config, length: int) -> None:
    """Raise InputError for a row longer than the learned positions; indexing would silently repeat the last one."""
    if config.learned_positions and length > config.context:
        raise InputError(f"a row of {length} positions, but the base has learned {config.context}; shorten the rows")


class Head(ParamModule):
    """The untied output projection [D, V]."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        return matmul(x_BTD, self.parameter("matrix", self.config.D, self.config.V))
