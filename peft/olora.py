"""OLoRA: LoRA that begins as the first columns of each matrix's QR, which the base then lacks (arXiv:2406.01775)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .lora import LoRA
from .residual import asked, begin, lessen


def orthonormal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """(R^T, Q^T) of the first `rank` columns of Q, where W^T = Q R."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


class OLoRA(LoRA):
    """W - s (Q R)^T + s A B, A B = (Q R)^T the first `rank` columns of Q in W^T = Q R, at first (arXiv:2406.01775)."""

    demo = False

    alpha: float = 8.0

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        return asked(self, params, key)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return begin(self, orthonormal, key, params)

    def freeze(self, params: Any) -> Any:
        return lessen(self, orthonormal, params, jax.eval_shape(self.init, jax.random.key(0), params))

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return super().bind(lessen(self, orthonormal, params, trainable), trainable)
