"""torch's CPU random numbers, for what an HF adapter file leaves out because its seed makes it again."""

from typing import Any

import jax.numpy as jnp
import numpy as np


class Torch:
    """torch.Generator().manual_seed(seed), seed < 2^32: the 32-bit words of MT19937, as torch makes numbers of them."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.RandomState(seed)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """torch.empty(shape).uniform_(low, high) in float32: 24 bits, then one rounding."""
        x = (self.bits.randint(0, 2**32, int(np.prod(shape)), np.uint32) & 0xFFFFFF) * 2.0**-24
        return (x * np.float32(high - low) + np.float32(low)).astype(np.float32).reshape(shape)

    def uniform_bf16(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """The same in bfloat16, kept in float32; what would round up to `high` becomes `low`."""
        x = bf16(self.uniform(shape, low, high))
        return np.where(x == bf16(high), bf16(low), x)


def bf16(x: Any) -> np.ndarray:
    """x rounded to bfloat16, kept in float32."""
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)


def vera(seed: int, rank: int, D: int, F: int) -> tuple[np.ndarray, np.ndarray]:
    """(vera_A [R, D], vera_B [F, R]) that HF PEFT draws, D and F the largest of all targets."""
    rng, bound = Torch(seed), lambda fan: 3**0.5 * (2**0.5 / fan**0.5)
    return rng.uniform((rank, D), -bound(D), bound(D)), rng.uniform((F, rank), -bound(rank), bound(rank))


def randlora(seed: int, rank: int, D: int, F: int, sparse: str) -> tuple[np.ndarray, np.ndarray]:
    """(randlora_A [R, 1, min], randlora_B [max, n, R]) that HF PEFT draws, D and F the largest of all targets."""
    rng, low, high = Torch(seed), min(D, F), max(D, F)
    n = -(-low // rank)
    if sparse:
        odds = 3 if sparse == "sparse" else low**0.5

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            x = rng.uniform(shape, 0, 1)
            x = (x > 1 - 1 / (2 * odds)).astype(np.float32) - (x < 1 / (2 * odds))
            return x / x.std(ddof=1)

        return draw((rank, 1, low)), draw((high, n, rank))

    def kaiming(shape: tuple[int, ...], fan: int) -> np.ndarray:
        bound = 3**0.5 * ((1 / 3) ** 0.5 / fan**0.5)
        return rng.uniform_bf16(shape, -bound, bound)

    a = kaiming((rank, 1, low), low)
    b = np.concatenate([kaiming((high, 1, rank), rank) for _ in range(n)], 1)
    unit = lambda x: bf16(x / bf16(x.std(ddof=1, dtype=np.float64)))  # noqa: E731
    return unit(a), unit(b)
