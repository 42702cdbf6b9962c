"""Rotary position embedding (RoPE, arXiv:2104.09864), and methods that extend it to longer contexts."""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from ..bounds import Bounds, Checked, Positive


@dataclasses.dataclass(frozen=True)
class Rope(Checked):
    """Frequencies theta^(-2i/W), i < W/2, extended to a longer context by the method `kind`."""

    FLAGS: ClassVar[str] = "--model.rope."

    theta: Positive = 10_000.0
    width: int = 0  # W: how many components of a head rotate, from the first on; 0: all
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: Annotated[float, Bounds(1)] = 1.0  # new context / original context
    original: int = 0  # original context, in tokens
    low: float = 1.0  # llama3, yarn: a frequency with fewer rotations over the original context is divided by factor
    high: float = 4.0  # llama3, yarn: one with more rotations is kept; between the two, they are blended
    magnitude: Positive = 1.0  # yarn, longrope: factor of sin and cos
    truncate: bool = True  # yarn: the blend begins and ends at whole components
    short: Annotated[tuple[float, ...], Bounds(0, ends="(]")] = ()  # longrope: divisors up to the original context
    long: Annotated[tuple[float, ...], Bounds(0, ends="(]")] = ()  # longrope: divisors beyond the original context

    def check(self, H: int) -> None:
        """Raise InputError if this rotation does not fit heads of width H, or lacks what its kind needs."""
        W = self.width or H  # an odd width rotates one component more, as in transformers' Phi-3
        if not 0 < W + W % 2 <= H or (W % 2 and self.kind in ("yarn", "longrope")):
            raise InputError(
                f"config: rotary width {W} of heads of {H}: components rotate in pairs, so take an even number in 2..H"
            )
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and self.original < 1:
            raise InputError(f"config: rope of kind {self.kind} needs `original`, the original context in tokens")
        if self.kind in ("llama3", "yarn") and not self.low < self.high:
            raise InputError(f"config: rope of kind {self.kind}: low {self.low} must be below high {self.high}")
        if self.kind == "longrope" and not len(self.short) == len(self.long) == W // 2:
            raise InputError(
                f"config: longrope needs {W // 2} short and long factors, got {len(self.short)} and {len(self.long)}"
            )


def frequencies(rope: Rope, H: int, length_B: Any = 0) -> Any:
    """Angle per position of each pair, [W/2], or [B, W/2] if it depends on the length of the row; fp32, radians.

    linear: positions / factor. llama3: Llama 3.1. yarn: arXiv:2309.00071. longrope: arXiv:2402.13753. dynamic: theta
    grows with the length once that exceeds the original context.
    """
    W = rope.width or H
    exponent = np.arange(0, W, 2, dtype=np.float32) / np.float32(W)
    if rope.kind == "dynamic":
        longer = jnp.maximum(length_B, rope.original)[:, None] / rope.original
        theta = rope.theta * (rope.factor * longer - (rope.factor - 1)) ** (W / (W - 2))
        return theta**-exponent
    plain = (np.float32(rope.theta) ** -exponent).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "longrope":
        short, long = (plain / np.array(x, np.float32) for x in (rope.short, rope.long))
        return jnp.where((length_B > rope.original)[:, None], long, short)
    if rope.kind in ("llama3", "yarn"):
        keep = _keep_share(rope, W, plain)
        return (keep * plain + (1 - keep) * plain / rope.factor).astype(np.float32)
    return plain


def _keep_share(rope: Rope, W: int, plain: np.ndarray) -> np.ndarray:
    """Share of each frequency [W/2] that is kept: 1 for many rotations over the original context, 0 for few."""
    if rope.kind == "llama3":  # linear in the number of rotations
        rotations = rope.original * plain / (2 * math.pi)
        return np.clip((rotations - rope.low) / (rope.high - rope.low), 0, 1)
    # yarn: linear in the index of the component
    ends = [W * math.log(rope.original / (n * 2 * math.pi)) / (2 * math.log(rope.theta)) for n in (rope.high, rope.low)]
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if rope.truncate else ends
    first, last = max(first, 0), min(last, W - 1)
    return 1 - np.clip((np.arange(W // 2) - first) / ((last - first) or 0.001), 0, 1)


def rope_table(positions_BT: Array, rope: Rope, H: int, length_B: Array) -> tuple[Array, Array]:
    """(sin, cos) [B, T, 1, W/2] of position * frequency, fp32, for rows of lengths length_B."""
    frequency = jnp.asarray(frequencies(rope, H, length_B), jnp.float32)
    frequency = frequency if frequency.ndim == 1 else frequency[:, None, None, :]
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return rope.magnitude * jnp.sin(angle), rope.magnitude * jnp.cos(angle)


def rotate(x_BTNH: Array, sin_cos: tuple[Array, Array]) -> Array:
    """Rotate the pairs (i, i + W/2) of each head by their angles, in fp32; components from W on are unchanged."""
    sin, cos = sin_cos
    W = 2 * sin.shape[-1]
    a, b = jnp.split(x_BTNH[..., :W].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
    return rotated if x_BTNH.shape[-1] == W else jnp.concatenate([rotated, x_BTNH[..., W:]], axis=-1)
