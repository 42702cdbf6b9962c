"""DoRA: LoRA of the directions of a matrix's columns, with their lengths apart (arXiv:2402.09353)."""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ...model import Weight
from ..targets import map_dense_layers
from .lora import LoRA, LoRAWeight


class DoRAWeight(LoRAWeight):
    """(x @ w + (x @ a) @ b) * m / |w + a b|, by columns; the length |w + a b| has no gradient, as in the paper."""

    m: Any = None  # [F]; NaN in a layer that does not train

    def __rmatmul__(self, x: Array) -> Array:
        return super().__rmatmul__(x) * self.factor()

    def __getitem__(self, ids: Array) -> Array:
        return super().__getitem__(ids) * self.factor()

    def factor(self) -> Array:
        """Return m / |w + a b| of each column; 1 where the length is 0, so that a column of zeros can begin to train.

        |w + a b|^2 = |w|^2 + 2 w.(a b) + |a b|^2 needs no w + a b; rounding can make it negative.
        """
        w = self.w.dense() if isinstance(self.w, Weight) else self.w
        matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)  # in float16 the square of 1e-4 is 0
        b = self.b.astype(jnp.float32)
        cross, update = (matmul(self.a.T, w) * b).sum(0), ((matmul(self.a.T, self.a) @ b) * b).sum(0)
        square = jax.lax.stop_gradient(jnp.square(w.astype(jnp.float32)).sum(0) + 2 * cross + update)
        length = jnp.sqrt(jnp.where(square > 0, square, 1))
        return jnp.where((square > 0) & ~jnp.isnan(self.m), self.m / length, 1).astype(self.m.dtype)


class DoRA(LoRA):
    """m (W + s A B) / |W + s A B| with a learned length m of each column, |W| at first (arXiv:2402.09353).

    m [F]; A, B and s = alpha / rank as in LoRA. HF PEFT: LORA with use_dora.
    """

    weight: ClassVar[type[LoRAWeight]] = DoRAWeight
    demo = False

    hf = LoRA.hf.variant(flags={"use_dora": True})

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def lengths(w: Array) -> Array:
            return jnp.linalg.norm(w.astype(jnp.float32), axis=0)

        return {k: t | {"m": map_dense_layers(lengths, params, k)} for k, t in super().init(key, params).items()}
