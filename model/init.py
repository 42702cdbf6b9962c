"""Parameters of the base: shapes without memory, seeded values, other vocabularies."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from .config import Config
from .layers import init_parameter
from .transformer import Transformer
from .tree import is_stacked, name_and_layers, named, nested


def shapes_of(config: Config) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without memory."""
    ids_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), ids_BT)["params"]


def init(config: Config, key: Array) -> dict[str, Any]:
    """Initial parameters. Each leaf of each layer has its own key, fold_in(fold_in(key, crc32(name)), layer).

    So a new parameter does not reseed the others, and the stacked and unrolled layouts have equal values.
    """
    flat = {}
    for path, leaf in named(shapes_of(config)).items():
        name, layers = name_and_layers(path)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if is_stacked(path):
            keys = jax.vmap(lambda i, k=leaf_key: jax.random.fold_in(k, i))(jnp.arange(config.L))
            flat[path] = jax.vmap(lambda k, n=name, s=leaf.shape[1:]: init_parameter(config, n, k, s))(keys)
        else:
            leaf_key = leaf_key if layers is None else jax.random.fold_in(leaf_key, layers[0])
            flat[path] = init_parameter(config, name, leaf_key, leaf.shape)
    return nested(flat)


def resize(
    config: Config, params: Any, V: int, used_V: Any = None, new: Sequence[int] = ()
) -> tuple[Config, dict[str, Any]]:  # fmt: skip
    """(config, params) with a vocabulary of V. A smaller V cuts rows off; additional rows start at the mean row.

    used_V: the rows of the mean (bool, None: all). new: ids of rows that also start at the mean, because their tokens
    are new to the base.
    A token that starts at the mean has about the mean probability, so the others keep theirs (arXiv:2407.05841); a
    random row could take any probability. An untied head gets the mean of its columns; a tied one is the table.
    """
    used = np.ones(config.V, bool) if used_V is None else np.asarray(used_V)

    def grow(x: Array, axis: int) -> Array:
        mean = jnp.mean(x, axis, jnp.float32, keepdims=True, where=used[:, None] if axis == 0 else used)
        mean = mean.astype(x.dtype)
        if (missing := V - x.shape[axis]) > 0:
            x = jnp.concatenate([x, jnp.repeat(mean, missing, axis=axis)], axis=axis)
        x, ids = jax.lax.slice_in_dim(x, 0, V, axis=axis), jnp.array(new, jnp.int32)
        return x.at[ids].set(mean) if axis == 0 else x.at[:, ids].set(mean)

    if V < 1:
        raise InputError(f"a vocabulary of {V}: wanted 1 or more")
    flat = named(params)
    flat["embed/table"] = grow(flat["embed/table"], 0)
    if not config.tied:
        flat["head/matrix"] = grow(flat["head/matrix"], 1)
    return dataclasses.replace(config, V=V), nested(flat)
