"""HiRA: a low-rank factor on each entry of the matrix (ICLR 2025, openreview TwJrTz9cRS)."""

from typing import Any, ClassVar

from jax import Array

from ...bounds import Size
from ...model import Weight
from ..random_projections import recomputed
from .lora import LoRA, LoRAWeight


class HiRAWeight(LoRAWeight):
    """x @ (w + w * (a b)), whose update can have the rank of w."""

    def __rmatmul__(self, x: Array) -> Array:
        @recomputed
        def update(x: Array, w: Any, a: Array, b: Array) -> Array:
            return x @ ((w.dense() if isinstance(w, Weight) else w) * (a @ b))

        return x @ self.w + update(self.dropped(x), self.w, self.a, self.b)

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids] * (1 + self.a[ids] @ self.b)


class HiRA(LoRA):
    """W * (1 + A B), with B = 0 at first; there is no alpha (openreview TwJrTz9cRS).

    A [D, R] and B [R, F] as in LoRA. HF PEFT: HIRA.
    """

    weight: ClassVar[type[LoRAWeight]] = HiRAWeight
    demo = False

    rank: Size = 32

    def scale(self, rank: int, alpha: Any) -> Any:
        return 1.0
