"""Next-token cross-entropy in chunks, so that the logits of a whole batch never exist at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .sharding import batch_shards, context_shards
from .transformer import Context, Transformer, forward


def token_losses(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None = None, chunk: int = 8192
) -> Array:
    """-log p(target | ids so far) [B, T], nats, fp32, at every position of a batch (ids, targets, positions, segments).

    chunk: tokens per device whose logits exist at once; the backward pass recomputes them. 0: all.
    """
    return _map_logits(optax.softmax_cross_entropy_with_integer_labels, model, params, batch, context, chunk)


def token_scores(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None = None, chunk: int = 8192
) -> tuple[Array, Array]:
    """(`token_losses` [B, T], whether the target is the most likely token [B, T])."""

    def loss_and_hit(logits_BCV: Array, targets_BC: Array) -> tuple[Array, Array]:
        losses_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, targets_BC)
        return losses_BC, logits_BCV.argmax(-1) == targets_BC

    return _map_logits(loss_and_hit, model, params, batch, context, chunk)


def _map_logits(
    f: Callable[[Array, Array], Any], model: Transformer, params: Any, batch: dict[str, Array],
    context: Context | None, chunk: int,
) -> Any:  # fmt: skip
    """f(logits_BCV, targets_BC) of all positions, with the logits of one chunk at a time."""
    x_BTD, _ = forward(
        model, params, batch["ids"], batch.get("positions"), batch.get("segments"), context=context, method="hidden"
    )
    B, T, D = x_BTD.shape

    def chunk_result(x_BCD: Array, targets_BC: Array) -> Any:
        return f(jnp.asarray(model.apply({"params": params}, x_BCD, method="logits"), jnp.float32), targets_BC)

    C = _chunk_length(B, T, chunk)
    if C == T:
        return chunk_result(x_BTD, batch["targets"])
    # A chunk takes C positions spread evenly over T, so that rows and T stay split over devices as they are.
    x = jnp.moveaxis(x_BTD.reshape(B, C, T // C, D), 2, 0)
    targets = jnp.moveaxis(batch["targets"].reshape(B, C, T // C), 2, 0)
    results = jax.lax.map(lambda xt: jax.checkpoint(chunk_result)(*xt), (x, targets))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2).reshape(B, T), results)


def _chunk_length(B: int, T: int, chunk: int) -> int:
    """The largest divisor of T, and multiple of its shards, of which B rows have at most chunk tokens per device."""
    least, tokens = context_shards(T), chunk * batch_shards(B, T)
    if not tokens or tokens >= B * T:
        return T
    return max(c for c in range(least, T + 1, least) if T % c == 0 and (c == least or B * c <= tokens))
