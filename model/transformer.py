"""The decoder: embedding, L blocks of attention and MLP, output projection. Every matrix is only used as `x @ w`.

Axes, in names (`x_BTD`), config fields and comments alike:
B batch · T query · S key · D model · N heads · K kv heads · G = N/K · H head · F ffn · V vocab · L layers · R rank ·
P virtual tokens or past · W rotated components of a head · C chunk or block of T · Z shards of T · X = Z G C
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .attention import PAD, VIRTUAL, attention_mask, causal_mask, soft_cap
from .config import Config
from .layers import MLP, Attention, Embed, Head, LayerInputs, Norm, check_positions
from .rope import rope_table
from .sharding import STATES, constrain, context_shards

REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": None,
}


class Block(nn.Module):
    """Residual block: x + attn(norm(x)), then x + mlp(norm(x)); `norm_at` moves the norm after the sublayer."""

    config: Config

    @nn.compact
    def __call__(self, x_BTD: Array, kind: Array | None, inputs: Any, index: Array | None) -> tuple[Array, None]:
        """`inputs`: those of this layer or, with `kind`, those of every kind of layer, stacked."""
        inputs = inputs if kind is None else jax.tree.map(lambda x: x[kind], inputs)
        x_BTD = self.sublayer(x_BTD, Attention, "attn", inputs, index)
        return self.sublayer(x_BTD, MLP, "mlp"), None

    def sublayer(self, x_BTD: Array, module: Any, name: str, *args: Any) -> Array:
        """x + module(x), with norms before or after the module as configured."""
        c = self.config
        y_BTD = x_BTD if c.norm_at == "post" else Norm(c, name=f"{name}_norm")(x_BTD)
        y_BTD = module(c, name=name)(y_BTD, *args)
        y_BTD = y_BTD if c.norm_at == "pre" else Norm(c, name=f"{name}_post_norm")(y_BTD)
        return constrain(x_BTD + y_BTD, *STATES)


class Unrolled(nn.Module):
    """The blocks one after the other, as `layers/0`, `layers/1`, ..."""

    config: Config
    block: Any

    @nn.compact
    def __call__(self, x_BTD: Array, inputs: list[LayerInputs], index: Array | None) -> tuple[Array, None]:
        for i, kind in enumerate(layer_kinds(self.config)):
            x_BTD, _ = self.block(self.config, name=str(i))(x_BTD, None, inputs[kind], index)
        return x_BTD, None


def layer_kinds(config: Config) -> list[int]:
    """The kind of each layer: the index of its window among the distinct windows, in ascending order."""
    windows = sorted(set(config.layer_windows))
    return [windows.index(window) for window in config.layer_windows]


class Transformer(nn.Module):
    """Decoder-only language model: `apply({"params": p}, ids_BT, positions_BT, segments_BT) -> logits_BTV`.

    Without segments, each row is one document. With a `cache` among the variables, the row continues the cached one.
    """

    config: Config

    def setup(self) -> None:
        """Create the modules: layers stacked or unrolled, recomputed or not, as configured."""
        c = self.config
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan)
        if c.scan:
            axes: Any = {"params": 0, "past": 0, "cache": 0}
            in_axes: Any = (0, nn.broadcast, nn.broadcast)
            scan = nn.scan(block, axes, split_rngs={"params": True}, in_axes=in_axes, length=c.L)
            self.layers: Any = scan(c)
        else:
            self.layers = Unrolled(c, block)
        self.embed, self.final_norm = Embed(c), Norm(c)
        if not c.tied:
            self.head = Head(c)

    def __call__(self, ids_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None) -> Array:
        x_BTD = self.hidden(ids_BT, positions_BT, segments_BT)
        return self.logits(x_BTD)

    def hidden(self, ids_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None) -> Array:
        """The states [B, T, D] after the final norm, which `logits` projects."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        index = self.get_variable("cache", "index") if self.has_variable("cache", "index") else None
        inputs = self.layer_inputs(positions_BT, segments_BT, index)
        x_BTD = constrain(self.embed(ids_BT, positions_BT), *STATES)
        args: Any = (inputs,)
        if self.config.scan:  # all layers share one program, so a layer picks its inputs by number
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
            args = (None, inputs[0]) if len(inputs) == 1 else (jnp.array(layer_kinds(self.config)), stacked)
        x_BTD, _ = self.layers(x_BTD, *args, index)
        return self.final_norm(x_BTD)

    def logits(self, x_BTD: Array) -> Array:
        """The output projection [..., D] -> [..., V]."""
        y = self.embed.logits(x_BTD) if self.config.tied else self.head(x_BTD)
        return soft_cap(y.astype(self.config.logits_dtype), self.config.logit_cap)

    def layer_inputs(
        self, positions_BT: Array, segments_BT: Array | None, index: Array | None
    ) -> list[LayerInputs]:  # fmt: skip
        """The inputs of each kind of layer, computed once for all layers."""
        c, past, T = self.config, jax.tree.leaves(self.variables.get("past", {})), positions_BT.shape[1]
        P = past[0].shape[-2] if past else 0
        windows = sorted(set(c.layer_windows))
        one_document = segments_BT is None and index is None and not past
        segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
        positions_BS, segments_BS = positions_BT, segments_BT
        if index is not None:
            positions_BS, segments_BS = self.update_cache(index, positions_BT, segments_BT)

        def mask(window: int) -> Array | None:
            if one_document and (not window or window >= T):
                return None
            mask_BTS = attention_mask(positions_BT, segments_BT, positions_BS, segments_BS, window)
            return constrain(jnp.pad(mask_BTS, ((0, 0), (0, 0), (P, 0)), constant_values=True), *STATES)

        masks = [mask(window) for window in windows]
        if any(m is not None for m in masks):
            masks = [jnp.broadcast_to(causal_mask(T, T), (len(positions_BT), T, T)) if m is None else m for m in masks]
        ropes = [c.rope_local if window and c.rope_local else c.rope for window in windows]
        length_B = positions_BT.max(axis=1) + 1
        sin_cos = [rope_table(positions_BT, rope, c.H, length_B) if rope else None for rope in ropes]
        return [LayerInputs(*pair) for pair in zip(masks, sin_cos, strict=True)]

    def update_cache(self, index: Array, positions_BT: Array, segments_BT: Array) -> tuple[Array, Array]:
        """Write new positions and segments at `index` of the cache, and return the whole (positions, segments)."""
        positions_BS, segments_BS = (
            jax.lax.dynamic_update_slice(self.get_variable("cache", name), new, (0, index))
            for name, new in (("positions", positions_BT), ("segments", segments_BT))
        )
        self.put_variable("cache", "positions", positions_BS)
        self.put_variable("cache", "segments", segments_BS)
        self.put_variable("cache", "index", index + positions_BT.shape[1])
        return positions_BS, segments_BS


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method puts before the text: `tokens` virtual ids V..V+P-1, or a key/value `past` of P positions."""

    tokens: int = 0
    past: Any = None  # {"layers": {"attn": {"k": [L, P, K*H], "v": [L, P, K*H]}}}, or in the layout of unrolled layers

    @property
    def length(self) -> int:
        """P: real positions start here."""
        return self.tokens or (jax.tree.leaves(self.past)[0].shape[-2] if self.past else 0)

    def layered(self, config: Config) -> Any:
        """The past in the layout of the layers: stacked, or one per layer."""
        if config.scan or "attn" not in self.past["layers"]:
            return self.past
        return {"layers": {str(i): jax.tree.map(lambda x, i=i: x[i], self.past["layers"]) for i in range(config.L)}}


def forward(
    model: Transformer, params: Any, ids_BT: Array, positions_BT: Array | None = None, segments_BT: Array | None = None,
    *, context: Context | None = None, cache: Any = None, start: bool = True, method: str = "__call__",
) -> tuple[Array, Any]:  # fmt: skip
    """(logits_BTV or hidden_BTD of the real positions, the cache after it). Only this function handles a context.

    start: this call begins the sequence, so virtual tokens are prepended; False for a call that continues a cache.
    """
    context, T = context or Context(), ids_BT.shape[1]
    if context.length:
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
        positions_BT = positions_BT + context.length
        check_positions(model.config, T + context.length)
    if context.tokens and start:
        multiple = context_shards(T) if cache is None else 1
        args = _prepend_virtual(model.config, context.tokens, multiple, ids_BT, positions_BT, segments_BT)
        ids_BT, positions_BT, segments_BT = args
    prepended = ids_BT.shape[1] - T
    variables = {"params": params}
    variables |= {} if context.past is None else {"past": context.layered(model.config)}
    if cache is None:
        out: Any = model.apply(variables, ids_BT, positions_BT, segments_BT, method=method)
        return out[:, prepended:], None
    out, new = model.apply(
        variables | {"cache": cache}, ids_BT, positions_BT, segments_BT, method=method, mutable=["cache"]
    )
    return out[:, prepended:], new["cache"]


def _prepend_virtual(
    config: Config, P: int, multiple: int, ids_BT: Array, positions_BT: Any, segments_BT: Array | None
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Prepend P virtual tokens, and before them as much padding as makes the length a `multiple`."""
    B, T = ids_BT.shape
    positions_BP, padding = jnp.broadcast_to(jnp.arange(P), (B, P)), -(P + T) % multiple

    def prepend(virtual_BP: Array, real_BT: Array) -> Array:
        return jnp.pad(jnp.concatenate([virtual_BP, real_BT], axis=1), ((0, 0), (padding, 0)), constant_values=PAD)

    if segments_BT is None and (padding or any(config.windows)):  # a window must not hide a virtual token
        segments_BT = jnp.ones_like(ids_BT)
    if segments_BT is not None:
        segments_BT = prepend(jnp.full_like(positions_BP, VIRTUAL), segments_BT)
    return prepend(positions_BP + config.V, ids_BT), prepend(positions_BP, positions_BT), segments_BT
