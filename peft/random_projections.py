"""What updates of a fixed form share: numbers from a seed, waves, and how they stay out of a layer's memory."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p

from .. import InputError
from ..model import Weight
from ..model.tree import is_stacked, named, split_layer_index

# A function whose steps are made again in the backward pass: a matrix that it makes on the way is in no layer's memory
recomputed: Callable[..., Any] = partial(jax.checkpoint, prevent_cse=False)


def sides(params: Any, key: str) -> tuple[int, int]:
    """(D, F) of the matrix, or weight, that a key of a method's tree names."""
    path, flat = split_layer_index(key)[0], named(params)
    if path not in flat:
        raise InputError(f"the adapter trains {path}, which this base does not have: it belongs to another base")
    w = flat[path]
    if isinstance(w, Weight):
        dense: Any = lambda one: one.dense()  # noqa: E731
        w = jax.eval_shape(jax.vmap(dense) if is_stacked(path) else dense, w)
    return w.shape[-2:]


def widest(params: Any, trainable: Any) -> tuple[int, int]:
    """The largest D and the largest F, each for itself, of all matrices that a method trains."""
    D, F = zip(*(sides(params, key) for key in trainable), strict=True)
    return max(D), max(F)


def hash_uniform(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """Uniform numbers in +-1, each by its own place (i, j) or (i, m, j): a smaller array is the corner of a larger."""
    i, *m, j = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape)))
    words = (jnp.full(shape, word, jnp.uint32) for word in (seed % 2**32, zlib.crc32(name.encode())))
    bits, _ = threefry2x32_p.bind(*words, i, m[0] * 2**16 + j if m else j)
    return jax.lax.bitcast_convert_type(bits >> 9 | 0x40000000, jnp.float32) - 3  # the fraction of a number in [2, 4)


def dft_basis(size: int, at: Any) -> tuple[Array, Array]:
    """cos and sin of 2 pi i at / size, [size, len(at)] each: products with them are a Fourier transform that a mesh can
    split (XLA gathers a whole batch for its own)."""
    i, at, n = jnp.arange(size, dtype=jnp.uint32)[:, None], jnp.asarray(at, jnp.uint32), jnp.uint32(size)
    turns = (i // 256 * at % n * 256 + i % 256 * at) % n  # i at mod n in 32 bits, for sizes up to a million
    turns = turns.astype(jnp.int32) - jnp.where(2 * turns > n, size, 0)  # an angle near 0 is more exact
    angle = (2 * jnp.pi / size) * turns.astype(jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)  # never as one array: XLA's partitioner gets their concatenation wrong
