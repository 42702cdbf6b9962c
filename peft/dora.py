"""DoRA: LoRA of the directions of a matrix's columns, and their lengths by themselves (arXiv:2402.09353)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ..model import Weight
from .lora import LoRA, LoRAWeight
from .targets import of_layers


class DoRAWeight(LoRAWeight):
    """(x @ w + (x @ a) @ b) * m / |w + a b|, a length a column; the length below has no gradient, as in the paper."""

    m: Any = None  # [F]; NaN where a layer does not train

    def __rmatmul__(self, x: Array) -> Array:
        return super().__rmatmul__(x) * self.factor()

    def __getitem__(self, ids: Array) -> Array:
        return super().__getitem__(ids) * self.factor()

    def factor(self) -> Array:
        """m / |w + a b| of each column."""
        w = self.w.dense() if isinstance(self.w, Weight) else self.w
        # |w + a b|^2 without w + a b: |w|^2 + 2 w.(a b) + |a b|^2
        cross, square = ((self.a.T @ w) * self.b).sum(0), (((self.a.T @ self.a) @ self.b) * self.b).sum(0)
        length = jax.lax.stop_gradient(jnp.sqrt(jnp.square(w).sum(0) + 2 * cross + square))
        return jnp.where(jnp.isnan(self.m), length, self.m) / length


class DoRA(LoRA):
    """m (W + s A B) / |W + s A B| with a learned length m of each column, |W| at first (arXiv:2402.09353)."""

    weight: ClassVar[type[LoRAWeight]] = DoRAWeight
    demo = False

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        lengths = lambda w: jnp.linalg.norm(w.astype(jnp.float32), axis=0)  # noqa: E731
        return {k: t | {"m": of_layers(lengths, params, k)} for k, t in super().init(key, params).items()}
