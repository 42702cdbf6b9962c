"""The base's parameters: shapes without memory, seeded values, and the two layouts of the layers."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .config import Config, initial
from .transformer import Transformer
from .tree import canonical, named, nested


def init(config: Config, key: Array) -> dict[str, Any]:
    """The base's parameters. Each leaf of each layer has its own key, fold_in(fold_in(key, crc32(name)), layer).

    So adding a parameter reseeds no other, and stacked and unrolled layouts start equal.
    """
    shapes = named(shapes_of(config))
    flat = {}
    for path, leaf in shapes.items():
        name, layers = canonical(path)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if not name.startswith("layers/"):
            flat[path] = initial(config, name, leaf_key, leaf.shape)
        elif layers is not None:
            flat[path] = initial(config, name, jax.random.fold_in(leaf_key, layers[0]), leaf.shape)
        else:
            keys = jax.vmap(lambda i, k=leaf_key: jax.random.fold_in(k, i))(jnp.arange(config.L))
            flat[path] = jax.vmap(lambda k, n=name, s=leaf.shape[1:]: initial(config, n, k, s))(keys)
    return nested(flat)


def shapes_of(config: Config) -> dict[str, Any]:
    """The parameters' shapes and dtypes, without memory."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), ids)["params"]


def restack(params: Any, config: Config) -> dict[str, Any]:
    """The parameters in the layout that `config.scan` asks for: stacked `layers/mlp/up` or `layers/0/mlp/up`, ..."""
    flat = named(params)
    stacked = not any(canonical(path)[1] for path in flat)
    if stacked == config.scan:
        return params
    if stacked:
        inner = {path: leaf for path, leaf in flat.items() if path.startswith("layers/")}
        return nested(
            {path: leaf for path, leaf in flat.items() if path not in inner}
            | {f"layers/{i}/{path[7:]}": leaf[i] for path, leaf in inner.items() for i in range(config.L)}
        )
    names = dict.fromkeys(canonical(path)[0] for path in flat)
    return nested(
        {n: jnp.stack([flat[f"layers/{i}/{n[7:]}"] for i in range(config.L)]) if n.startswith("layers/") else flat[n]
         for n in names}
    )  # fmt: skip
