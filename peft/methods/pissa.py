"""PiSSA: LoRA that begins as the principal part of each matrix, which the base then lacks (arXiv:2404.02948)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import Real
from ..base import Method
from .lora import LoRA
from .residual import asked, begin, lessen


def principal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """(U, V) (S / scale)^1/2 of the `rank` largest singular values; A has U itself where S is 0, so that it trains."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * jnp.where(root > 0, root, 1), root[:, None] * v[:rank]


class PiSSA(LoRA):
    """W - U S V + s A B with s A B = U S V, the `rank` largest singular values of W, at first (arXiv:2404.02948)."""

    demo = False
    split: ClassVar[Any] = staticmethod(principal)  # (w, scale, rank) -> (a, b) that the base then lacks

    alpha: Real = 8.0
    padded = Method.padded  # another rank leaves another base

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        return asked(self, params, key)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return begin(self, self.split, key, params)

    def freeze(self, params: Any) -> Any:
        return lessen(self, self.split, params, jax.eval_shape(self.init, jax.random.key(0), params))

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return super().bind(lessen(self, self.split, params, trainable), trainable)
