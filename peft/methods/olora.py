"""OLoRA: LoRA that begins as the first columns of each matrix's QR, which the base then lacks (arXiv:2406.01775)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from .pissa import PiSSA


def orthonormal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """(R^T, Q^T) of the first `rank` columns of Q, where W^T = Q R."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


class OLoRA(PiSSA):
    """W - s (Q R)^T + s A B, A B = (Q R)^T the first `rank` columns of Q in W^T = Q R, at first (arXiv:2406.01775)."""

    split: ClassVar[Any] = staticmethod(orthonormal)
