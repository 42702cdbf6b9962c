"""The arrays of the base that a method acts on, layer by layer, and the way back from a method's arrays to the base."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from ..model import Weight
from ..model.tree import Rules, is_stacked, match_rules, name_and_layers, named, replace, split_layer_index, true_ranges
from .masks import Where, select


class Target(NamedTuple):
    """One array that a method acts on: a whole parameter, or the layers [start, stop) of a stacked one."""

    key: str  # in the trainable tree: `layers/attn/q`, `layers/attn/q[4:8]`
    path: str  # in the base
    name: str  # the path without layer indices, from which draws are seeded
    layers: range | None
    stacked: bool
    shape: tuple[int, ...]  # of one layer

    @classmethod
    def from_key(cls, key: str, array: Array, shape: tuple[int, ...]) -> Self:
        """Return the target of a key; `array` is any array with the key's layer axis, `shape` that of one layer."""
        (name, layers), stacked = name_and_layers(key), is_stacked(key)
        layers = range(len(array)) if stacked and layers is None else layers
        return cls(key, split_layer_index(key)[0], name, layers, stacked, shape)


class FixedArrays:
    """Arrays that a method is given and never trains (projections of an adapter file): constants of the program.

    A field of a method, or a static field of a weight. Two are equal if their names, shapes, dtypes and values are.
    """

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {name: np.asarray(x) for name, x in arrays.items()}
        parts = ((k, x.shape, x.dtype.str, hashlib.sha256(x.tobytes()).hexdigest()) for k, x in self.arrays.items())
        self.digest = hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedArrays) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"FixedArrays({', '.join(f'{k}{list(x.shape)}' for k, x in self.arrays.items())})"


# Which arrays a method acts on


def targets(where: Where, params: Any, ndim: int | None = None, owner: str = "method") -> Iterator[Target]:
    """Yield the arrays that `where` picks, by layer range.

    `ndim`: the axes that each must have in a layer (2: a matrix), else InputError; `owner` is named in the message.
    """
    flat = named(params)
    for path, ranges in select(where, params).items():
        (name, layers), stacked = name_and_layers(path), is_stacked(path)
        shape = flat[path].shape[stacked:]
        if ndim is not None and len(shape) != ndim:
            raise InputError(
                f"{owner}: {path} has {len(shape)} axes in a layer, wanted a matrix; narrow where={where!r}"
            )
        for start, stop in ranges if stacked else [(0, 0)]:
            partial = stacked and (start, stop) != (0, flat[path].shape[0])
            key = f"{path}[{start}:{stop}]" if partial else path
            yield Target(key, path, name, range(start, stop) if stacked else layers, stacked, tuple(shape))


def targets_by_rule(
    where: Where, params: Any, owner: str, rules: Rules, default: Any, rule: str
) -> Iterator[tuple[Target, Any]]:
    """Yield (matrix, the value that the rules give it); layers of one stack are apart where their values differ.

    `rule`: the kind of rule, for messages.
    """
    values = match_rules(rules, params, default=default, what=rule) if rules else {}
    for target in targets(where, params, 2, owner):
        row = values.get(target.path, [default])
        if not target.stacked:
            yield target, row[0]
            continue
        assert target.layers is not None
        row = row * target.layers.stop if len(row) == 1 else row
        picked = dict.fromkeys(row[i] for i in target.layers)
        if len(picked) == 1:
            yield target, row[target.layers.start]
            continue
        for value in picked:
            for a, b in true_ranges([i in target.layers and x == value for i, x in enumerate(row)]):
                yield target._replace(key=f"{target.path}[{a}:{b}]", layers=range(a, b)), value


def rule_values(rules: Rules, default: float, params: Any, key: str, rule: str) -> Any:
    """Return the value that the rules give the layers of one key of a trainable tree: a number, or [L, 1, 1]."""
    if not rules:
        return default
    path, layers = split_layer_index(key)
    row = match_rules(rules, params, default=default, what=rule)[path]
    row = row[slice(*layers)] if layers and len(row) > 1 else row
    return row[0] if len(set(row)) == 1 else jnp.array(row)[:, None, None]


# Making a method's arrays


def init_matrices(
    key: Array, params: Any, where: Where, make: Callable[[Array, Target], Any], owner: str, leaf: str = ""
) -> dict[str, Any]:
    """Return {key: make(key, target) of each layer} of the matrices that `where` picks, the same in either layout."""
    picked = ((target, None) for target in targets(where, params, 2, owner))
    return init_targets(key, picked, lambda key, target, _: make(key, target), leaf)


def init_targets(
    key: Array, picked: Iterable[tuple[Target, Any]], make: Callable[[Array, Target, Any], Any], leaf: str = ""
) -> dict[str, Any]:
    """Return {key: make(key, target, value) of each layer} of (target, value) pairs; `leaf` is part of the seed."""
    return {
        t.key: vmap_layers(t, lambda k, t=t, v=value: make(k, t, v), layer_keys(key, t, leaf)) for t, value in picked
    }


def layer_keys(key: Array, target: Target, leaf: str = "") -> Any:
    """Return a key for each layer, fold_in(fold_in(key, crc32(name)), layer), the same in either layout."""
    key = jax.random.fold_in(key, zlib.crc32(f"{target.name}/{leaf}".encode()))
    if target.layers is None:
        return key
    if not target.stacked:
        return jax.random.fold_in(key, target.layers[0])
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array(target.layers))


def vmap_layers(target: Target, fn: Callable[..., Any], *args: Any) -> Any:
    """Return fn(*args), mapped over the layer axis if the target is stacked."""
    return jax.vmap(fn)(*args) if target.stacked else fn(*args)


def map_dense_layers(fn: Callable[[Array], Any], params: Any, key: str) -> Any:
    """Return fn(w [D, F]) of each layer that a key names, with one dense layer in memory at a time."""
    path, layers = split_layer_index(key)
    w = jax.tree.map(lambda x: x[slice(*layers) if layers else ...], named(params)[path])

    def of_layer(w: Any) -> Any:
        return fn(w.dense() if isinstance(w, Weight) else w)

    return jax.lax.map(of_layer, w) if is_stacked(path) else of_layer(w)


def uniform_fan_in(key: Array, shape: tuple[int, ...], fan: int) -> Array:
    """Draw uniformly from +-fan^-1/2, as torch initialises a Linear."""
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)


# Putting a method's arrays into the base


def wrap_weights(params: Any, trainable: dict[str, Any], make: Callable[..., Weight], **fill: float) -> dict[str, Any]:
    """Return the base with make(w, **arrays) in place of every matrix w that the method has arrays for."""
    return replace(params, {path: make(w, **arrays) for path, w, arrays in iter_full_arrays(params, trainable, **fill)})


def replace_biases(params: Any, trainable: dict[str, Any], make: Callable[..., Array], **fill: float) -> dict[str, Any]:
    """Return the base with make(b, **arrays) in place of the bias b, if any, of every matrix that has arrays."""
    flat = named(params)
    arrays_of = {f"{path}_bias": arrays for path, _, arrays in iter_full_arrays(params, trainable, **fill)}
    return replace(params, {path: make(flat[path], **arrays) for path, arrays in arrays_of.items() if path in flat})


def iter_full_arrays(params: Any, trainable: dict[str, Any], **fill: float) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, the base's leaf, the method's arrays over all layers of it).

    Layers that do not train are filled with zeros, or with the value that `fill` gives for an array's name. Raises
    InputError for a path that the base does not have.
    """
    flat = named(params)
    for path, parts in group_by_path(trainable).items():
        if path not in flat:
            raise InputError(f"the adapter trains {path}, which this base does not have: it belongs to another base")
        if None in parts:
            yield path, flat[path], parts[None]
            continue
        depth = jax.tree.leaves(flat[path])[0].shape[0]

        def joined(at: Any, *arrays: Array, ranges: Any = tuple(parts), depth: int = depth) -> Array:
            # Where ranks differ between layers, a column of zeros in A meets a row of zeros in B.
            shape = (depth, *map(max, zip(*(x.shape[1:] for x in arrays), strict=True)))
            full = jnp.full(shape, fill.get(at[-1].key, 0.0) if at else 0.0, arrays[0].dtype)
            for (start, stop), array in zip(ranges, arrays, strict=True):
                full = full.at[start:stop, *(slice(n) for n in array.shape[1:])].set(array)
            return full

        yield path, flat[path], jax.tree_util.tree_map_with_path(joined, *parts.values())


def group_by_path(trainable: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    """Return {path: {layers [start, stop), or None for all: arrays}} of a trainable tree, in order of the layers."""
    pieces: dict[str, dict[Any, Any]] = {}
    for key, arrays in trainable.items():
        path, layers = split_layer_index(key)
        pieces.setdefault(path, {})[layers] = arrays
    return {path: dict(sorted(parts.items())) for path, parts in pieces.items()}


# Dropout


def is_on(number: Any) -> bool:
    """Return whether a number that switches something off at 0 is on; a traced number may be, so it is."""
    return isinstance(number, Array) or bool(number)


def dropout(x: Array, seed: Array, rate: Any) -> Array:
    """Set a part `rate` of x to 0 and scale the rest by 1 / (1 - rate); `seed` is a layer's key data."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(seed), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def with_dropout_seeds(bound: Any, trainable: dict[str, Any], key: Array, rate: Any) -> dict[str, Any]:
    """Return the bound base with `seed` and `dropout` set in each weight that has arrays; unchanged if the rate is 0.

    A seed is key data, uint32 [2] or [L, 2], which passes through scan and vmap as any array does.
    """
    if not is_on(rate):
        return bound
    flat, seeded = named(bound), {}
    for path in {split_layer_index(k)[0] for k in trainable}:
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        depth = jax.tree.leaves(flat[path])[0].shape[0]
        seed = jax.random.key_data(jax.random.split(path_key, depth) if is_stacked(path) else path_key)
        rates = jnp.broadcast_to(jnp.float32(rate), seed.shape[:-1])
        seeded[path] = dataclasses.replace(flat[path], seed=seed, dropout=rates)
    return replace(bound, seeded)
