"""torch's CPU random numbers, for arrays that an adapter file leaves out because HF PEFT draws them from a seed."""

from typing import Any

import jax.numpy as jnp
import numpy as np


class Torch:
    """torch.Generator().manual_seed(seed), seed < 2^32: words of MT19937, made into numbers as torch does."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.RandomState(seed)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """Return torch.empty(shape).uniform_(low, high) in float32: 24 bits, then one rounding."""
        x = (self.bits.randint(0, 2**32, int(np.prod(shape)), np.uint32) & 0xFFFFFF) * 2.0**-24
        return (x * np.float32(high - low) + np.float32(low)).astype(np.float32).reshape(shape)

    def uniform_bf16(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """Return the same in bfloat16, kept in float32; what would round up to `high` becomes `low`."""
        x = self.bf16(self.uniform(shape, low, high))
        return np.where(x == self.bf16(high), self.bf16(low), x)

    @staticmethod
    def bf16(x: Any) -> np.ndarray:
        """Return x rounded to bfloat16, kept in float32."""
        return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)
