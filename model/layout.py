"""Conversion between stacked and unrolled layers: the same values under other paths.

A stacked array `layers/mlp/up` has the layers on its first axis, a slice of it that a method trains is
`layers/mlp/up[4:8]`, and unrolled layers are `layers/4/mlp/up`, ... A `Flat` tree is {path: array or shape}.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .config import Config
from .init import shapes_of
from .quantize import quantize
from .sharding import shardings
from .tree import in_layers, is_stacked, name_and_layers, named, nested, paths

Flat = Mapping[str, Any]


def layer_positions(path: str, shape: tuple[int, ...]) -> list[tuple[tuple[str, int], int | None]]:
    """Return [((name, layer), index)] of the layers in the array at a path.

    layer: -1 outside the layers. index: the place on the first axis, or None for an array of a single layer.
    """
    name, layers = name_and_layers(path)
    unrolled = layers is not None and len(layers) == 1 and name != path and "[" not in path
    if not in_layers(path) or unrolled or not shape:
        return [((name, layers[0] if layers else -1), None)]
    return [((name, layer), i) for i, layer in enumerate(layers or range(shape[0]))]


def same_layers(a: Flat, b: Flat) -> bool:
    """Return whether two trees hold the same layers, with the same shapes and dtypes, in whatever layout."""

    def layers(tree: Flat) -> dict[tuple[str, int], Any]:
        return {
            key: (tuple(x.shape[index is not None :]), str(x.dtype))
            for path, x in tree.items()
            for key, index in layer_positions(path, tuple(x.shape))
        }

    return layers(a) == layers(b)


def saved_targets(saved: Flat, target: Flat) -> dict[str, Any]:
    """Return the shapes of `saved` with the shardings of those leaves of `target` that will hold their values."""
    places = {key: (x.sharding, index) for path, x in target.items() for key, index in layer_positions(path, x.shape)}
    targets = {}
    for path, x in saved.items():
        key, index = layer_positions(path, tuple(x.shape))[0]
        sharding, target_index = places[key]
        if isinstance(sharding, NamedSharding) and (index is None) != (target_index is None):
            spec = P(None, *sharding.spec) if target_index is None else P(*sharding.spec[1:])
            sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        targets[path] = jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=sharding)
    return targets


def convert_arrays(arrays: dict[str, Any], target: Flat) -> dict[str, Any]:
    """Return the values of `arrays` under the paths and shardings of `target`. `arrays` is consumed: its entries are
    removed, and converted ones are freed as soon as all their layers have been copied."""
    source = {key: (path, index) for path, x in arrays.items() for key, index in layer_positions(path, x.shape)}
    uncopied = Counter(path for path, _ in source.values())
    converted = {}
    for path, x in target.items():
        if path in arrays and arrays[path].shape == tuple(x.shape):
            converted[path] = arrays.pop(path)
            continue
        positions = layer_positions(path, tuple(x.shape))
        origins, indices = zip(*(source[key] for key, _ in positions), strict=True)
        join = _join(x.sharding, tuple(index is None for index in indices), positions[0][1] is not None)
        converted[path] = join([arrays[origin] for origin in origins], [index or 0 for index in indices])
        uncopied.subtract(origins)
        for origin in origins:
            if not uncopied[origin] and origin in arrays:
                arrays.pop(origin).delete()
    return converted


@cache
def _join(sharding: Any, whole: tuple[bool, ...], stack: bool) -> Any:
    """Return a compiled function (arrays, indices) -> their layers, stacked, or the only one. A layer is a whole array
    or the part of one at an index."""

    def join(arrays: list[Any], indices: list[Any]) -> Any:
        layers = [
            x if is_whole else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            for x, is_whole, i in zip(arrays, whole, indices, strict=True)
        ]
        return jnp.stack(layers) if stack else layers[0]

    return jax.jit(join, out_shardings=sharding)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Return shapes that carry shardings, as a target of a restore."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def set_layout(config: Config, layers: str) -> Config:
    """Return the config with its layers `stacked` or `unrolled`; "" leaves them as they are."""
    return dataclasses.replace(config, scan=layers == "stacked") if layers else config


def convert_layout(config: Config, params: Any, layers: str, mesh: Any = None, kind: str = "") -> tuple[Config, Any]:
    """Return a base with its layers `stacked` or `unrolled` ("": as they are). Those of `params` that change are freed.

    kind: what the matrices are quantised as.
    """
    if set_layout(config, layers) == config:
        return config, params
    config = set_layout(config, layers)
    shapes = shapes_of(config)
    shapes = jax.eval_shape(partial(quantize, kind=kind), shapes) if kind else shapes
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    split = shardings(mesh, shapes) if mesh is not None else jax.tree.map(lambda _: device, shapes)
    target = dict(paths(with_shardings(shapes, split)))
    converted = convert_arrays(dict(paths(params)), target)
    return config, jax.tree.unflatten(jax.tree.structure(shapes), [converted[path] for path in target])


def restack(params: Any, config: Config) -> dict[str, Any]:
    """The parameters in the layout of `config.scan`: stacked `layers/mlp/up`, or unrolled `layers/0/mlp/up`, ..."""
    flat, layers = named(params), range(config.L)
    if config.scan == any(is_stacked(path) for path in flat):
        return params
    inner = {path.removeprefix("layers/"): leaf for path, leaf in flat.items() if path.startswith("layers/")}
    outer = {path: leaf for path, leaf in flat.items() if not path.startswith("layers/")}
    if config.scan:
        names = [path.removeprefix("0/") for path in inner if path.startswith("0/")]
        return nested(outer | {f"layers/{n}": jnp.stack([inner[f"{i}/{n}"] for i in layers]) for n in names})
    return nested(outer | {f"layers/{i}/{n}": leaf[i] for n, leaf in inner.items() for i in layers})
