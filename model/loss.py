"""Next-token cross-entropy in chunks, so that the logits of a whole batch never exist for a large vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .sharding import replicas, stretches
from .transformer import Context, Transformer, forward


def token_losses(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None = None, chunk: int = 8192
) -> Array:
    """-log p(target | ids so far) [B, T], nats, fp32, at every position of a batch (ids, targets, positions, segments).

    chunk: how many tokens' logits exist at once on a device; they are recomputed in the backward pass. 0 means all.
    """
    x_BTD, _ = forward(
        model, params, batch["ids"], batch.get("positions"), batch.get("segments"), context=context, method="hidden"
    )
    B, T, D = x_BTD.shape

    def losses(x_BCD: Array, targets_BC: Array) -> Array:
        logits_BCV = jnp.asarray(model.apply({"params": params}, x_BCD, method="logits"), jnp.float32)
        picked = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BCV, axis=-1) - picked

    C = _width(B, T, chunk)
    if C == T:
        return losses(x_BTD, batch["targets"])
    # A chunk takes C positions from all over T: rows and stretches of T, which are split over devices, stay whole.
    x = jnp.moveaxis(x_BTD.reshape(B, C, T // C, D), 2, 0)
    targets = jnp.moveaxis(batch["targets"].reshape(B, C, T // C), 2, 0)
    nll = jax.lax.map(lambda xt: jax.checkpoint(losses)(*xt), (x, targets))
    return jnp.moveaxis(nll, 0, 2).reshape(B, T)


def _width(B: int, T: int, chunk: int) -> int:
    """The longest divisor of T with B x width <= chunk tokens on each device, as many of every stretch of T."""
    least, chunk = stretches(T), chunk * replicas(B, T)
    if not chunk or chunk >= B * T:
        return T
    return max(c for c in range(least, T + 1, least) if T % c == 0 and (c == least or B * c <= chunk))
