"""Fixed arrays of methods: numbers hashed from a seed, Fourier bases, and updates that no layer keeps in memory."""

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
from .targets import Target, layer_keys, vmap_layers

# Decorates a function that is computed again in the backward pass, so that no layer keeps the matrices it makes.
recomputed: Callable[..., Any] = partial(jax.checkpoint, prevent_cse=False)


def matrix_shape(params: Any, key: str) -> tuple[int, int]:
    """Return (D, F) of the matrix, or weight, that a key of a trainable tree names.

    Raises InputError for a path that the base does not have.
    """
    path, flat = split_layer_index(key)[0], named(params)
    if path not in flat:
        raise InputError(f"the adapter trains {path}, which this base does not have: it belongs to another base")
    w = flat[path]
    if isinstance(w, Weight):
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[is_stacked(path) :], x.dtype), w)
        w = jax.eval_shape(lambda layer: layer.dense(), layer)
    return w.shape[-2:]


def widest(params: Any, trainable: Any) -> tuple[int, int]:
    """Return the largest D and the largest F over all matrices that a method trains."""
    D, F = zip(*(matrix_shape(params, key) for key in trainable), strict=True)
    return max(D), max(F)


def draw_layers(seed: Array, params: Any, key: str, array: Array, leaf: str, draw: Callable[..., Array]) -> Array:
    """Return draw(layer's random key, D, F) of each layer that a key of a trainable tree names.

    `array` is any array of that key; `leaf` names the array that is drawn.
    """
    D, F = matrix_shape(params, key)
    target = Target.from_key(key, array, (D, F))
    return vmap_layers(target, lambda k: draw(k, D, F), layer_keys(seed, target, leaf))


def hash_uniform(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """Return numbers uniform in [-1, 1), each a hash of its index (i, j) or (i, m, j).

    A smaller array is therefore the corner of a larger one.
    """
    i, *m, j = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape)))
    words = (jnp.full(shape, word, jnp.uint32) for word in (seed % 2**32, zlib.crc32(name.encode())))
    bits, _ = threefry2x32_p.bind(*words, i, m[0] * 2**16 + j if m else j)
    return jax.lax.bitcast_convert_type(bits >> 9 | 0x40000000, jnp.float32) - 3  # the fraction of a number in [2, 4)


def dft_basis(size: int, frequencies: Any) -> tuple[Array, Array]:
    """Return cos and sin of 2 pi i k / size, [size, len(frequencies)] each.

    A product with them is a Fourier transform that a mesh can split; for its own, XLA gathers the whole batch.
    """
    i, k, n = jnp.arange(size, dtype=jnp.uint32)[:, None], jnp.asarray(frequencies, jnp.uint32), jnp.uint32(size)
    turns = (i // 256 * k % n * 256 + i % 256 * k) % n  # i k mod n in 32 bits, for sizes up to a million
    turns = turns.astype(jnp.int32) - jnp.where(2 * turns > n, size, 0)  # an angle near 0 is more exact
    angle = (2 * jnp.pi / size) * turns.astype(jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)  # never as one array: XLA's partitioner gets their concatenation wrong
