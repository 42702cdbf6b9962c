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

from .attention import PAD, VIRTUAL, attention_mask, causal_mask, soft_cap
from .config import Config
from .layers import MLP, Attention, Embed, Head, LayerInputs, Norm, check_positions
from .rope import rope_table
from .sharding import STATES, constrain, context_shards

_keep = jax.checkpoint_policies
POLICIES: dict[str, Any] = {
    "dots": _keep.dots_with_no_batch_dims_saveable,
    "offload": _keep.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "attention": _keep.save_only_these_names("attention"),
    "full": None,
}


class Block(nn.Module):
    """Residual block: x + attn(norm(x)), then x + mlp(norm(x)); a norm may stand behind a sublayer instead, or too."""

    config: Config

    @nn.compact
    def __call__(self, x_BTD: Array, kind: Array | None, views: Any, index: Array | None) -> tuple[Array, None]:
        view = views if kind is None else jax.tree.map(lambda v: v[kind], views)
        x_BTD = self.sublayer(x_BTD, Attention, "attn", view, index)
        return self.sublayer(x_BTD, MLP, "mlp"), None

    def sublayer(self, x_BTD: Array, part: Any, name: str, *seen: Any) -> Array:
        """x + part(x), with the norms where the config has them."""
        c = self.config
        y_BTD = x_BTD if c.norm_at == "post" else Norm(c, name=f"{name}_norm")(x_BTD)
        y_BTD = part(c, name=name)(y_BTD, *seen)
        y_BTD = y_BTD if c.norm_at == "pre" else Norm(c, name=f"{name}_post_norm")(y_BTD)
        return constrain(x_BTD + y_BTD, *STATES)


class Unrolled(nn.Module):
    """The blocks one after the other, as `layers/0`, `layers/1`, ..."""

    config: Config
    block: Any

    @nn.compact
    def __call__(self, x_BTD: Array, views: list[LayerInputs], index: Array | None) -> tuple[Array, None]:
        for i, kind in enumerate(layer_kinds(self.config)):
            x_BTD, _ = self.block(self.config, name=str(i))(x_BTD, None, views[kind], index)
        return x_BTD, None


def layer_kinds(config: Config) -> list[int]:
    """Which of the distinct windows each layer has."""
    distinct = sorted(set(config.layer_windows))
    return [distinct.index(w) for w in config.layer_windows]


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
            block = nn.remat(Block, policy=POLICIES[c.remat], prevent_cse=not c.scan)
        if c.scan:
            axes: Any = {"params": 0, "past": 0, "cache": 0}
            inputs: Any = (0, nn.broadcast, nn.broadcast)
            scan = nn.scan(block, axes, split_rngs={"params": True}, in_axes=inputs, length=c.L)
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
        """The states [B, T, D] behind the final norm, which `logits` projects."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        index = self.get_variable("cache", "index") if self.has_variable("cache", "index") else None
        views = self.views(positions_BT, segments_BT, index)
        x_BTD = constrain(self.embed(ids_BT, positions_BT), *STATES)
        seen: Any = (views,)
        if self.config.scan:  # the layers share a program, so a layer picks its view by number
            stacked = jax.tree.map(lambda *v: jnp.stack(v), *views)
            seen = (None, views[0]) if len(views) == 1 else (jnp.array(layer_kinds(self.config)), stacked)
        x_BTD, _ = self.layers(x_BTD, *seen, index)
        return self.final_norm(x_BTD)

    def logits(self, x_BTD: Array) -> Array:
        """The output projection [..., D] -> [..., V]."""
        y = self.embed.logits(x_BTD) if self.config.tied else self.head(x_BTD)
        return soft_cap(y.astype(self.config.logits_dtype), self.config.logit_cap)

    def views(self, positions_BT: Array, segments_BT: Array | None, index: Array | None) -> list[LayerInputs]:
        """What each kind of layer sees, computed once for all of them."""
        c, past, T = self.config, jax.tree.leaves(self.variables.get("past", {})), positions_BT.shape[1]
        windows = sorted(set(c.layer_windows))
        plain = segments_BT is None and index is None and not past
        segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
        at, of = (positions_BT, segments_BT) if index is None else self.slots(index, positions_BT, segments_BT)

        def mask(window: int) -> Array | None:
            if plain and (not window or window >= T):
                return None
            P = past[0].shape[-2] if past else 0
            seen_BTS = attention_mask(positions_BT, segments_BT, at, of, window)
            return constrain(jnp.pad(seen_BTS, ((0, 0), (0, 0), (P, 0)), constant_values=True), *STATES)

        masks = [mask(window) for window in windows]
        if any(m is not None for m in masks):
            masks = [jnp.broadcast_to(causal_mask(T, T), (len(positions_BT), T, T)) if m is None else m for m in masks]
        ropes = [c.rope_local if window and c.rope_local else c.rope for window in windows]
        length_B = positions_BT.max(axis=1) + 1
        turns = [rope_table(positions_BT, r, c.H, length_B) if r else None for r in ropes]
        return [LayerInputs(m, turn) for m, turn in zip(masks, turns, strict=True)]

    def slots(self, index: Array, *keys: Array) -> list[Array]:
        """The positions and segments of all that the cache holds, the new ones written at `index`."""
        found = []
        for name, new in zip(("positions", "segments"), keys, strict=True):
            found.append(jax.lax.dynamic_update_slice(self.get_variable("cache", name), new, (0, index)))
            self.put_variable("cache", name, found[-1])
        self.put_variable("cache", "index", index + keys[0].shape[1])
        return found


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method puts before the text: `tokens` virtual ids V..V+P-1, or a key/value `past` of P positions."""

    tokens: int = 0
    past: Any = None  # {"layers": {"attn": {"k": [L, P, K*H], "v": [L, P, K*H]}}}, or as unrolled layers have it

    @property
    def length(self) -> int:
        """P: real positions start here."""
        return self.tokens or (jax.tree.leaves(self.past)[0].shape[-2] if self.past else 0)

    def layered(self, config: Config) -> Any:
        """The past as the layers read it: unrolled ones each have their own."""
        if config.scan or "attn" not in self.past["layers"]:
            return self.past
        one = lambda i: jax.tree.map(lambda x: x[i], self.past["layers"])  # noqa: E731
        return {"layers": {str(i): one(i) for i in range(config.L)}}


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
        check_positions(model.config, ids_BT.shape[1] + P)
    if lead:
        before = jnp.broadcast_to(jnp.arange(P), (ids_BT.shape[0], P))
        odd = (
            -(P + ids_BT.shape[1]) % context_shards(ids_BT.shape[1]) if cache is None else 0
        )  # padding, so that T divides
        if segments_BT is None and (odd or any(model.config.windows)):  # no window hides a virtual token
            segments_BT = jnp.ones_like(ids_BT)
        if segments_BT is not None:
            segments_BT = jnp.concatenate([jnp.full_like(before, VIRTUAL), segments_BT], axis=1)
            segments_BT = jnp.pad(segments_BT, ((0, 0), (odd, 0)), constant_values=PAD)
        ids_BT = jnp.pad(jnp.concatenate([before + model.config.V, ids_BT], axis=1), ((0, 0), (odd, 0)))
        positions_BT = jnp.pad(jnp.concatenate([before, positions_BT], axis=1), ((0, 0), (odd, 0)))  # type: ignore
        lead += odd
    variables = {"params": params}
    variables |= {} if context.past is None else {"past": context.layered(model.config)}
    if cache is None:
        out: Any = model.apply(variables, ids_BT, positions_BT, segments_BT, method=method)
        return out[:, lead:], None
    out, new = model.apply(
        variables | {"cache": cache}, ids_BT, positions_BT, segments_BT, method=method, mutable=["cache"]
    )
    return out[:, lead:], new["cache"]
