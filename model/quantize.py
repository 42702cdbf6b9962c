"""Frozen matrices in 8 or 4 bits as weights: `Int8` (arXiv:2208.07339) and `NF4` (QLoRA, arXiv:2305.14314)."""

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
from .tree import name_and_layers, is_stacked, named, nested
from .weight import Weight, static

# Quantiles of a normal distribution, of equal weight, with 0 and both ends among them (appendix E of the paper).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK, GROUP = 64, 256  # weights that share a maximum, maxima that share a scale; at most
MATRICES = "layers/(attn|mlp)/(q|k|v|qkv|o|gate|up|down)"


class Quantized(Weight):
    """A frozen matrix [D, F] in few bits. `shape` and `dtype` are those of the matrix that it stands for.

    Arrays with two axes (a layer) have the matrix's axes, in units of one or more rows; the others belong to no axis.
    """

    kind: str = static()  # the dtype of `dense()`, and of what `fold` gives back
    axes: tuple[Any, ...] = static()  # of the mesh, that the matrix is split over where it multiplies

    @classmethod
    def of(cls, w: Array, axes: tuple[Any, ...] = (None, None)) -> Self:
        """A matrix [D, F] in few bits."""
        raise TypeError(f"{cls.__name__} does not say how a matrix becomes one")

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    @property
    def shape(self) -> tuple[int, ...]:
        raise TypeError(f"{type(self).__name__} does not say what it stands for")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> Self:
        """The same bits as a matrix of another dtype; the scales stay as they are."""
        return dataclasses.replace(self, kind=jnp.dtype(dtype).name)

    def __rmatmul__(self, x: Array) -> Array:
        # Made again for the gradient of x: no layer keeps its matrix until then. The barrier is for unrolled layers.
        # The bits are gathered, not the matrix: a quarter of the bytes, or half of them.
        here = jax.tree.map(lambda a: constrain(a, *self.axes) if a.ndim == 2 else a, self)
        return jax.checkpoint(type(self).product)(here, x)

    def product(self, x: Array) -> Array:
        """x @ w in the dtype of x."""
        return x @ self.astype(x.dtype).dense()

    def __getitem__(self, ids: Any) -> Array:
        raise TypeError(f"{type(self).__name__} is no array, so it has no rows; dense() of one layer is its matrix")


class Int8(Quantized):
    """w ~ q * scale, scale = max |w| / 127 of each column: |w - q scale| <= scale / 2 (arXiv:2208.07339)."""

    q: Array  # int8 [D, F]
    scale: Array  # fp32 [F]

    @classmethod
    def of(cls, w: Array, axes: tuple[Any, ...] = (None, None)) -> Self:
        """The int8 of a matrix [D, F]."""
        wide = w.astype(jnp.float32)
        scale = jnp.abs(wide).max(0) / 127
        return cls(w.dtype.name, axes, jnp.round(wide / _nonzero(scale)).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def dense(self) -> Array:
        return (self.q * self.scale).astype(self.dtype)

    def product(self, x: Array) -> Array:
        """(x @ q) * scale: the scale acts on the small output. 2^-7 of q, which is exact, keeps float16 in range."""
        y = x @ (self.q.astype(x.dtype) * 2**-7)
        return (y.astype(jnp.float32) * (self.scale * 2**7)).astype(x.dtype)


class NF4(Quantized):
    """w ~ LEVELS[code] * m, m = mean + maxima * scales the maximum of a block of up to 64 rows (arXiv:2305.14314).

    Double quantisation: a maximum takes 8 bits, its distance from the mean of all. About 4.13 bits a weight.
    """

    codes: Array  # uint8 [D/2, F]: of each block the first half in the low four bits, the second in the high ones
    maxima: Array  # int8 [D/block, F]
    scales: Array  # fp32 [D/block/group, F]
    mean: Array  # fp32 []

    @classmethod
    def of(cls, w: Array, axes: tuple[Any, ...] = (None, None)) -> Self:
        """The NF4 of a matrix [D, F], D even."""
        (D, F), wide = w.shape, w.astype(jnp.float32)
        blocks = wide.reshape(-1, 2 * _divisor(D // 2, BLOCK // 2), F)
        largest = jnp.abs(blocks).max(1)
        # A mesh adds up in another order: in 8 bits the mean is the same on all, and so are the codes.
        mean = largest.mean().astype(jnp.bfloat16).astype(jnp.float32)
        groups = (largest - mean).reshape(-1, _divisor(len(largest), GROUP), F)
        scales = jnp.abs(groups).max(1) / 127
        maxima = jnp.round(groups / _nonzero(scales)[:, None]).astype(jnp.int8).reshape(largest.shape)
        parts = blocks / _nonzero(_maxima(maxima, scales, mean))[:, None]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(LEVELS)]
        low, high = jnp.split(sum((parts > m).astype(jnp.uint8) for m in middles), 2, axis=1)
        return cls(w.dtype.name, axes, (low | high << 4).reshape(-1, F), maxima, scales, mean)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, half, F = self.codes.shape
        return (*lead, 2 * half, F)

    def dense(self) -> Array:
        codes = self.codes.reshape(len(self.maxima), -1, self.shape[-1])
        w = _levels(jnp.concatenate([codes & 15, codes >> 4], axis=1))
        w = w * _maxima(self.maxima, self.scales, self.mean)[:, None]
        return w.reshape(self.shape).astype(self.dtype)


kinds: dict[str, type[Quantized]] = {"int8": Int8, "nf4": NF4}


def quantize(params: Any, kind: str, where: str = MATRICES) -> dict[str, Any]:
    """The params with the matrices whose names `where` matches as `kind`; all else stays as it is.

    Raises InputError for a kind that is not known, for an array that is no matrix, and for an odd D of nf4.
    """
    return nested({path: quantize_parameter(path, leaf, kind, where) for path, leaf in named(params).items()})


def quantize_parameter(path: str, w: Any, kind: str, where: str = MATRICES, mesh: Any = None) -> Any:
    """One parameter as `kind` if `where` matches its name, laid out on the mesh; one layer is in fp32 at a time."""
    if kind not in kinds:
        raise InputError(f"quantize {kind!r}: wanted {' or '.join(kinds)}")
    if isinstance(w, Quantized) or not re.fullmatch(where, name_and_layers(path)[0]):
        return w
    stacked = is_stacked(path)
    if isinstance(w, Weight) or w.ndim - stacked != 2:
        raise InputError(f"{path}: only a plain matrix can be {kind}; narrow the rule {where!r}")
    if kind == "nf4" and w.shape[-2] % 2:
        raise InputError(f"{path} {list(w.shape)}: nf4 packs rows in twos, and {w.shape[-2]} is odd; take int8")
    one = partial(kinds[kind].of, axes=compute_spec(path))
    make = partial(jax.lax.map, one) if stacked else one
    shape = nested({path: jax.eval_shape(make, w)})
    split = None if mesh is None else named(shardings(mesh, shape))[path]
    return jax.jit(make, out_shardings=split)(w)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _maxima(maxima: Array, scales: Array, mean: Array) -> Array:
    """The maximum of each block [D/block, F] from its 8 bits."""
    groups = maxima.reshape(len(scales), -1, maxima.shape[-1]) * scales[:, None]
    return groups.reshape(maxima.shape) + mean


def _levels(codes: Array) -> Array:
    """LEVELS[codes] by four choices between halves, one a bit: a vector unit has no fast table of 16.

    The first is exact arithmetic: of `where` between two constants jax would keep both, broadcast, for the way back.
    """
    bits = codes.astype(jnp.int32)
    low = (bits & 1).astype(jnp.float32)
    values = [low * b + (1 - low) * a for a, b in zip(LEVELS[::2], LEVELS[1::2], strict=True)]
    for bit in (2, 4, 8):
        values = [jnp.where(bits & bit != 0, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]
