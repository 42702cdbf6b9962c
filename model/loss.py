"""Next-token cross-entropy in chunks, so that the logits of a whole batch never exist for a large vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .transformer import Context, Transformer, forward


def token_losses(
    model: Transformer, params: Any, batch: dict[str, Array], context: Context | None = None, chunk: int = 8192
) -> Array:
    """-log p(target | ids so far) [B, T], nats, fp32, at every position of a batch (ids, targets, positions, segments).

    chunk: how many tokens' logits exist at once; the others are recomputed in the backward pass. 0 means all.
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
    # Chunks run along T: the batch axis, which is split over devices, stays whole.
    x = x_BTD.reshape(B, T // C, C, D).swapaxes(0, 1)
    targets = batch["targets"].reshape(B, T // C, C).swapaxes(0, 1)
    return jax.lax.map(lambda xt: jax.checkpoint(losses)(*xt), (x, targets)).swapaxes(0, 1).reshape(B, T)


def _width(B: int, T: int, chunk: int) -> int:
    """The longest divisor of T with B x width <= chunk tokens."""
    if not chunk or chunk >= B * T:
        return T
    return max(c for c in range(1, T + 1) if T % c == 0 and (c == 1 or B * c <= chunk))
