"""Next-token cross-entropy in chunks, so that the logits of a whole batch never exist for a large vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .sharding import batch_shards, context_shards
from .transformer import Context, Transformer, forward


def token_losses(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None = None, chunk: int = 8192
) -> Array:
    """-log p(target | ids so far) [B, T], nats, fp32, at every position of a batch (ids, targets, positions, segments).

    chunk: how many tokens' logits exist at once on a device; they are recomputed in the backward pass. 0 means all.
    """
    return _at_tokens(model, params, batch, context, chunk, _nll)


def token_scores(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None = None, chunk: int = 8192
) -> tuple[Array, Array]:
    """(token_losses, whether the target is the likeliest token) [B, T]."""

    def both(logits_BCV: Array, targets_BC: Array) -> tuple[Array, Array]:
        return _nll(logits_BCV, targets_BC), logits_BCV.argmax(-1) == targets_BC

    return _at_tokens(model, params, batch, context, chunk, both)


def _nll(logits_BCV: Array, targets_BC: Array) -> Array:
    picked = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BCV, axis=-1) - picked


def _at_tokens(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None, chunk: int, of: Any
) -> Any:  # fmt: skip
    """of(logits_BCV, targets_BC) of all positions, whose logits exist a chunk at a time."""
    x_BTD, _ = forward(
        model, params, batch["ids"], batch.get("positions"), batch.get("segments"), context=context, method="hidden"
    )
    B, T, D = x_BTD.shape

    def one(x_BCD: Array, targets_BC: Array) -> Any:
        return of(jnp.asarray(model.apply({"params": params}, x_BCD, method="logits"), jnp.float32), targets_BC)

    C = _width(B, T, chunk)
    if C == T:
        return one(x_BTD, batch["targets"])
    # A chunk takes C positions from all over T: rows and stretches of T, which are split over devices, stay whole.
    x = jnp.moveaxis(x_BTD.reshape(B, C, T // C, D), 2, 0)
    targets = jnp.moveaxis(batch["targets"].reshape(B, C, T // C), 2, 0)
    found = jax.lax.map(lambda xt: jax.checkpoint(one)(*xt), (x, targets))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2).reshape(B, T), found)


def _width(B: int, T: int, chunk: int) -> int:
    """The longest divisor of T with B x width <= chunk tokens on each device, as many of every stretch of T."""
    least, chunk = context_shards(T), chunk * batch_shards(B, T)
    if not chunk or chunk >= B * T:
        return T
    return max(c for c in range(least, T + 1, least) if T % c == 0 and (c == least or B * c <= chunk))
