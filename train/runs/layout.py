"""Stacked and unrolled layers: the same values under other paths. Trees in the upper half are flat, {path: leaf}."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ...model import Config, shapes_of
from ...model.quantize import quantize
from ...model.sharding import shardings
from ...model.tree import in_layers, name_and_layers, paths

Flat = Mapping[str, Any]


def parts(path: str, shape: tuple[int, ...]) -> list[tuple[tuple[str, int], int | None]]:
    """[((name, layer), place on the first axis)] of the layers that the array at a path holds; layer -1: none."""
    name, layers = name_and_layers(path)
    unrolled = layers is not None and len(layers) == 1 and name != path and "[" not in path
    if not in_layers(path) or unrolled or not shape:
        return [((name, layers[0] if layers else -1), None)]
    return [((name, layer), i) for i, layer in enumerate(layers or range(shape[0]))]


def same_values(a: Flat, b: Flat) -> bool:
    """Whether two trees hold the same layers, of the same shapes and dtypes, under whatever paths."""

    def one(tree: Flat) -> dict[tuple[str, int], Any]:
        return {key: (tuple(x.shape[at is not None :]), str(x.dtype))
                for path, x in tree.items() for key, at in parts(path, tuple(x.shape))}  # fmt: skip

    return one(a) == one(b)


def like(saved: Flat, wanted: Flat) -> dict[str, Any]:
    """The shapes of `saved` with the shardings of the leaves of `wanted` that will hold their values."""
    where = {key: (x.sharding, at) for path, x in wanted.items() for key, at in parts(path, x.shape)}
    found = {}
    for path, x in saved.items():
        key, at = parts(path, tuple(x.shape))[0]
        split, held = where[key]
        if isinstance(split, NamedSharding) and (at is None) != (held is None):
            spec = P(None, *split.spec) if held is None else P(*split.spec[1:])
            split = NamedSharding(split.mesh, spec, memory_kind=split.memory_kind)
        found[path] = jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=split)
    return found


def converted(arrays: dict[str, Any], wanted: Flat) -> dict[str, Any]:
    """The values of `arrays` under the paths, and on the shardings, of `wanted`; `arrays` is used up."""
    source = {key: (path, at) for path, x in arrays.items() for key, at in parts(path, x.shape)}
    left = Counter(path for path, _ in source.values())
    found = {}
    for path, x in wanted.items():
        if path in arrays and arrays[path].shape == tuple(x.shape):
            found[path] = arrays.pop(path)
            continue
        keys = parts(path, tuple(x.shape))
        taken = [source[key] for key, _ in keys]
        made = _join(x.sharding, tuple(at is None for _, at in taken), keys[0][1] is not None)
        found[path] = made([arrays[p] for p, _ in taken], [at or 0 for _, at in taken])
        left.subtract(p for p, _ in taken)
        for p, _ in taken:
            if not left[p] and p in arrays:
                arrays.pop(p).delete()
    return found


@cache
def _join(where: Any, whole: tuple[bool, ...], stacked: bool) -> Any:
    """arrays, places -> one layer of each array (all of it, or at a place), stacked or the only one."""

    def join(arrays: list[Any], at: list[Any]) -> Any:
        layers = [x if w else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
                  for x, w, i in zip(arrays, whole, at, strict=True)]  # fmt: skip
        return jnp.stack(layers) if stacked else layers[0]

    return jax.jit(join, out_shardings=where)


def sharded(shapes: Any, split: Any) -> Any:
    """Shapes with shardings, which a restore follows."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, split)


def set_layout(config: Config, layers: str) -> Config:
    """The config with its layers stacked or unrolled, as a run asks for."""
    return dataclasses.replace(config, scan=layers == "stacked") if layers else config


def convert_layout(config: Config, params: Any, layers: str, mesh: Any = None, kind: str = "") -> tuple[Config, Any]:
    """A base with its layers stacked or unrolled; what had to be moved of `params` is used up."""
    if set_layout(config, layers) == config:
        return config, params
    config = set_layout(config, layers)
    shapes = jax.eval_shape(partial(quantize, kind=kind), shapes_of(config)) if kind else shapes_of(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    split = shardings(mesh, shapes) if mesh is not None else jax.tree.map(lambda _: here, shapes)
    wanted = dict(paths(sharded(shapes, split)))
    made = converted(dict(paths(params)), wanted)
    return config, jax.tree.unflatten(jax.tree.structure(shapes), [made[path] for path in wanted])
