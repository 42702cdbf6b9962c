"""The roofline: seconds of a step from its FLOPs and bytes, and the peak rates of a chip."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ..chips import Chip


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a step needs for its matrix products, its memory traffic, and its collectives."""

    compute: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """All three overlap: no step is faster."""
        return max(self.compute, self.memory, self.links)

    @property
    def expected(self) -> float:
        """Products and memory traffic overlap; collectives run after them, and are not hidden."""
        return max(self.compute, self.memory) + self.links


def times(chip: Chip, flops: float, moved: float, sent: float, dtype: Any) -> Times:
    """Return FLOPs / peak, bytes through memory / bandwidth, and bytes sent / link bandwidth, for one device."""
    peak = chip.flops * (chip.fp32_share if jnp.dtype(dtype).itemsize > 2 else 1.0)
    return Times(flops / peak, moved / chip.bandwidth, sent / chip.links)
