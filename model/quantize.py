"""Frozen matrices quantised to 8 or 4 bits: `Int8` (arXiv:2208.07339) and `NF4` (QLoRA, arXiv:2305.14314)."""

import dataclasses
import itertools
import math
import re
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from .. import InputError
from .sharding import compute_spec, constrain, shardings
from .tree import is_stacked, name_and_layers, named, nested
from .weight import Weight, static

# Quantiles of a normal distribution with equal weight, scaled to [-1, 1]; 0 is exact (appendix E of arXiv:2305.14314).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # most rows of a column that share a maximum
GROUP = 256  # most blocks of a column whose maxima share a scale
MATRICES = "layers/(attn|mlp)/(q|k|v|qkv|o|gate|up|down)"


class Quantized(Weight):
    """Base class of a quantised frozen matrix [D, F]; `shape` and `dtype` are those of the dense matrix.

    An array field with two axes (of one layer) has the axes of the matrix, in units of one or more rows; the other
    fields belong to no axis of the matrix.
    """

    dtype_name: str = static()  # dtype of `dense()`, and so of `fold`
    axes: tuple[Any, ...] = static()  # mesh axes that the matrix is split over in `x @ w`

    @classmethod
    def from_dense(cls, w: Array, axes: tuple[Any, ...] = (None, None)) -> Self:
        """Quantise a matrix [D, F]."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dtype_name)

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> Self:
        """The same codes and scales, with another dtype of the dense matrix."""
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)

    def __rmatmul__(self, x: Array) -> Array:
        # The backward pass dequantises again, so no layer keeps its dense matrix until then. Unrolled layers need the
        # barrier of jax.checkpoint. Over fsdp, devices gather the codes: a half or a quarter of the matrix in bytes.
        gathered = jax.tree.map(lambda a: constrain(a, *self.axes) if a.ndim == 2 else a, self)
        return jax.checkpoint(type(self).product)(gathered, x)

    def product(self, x: Array) -> Array:
        """x @ w in the dtype of x."""
        return x @ self.astype(x.dtype).dense()

    def __getitem__(self, ids: Any) -> Array:
        raise TypeError(f"{type(self).__name__} is no array, so it has no rows; take those of dense() of one layer")


class Int8(Quantized):
    """w ~ q * scale with scale = max |w| / 127 of each column, so |w - q scale| <= scale / 2 (arXiv:2208.07339)."""

    q: Array  # int8 [D, F]
    scale: Array  # fp32 [F]

    @classmethod
    def from_dense(cls, w: Array, axes: tuple[Any, ...] = (None, None)) -> Self:
        w32 = w.astype(jnp.float32)
        scale = jnp.abs(w32).max(0) / 127
        return cls(w.dtype.name, axes, jnp.round(w32 / _nonzero(scale)).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def dense(self) -> Array:
        return (self.q * self.scale).astype(self.dtype)

    def product(self, x: Array) -> Array:
        """(x @ q) * scale: scaling the output is cheap; scaling q by 2^-7, which is exact, avoids float16 overflow."""
        y = x @ (self.q.astype(x.dtype) * 2**-7)
        return (y.astype(jnp.float32) * (self.scale * 2**7)).astype(x.dtype)


class NF4(Quantized):
    """w ~ LEVELS[code] * m, where m is the maximum of a block of at most 64 rows of a column (arXiv:2305.14314).

    Double quantisation: m = mean + maxima * scales stores each maximum in 8 bits. About 4.13 bits per weight.
    """

    codes: Array  # uint8 [D/2, F]; of each block, the first half in the low four bits, the second half in the high ones
    maxima: Array  # int8 [D/block, F]
    scales: Array  # fp32 [D/block/group, F]
    mean: Array  # fp32 []

    @classmethod
    def from_dense(cls, w: Array, axes: tuple[Any, ...] = (None, None)) -> Self:
        """Quantise a matrix [D, F] by blocks of rows, with absolute maxima that are quantised too."""
        (D, F), w32 = w.shape, w.astype(jnp.float32)
        blocks = w32.reshape(-1, 2 * _divisor(D // 2, BLOCK // 2), F)
        largest = jnp.abs(blocks).max(1)
        # A mesh sums in another order. Rounded to bfloat16, the mean is the same on every mesh, and so are the codes.
        mean = largest.mean().astype(jnp.bfloat16).astype(jnp.float32)
        groups = (largest - mean).reshape(-1, _divisor(len(largest), GROUP), F)
        scales = jnp.abs(groups).max(1) / 127
        maxima = jnp.round(groups / _nonzero(scales)[:, None]).astype(jnp.int8).reshape(largest.shape)
        normalised = blocks / _nonzero(_dequantise_maxima(maxima, scales, mean))[:, None]
        midpoints = [(a + b) / 2 for a, b in itertools.pairwise(LEVELS)]
        low, high = jnp.split(sum((normalised > m).astype(jnp.uint8) for m in midpoints), 2, axis=1)
        return cls(w.dtype.name, axes, (low | high << 4).reshape(-1, F), maxima, scales, mean)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, half, F = self.codes.shape
        return (*lead, 2 * half, F)

    def dense(self) -> Array:
        codes = self.codes.reshape(len(self.maxima), -1, self.shape[-1])
        w = _look_up_levels(jnp.concatenate([codes & 15, codes >> 4], axis=1))
        w = w * _dequantise_maxima(self.maxima, self.scales, self.mean)[:, None]
        return w.reshape(self.shape).astype(self.dtype)


kinds: dict[str, type[Quantized]] = {"int8": Int8, "nf4": NF4}


def quantize(params: Any, kind: str, where: str = MATRICES) -> dict[str, Any]:
    """The params with the matrices whose names the regex `where` matches quantised as `kind`.

    Raises InputError for an unknown kind, for a match that is not a matrix, and for nf4 of a matrix with odd D.
    """
    return nested({path: quantize_parameter(path, leaf, kind, where) for path, leaf in named(params).items()})


def quantize_parameter(path: str, w: Any, kind: str, where: str = MATRICES, mesh: Any = None) -> Any:
    """Quantise one parameter if `where` matches its name, onto the mesh; one layer is in fp32 at a time."""
    if kind not in kinds:
        raise InputError(f"quantize {kind!r}: wanted {' or '.join(kinds)}")
    if isinstance(w, Quantized) or not re.fullmatch(where, name_and_layers(path)[0]):
        return w
    stacked = is_stacked(path)
    if isinstance(w, Weight) or w.ndim - stacked != 2:
        raise InputError(f"{path}: only a plain matrix can be {kind}; narrow the rule {where!r}")
    if kind == "nf4" and w.shape[-2] % 2:
        raise InputError(f"{path} {list(w.shape)}: nf4 packs rows in pairs, and {w.shape[-2]} is odd; take int8")
    from_dense = partial(kinds[kind].from_dense, axes=compute_spec(path))
    from_dense = partial(jax.lax.map, from_dense) if stacked else from_dense
    shape = nested({path: jax.eval_shape(from_dense, w)})
    out_shardings = None if mesh is None else named(shardings(mesh, shape))[path]
    return jax.jit(from_dense, out_shardings=out_shardings)(w)


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to `limit`."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _dequantise_maxima(maxima: Array, scales: Array, mean: Array) -> Array:
    """The maximum of each block [D/block, F]."""
    groups = maxima.reshape(len(scales), -1, maxima.shape[-1]) * scales[:, None]
    return groups.reshape(maxima.shape) + mean


def _look_up_levels(codes: Array) -> Array:
    """LEVELS[codes] by one choice between halves per bit, because vector units have no fast 16-entry table.

    The first choice is arithmetic, which is exact here: jax would save both constants of a `where`, broadcast, for the
    backward pass.
    """
    bits = codes.astype(jnp.int32)
    low = (bits & 1).astype(jnp.float32)
    values = [low * b + (1 - low) * a for a, b in zip(LEVELS[::2], LEVELS[1::2], strict=True)]
    for bit in (2, 4, 8):
        values = [jnp.where(bits & bit != 0, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]
