"""The base's parameters: shapes without memory, seeded values, and the two layouts of the layers."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from .config import Config, init_parameter
from .transformer import Transformer
from .tree import name_and_layers, named, nested


def init(config: Config, key: Array) -> dict[str, Any]:
    """The base's parameters. Each leaf of each layer has its own key, fold_in(fold_in(key, crc32(name)), layer).

    So adding a parameter reseeds no other, and stacked and unrolled layouts start equal.
    """
    shapes = named(shapes_of(config))
    flat = {}
    for path, leaf in shapes.items():
        name, layers = name_and_layers(path)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if not name.startswith("layers/"):
            flat[path] = init_parameter(config, name, leaf_key, leaf.shape)
        elif layers is not None:
            flat[path] = init_parameter(config, name, jax.random.fold_in(leaf_key, layers[0]), leaf.shape)
        else:
            keys = jax.vmap(lambda i, k=leaf_key: jax.random.fold_in(k, i))(jnp.arange(config.L))
            flat[path] = jax.vmap(lambda k, n=name, s=leaf.shape[1:]: init_parameter(config, n, k, s))(keys)
    return nested(flat)


def shapes_of(config: Config) -> dict[str, Any]:
    """The parameters' shapes and dtypes, without memory."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), ids)["params"]


def restack(params: Any, config: Config) -> dict[str, Any]:
    """The parameters in the layout that `config.scan` asks for: stacked `layers/mlp/up` or `layers/0/mlp/up`, ..."""
    flat = named(params)
    stacked = not any(name_and_layers(path)[1] for path in flat)
    if stacked == config.scan:
        return params
    if stacked:
        inner = {path: leaf for path, leaf in flat.items() if path.startswith("layers/")}
        return nested(
            {path: leaf for path, leaf in flat.items() if path not in inner}
            | {f"layers/{i}/{path[7:]}": leaf[i] for path, leaf in inner.items() for i in range(config.L)}
        )
    names = dict.fromkeys(name_and_layers(path)[0] for path in flat)
    return nested(
        {n: jnp.stack([flat[f"layers/{i}/{n[7:]}"] for i in range(config.L)]) if n.startswith("layers/") else flat[n]
         for n in names}
    )  # fmt: skip


def resize(
    config: Config, params: Any, V: int, used_V: Any = None, new: Sequence[int] = ()
) -> tuple[Config, dict[str, Any]]:  # fmt: skip
    """The base with a vocabulary of V: rows less than it had are cut off; rows more, and the rows `new` of tokens that
    had none, are the mean of those it has, or of the rows `used_V` (bool) alone.

    A token that starts at the mean has about the mean probability, so the others keep theirs (arXiv:2407.05841); random
    rows would take any. An untied head gets the mean of its columns; a tied one is the table.
    """
    where = np.ones(config.V, bool) if used_V is None else np.asarray(used_V)

    def grown(x: Array, axis: int) -> Array:
        mean = jnp.mean(x, axis, jnp.float32, keepdims=True, where=where[:, None] if axis == 0 else where)
        mean = mean.astype(x.dtype)
        if (more := V - x.shape[axis]) > 0:
            x = jnp.concatenate([x, jnp.repeat(mean, more, axis=axis)], axis=axis)
        x = jax.lax.slice_in_dim(x, 0, V, axis=axis)
        at = jnp.array(new, jnp.int32)
        return x.at[at].set(mean) if axis == 0 else x.at[:, at].set(mean)

    if V < 1:
        raise InputError(f"a vocabulary of {V}: wanted 1 or more")
    flat = dict(named(params))
    flat["embed/table"] = grown(flat["embed/table"], 0)
    if not config.tied:
        flat["head/matrix"] = grown(flat["head/matrix"], 1)
    return dataclasses.replace(config, V=V), nested(flat)
