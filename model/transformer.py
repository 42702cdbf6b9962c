"""The decoder: embedding, L blocks of attention and MLP, output projection. Every matrix is only ever used as `x @ w`.

Axes, in names (`x_BTD`), config fields and comments alike:
B batch · T query · S key · D model · N heads · K kv heads · G = N/K · H head · F ffn · V vocab · L layers · R rank ·
P virtual tokens
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .attention import VIRTUAL, attend, rope_table, rotate, visible
from .config import Config, initial
from .sharding import constrain
from .tree import canonical
from .weight import matmul


class Part(nn.Module):
    """A module that owns parameters by name."""

    config: Config

    def leaf(self, name: str, *shape: int) -> Any:
        """The parameter `name`, made when initialising and read otherwise: so no shape check meets a weight node."""
        if self.is_initializing():
            path, _ = canonical("/".join((*self.scope.path, name)))  # type: ignore[union-attr]
            return self.param(name, lambda key: initial(self.config, path, key, shape))
        return self.get_variable("params", name).astype(self.config.dtype)

    def bias(self, y: Array, name: str, on: bool) -> Array:
        return y + self.leaf(name, y.shape[-1]) if on else y


class Norm(Part):
    """RMSNorm x / rms(x) * scale (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), in fp32."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, x = self.config, x_BTD.astype(jnp.float32)
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + c.norm_eps)
        x = x * self.leaf("scale", c.D)
        return self.bias(x, "bias", c.norm == "layer").astype(c.dtype)


class Attention(Part):
    """Grouped-query attention with rotary positions, a read-only past (prefixes) and a key/value cache."""

    @nn.compact
    def __call__(
        self, x_BTD: Array, sin_cos: tuple[Array, Array], mask_BTS: Array | None, index: Array | None
    ) -> Array:
        c, (B, T, _) = self.config, x_BTD.shape
        q = self.bias(matmul(x_BTD, self.leaf("q", c.D, c.N * c.H)), "q_bias", c.qkv_bias).reshape(B, T, c.N, c.H)
        k = self.bias(matmul(x_BTD, self.leaf("k", c.D, c.K * c.H)), "k_bias", c.qkv_bias).reshape(B, T, c.K, c.H)
        v = self.bias(matmul(x_BTD, self.leaf("v", c.D, c.K * c.H)), "v_bias", c.qkv_bias).reshape(B, T, c.K, c.H)
        q, k = rotate(q, sin_cos), rotate(k, sin_cos)
        if index is not None:
            k, v = self.cached("k", k, index), self.cached("v", v, index)
        if self.has_variable("past", "k"):
            k, v = self.behind_past("k", k), self.behind_past("v", v)
        ahead = k.shape[1] - T if index is None else None
        y = attend(q, k, v, mask_BTS, c.attention, ahead).reshape(B, T, c.N * c.H)
        return self.bias(matmul(y, self.leaf("o", c.N * c.H, c.D)), "o_bias", c.bias)

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


class MLP(Part):
    """Gated act(x @ gate) * (x @ up) @ down (arXiv:2002.05202), or plain act(x @ up) @ down."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        act = nn.silu if c.activation == "silu" else nn.gelu
        y = self.bias(matmul(x_BTD, self.leaf("up", c.D, c.F)), "up_bias", c.bias)
        if c.gated:
            y = act(self.bias(matmul(x_BTD, self.leaf("gate", c.D, c.F)), "gate_bias", c.bias)) * y
        else:
            y = act(y)
        return self.bias(matmul(y, self.leaf("down", c.F, c.D)), "down_bias", c.bias)


class Block(nn.Module):
    """Pre-norm residual block: x + attn(norm(x)), then x + mlp(norm(x))."""

    config: Config

    @nn.compact
    def __call__(self, x_BTD: Array, *seen: Any) -> tuple[Array, None]:
        c = self.config
        x_BTD = x_BTD + Attention(c, name="attn")(Norm(c, name="attn_norm")(x_BTD), *seen)
        x_BTD = constrain(x_BTD, ("data", "fsdp"), None, None)
        x_BTD = x_BTD + MLP(c, name="mlp")(Norm(c, name="mlp_norm")(x_BTD))
        return constrain(x_BTD, ("data", "fsdp"), None, None), None


class Unrolled(nn.Module):
    """The blocks one after the other, as `layers/0`, `layers/1`, ..."""

    config: Config
    block: Any

    @nn.compact
    def __call__(self, x_BTD: Array, *seen: Any) -> tuple[Array, None]:
        for i in range(self.config.L):
            x_BTD, _ = self.block(self.config, name=str(i))(x_BTD, *seen)
        return x_BTD, None


class Embed(Part):
    """The token table [V, D]; a tied model projects onto it."""

    def setup(self) -> None:
        self.table = self.leaf("table", self.config.V, self.config.D)

    def __call__(self, ids_BT: Array) -> Array:
        return self.table[ids_BT]

    def logits(self, x_BTD: Array) -> Array:
        return matmul(x_BTD, self.table.T)


class Head(Part):
    """The untied output projection [D, V]."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        return matmul(x_BTD, self.leaf("matrix", self.config.D, self.config.V))


class Transformer(nn.Module):
    """Decoder-only language model: `apply({"params": p}, ids_BT, positions_BT, segments_BT) -> logits_BTV`.

    Without segments each row is one document. With `cache` among the variables the row continues what it holds.
    """

    config: Config

    def setup(self) -> None:
        """The parts by name; the layers stacked or unrolled, recomputed or not, as the config says."""
        c = self.config
        block: Any = Block
        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=not c.scan)
        if c.scan:
            axes: Any = {"params": 0, "past": 0, "cache": 0}
            scan = nn.scan(block, axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.L)
            self.layers = scan(c)
        else:
            self.layers = Unrolled(c, block)
        self.embed, self.final_norm = Embed(c), Norm(c)
        if not c.tied:
            self.head = Head(c)

    def __call__(self, ids_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None) -> Array:
        x_BTD = self.hidden(ids_BT, positions_BT, segments_BT)
        return self.logits(x_BTD)

    def hidden(self, ids_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None) -> Array:
        """The states [B, T, D] behind the final norm, which `logits` projects."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        index = self.get_variable("cache", "index") if self.has_variable("cache", "index") else None
        mask_BTS = self.mask(positions_BT, segments_BT, index)
        x_BTD = constrain(self.embed(ids_BT), ("data", "fsdp"), None, None)
        sin_cos = rope_table(positions_BT, self.config.H, self.config.rope_theta)
        x_BTD, _ = self.layers(x_BTD, sin_cos, mask_BTS, index)
        return self.final_norm(x_BTD)

    def logits(self, x_BTD: Array) -> Array:
        """The output projection [..., D] -> [..., V]."""
        y = self.embed.logits(x_BTD) if self.config.tied else self.head(x_BTD)
        return y.astype(self.config.logits_dtype)

    def mask(self, positions_BT: Array, segments_BT: Array | None, index: Array | None) -> Array | None:
        """Who sees whom, computed once for all layers; None is the plain causal mask."""
        past = jax.tree.leaves(self.variables.get("past", {}))
        if segments_BT is None and index is None and not past:
            return None
        if segments_BT is None:
            segments_BT = jnp.ones_like(positions_BT)
        keys = (positions_BT, segments_BT)
        if index is not None:
            for name, new in zip(("positions", "segments"), keys, strict=True):
                slots = jax.lax.dynamic_update_slice(self.get_variable("cache", name), new, (0, index))
                self.put_variable("cache", name, slots)
            self.put_variable("cache", "index", index + positions_BT.shape[1])
            keys = (self.get_variable("cache", "positions"), self.get_variable("cache", "segments"))
        mask_BTS = visible(positions_BT, segments_BT, *keys)
        P = past[0].shape[-2] if past else 0
        return jnp.pad(mask_BTS, ((0, 0), (0, 0), (P, 0)), constant_values=True)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method puts before the text: `tokens` virtual ids V..V+P-1, or a key/value `past` of P positions."""

    tokens: int = 0
    past: Any = None  # {"layers": {"attn": {"k": [L, P, K*H], "v": [L, P, K*H]}}}, unrolled layers likewise

    @property
    def length(self) -> int:
        """P: real positions start here."""
        return self.tokens or (jax.tree.leaves(self.past)[0].shape[-2] if self.past else 0)


def forward(
    model: Transformer, params: Any, ids_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None,
    *, context: Context | None = None, cache: Any = None, start: bool = True, method: str = "__call__",
) -> tuple[Array, Any]:  # fmt: skip
    """(logits_BTV or hidden_BTD of the real positions, the cache after it): the one place that knows of a context.

    start: whether this call opens the sequence, so that virtual tokens are prepended; False when a cache goes on.
    """
    context = context or Context()
    P, lead = context.length, context.tokens if start else 0
    if P:
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        positions_BT = positions_BT + P
    if lead:
        before = jnp.broadcast_to(jnp.arange(P), (ids_BT.shape[0], P))
        ids_BT = jnp.concatenate([before + model.config.V, ids_BT], axis=1)
        positions_BT = jnp.concatenate([before, positions_BT], axis=1)  # type: ignore[list-item]
        if segments_BT is not None:
            segments_BT = jnp.concatenate([jnp.full_like(before, VIRTUAL), segments_BT], axis=1)
    variables = {"params": params}
    variables |= {} if context.past is None else {"past": context.past}
    if cache is None:
        out: Any = model.apply(variables, ids_BT, positions_BT, segments_BT, method=method)
        return out[:, lead:], None
    out, new = model.apply(
        variables | {"cache": cache}, ids_BT, positions_BT, segments_BT, method=method, mutable=["cache"]
    )
    return out[:, lead:], new["cache"]
