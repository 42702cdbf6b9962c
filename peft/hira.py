"""HiRA: a low-rank factor on each entry of the matrix (ICLR 2025, openreview TwJrTz9cRS)."""

from typing import Any, ClassVar

from jax import Array

from ..model import Weight
from .fixed import recomputed
from .lora import LoRA, LoRAWeight


class HiRAWeight(LoRAWeight):
    """x @ (w + w * (a b)): the update may have the rank of w."""

    def __rmatmul__(self, x: Array) -> Array:
        w = self.w.dense() if isinstance(self.w, Weight) else self.w
        update = recomputed(lambda x, w, a, b: x @ (w * (a @ b)))  # not one matrix a layer for the way back
        return x @ w + update(self.dropped(x), w, self.a, self.b)

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids] * (1 + self.a[ids] @ self.b)


class HiRA(LoRA):
    """W * (1 + A B), with B = 0 at first; there is no alpha (openreview TwJrTz9cRS)."""

    weight: ClassVar[type[LoRAWeight]] = HiRAWeight
    demo = False

    rank: int = 32

    def scale(self, rank: int, alpha: Any) -> Any:
        return 1.0
