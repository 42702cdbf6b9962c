"""What a method acts on: the arrays that a rule picks, by layers, and the way back from its arrays to the base."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from ..model import Weight
from ..model.tree import Rules, is_stacked, match_rules, name_and_layers, named, replace, split_layer_index, true_ranges
from .masks import Where, select


class Target(NamedTuple):
    """One array that a method acts on: all of a matrix, or the layers [start, stop) of a stacked one."""

    key: str  # in the trainable tree: `layers/attn/q`, `layers/attn/q[4:8]`
    path: str  # in the base
    name: str  # the path without layer indices, which seeds
    layers: range | None
    stacked: bool
    shape: tuple[int, ...]  # of one layer


class FixedArrays:
    """Arrays that a method was given and never trains (an adapter file's projections): constants of the program.

    A field of a method, or a static field of a weight; two are equal if their numbers are.
    """

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {name: np.asarray(x) for name, x in arrays.items()}
        parts = ((k, x.shape, x.dtype.str, hashlib.sha256(x.tobytes()).hexdigest()) for k, x in self.arrays.items())
        self.digest = hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()  # of names, shapes, dtypes and values

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedArrays) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Given({', '.join(f'{k}{list(x.shape)}' for k, x in self.arrays.items())})"


def targets(where: Where, params: Any, ndim: int | None = None, what: str = "method") -> Iterator[Target]:
    """The arrays that `where` picks, by layer range; ndim asks for matrices (2) and makes anything else an error."""
    flat = named(params)
    for path, ranges in select(where, params).items():
        name, layers = name_and_layers(path)
        stacked = is_stacked(path)
        shape = flat[path].shape[1:] if stacked else flat[path].shape
        if ndim is not None and len(shape) != ndim:
            raise InputError(
                f"{what}: {path} has {len(shape)} axes in a layer, wanted a matrix; narrow where={where!r}"
            )
        for start, stop in ranges if stacked else [(0, 0)]:
            part = stacked and (start, stop) != (0, flat[path].shape[0])
            yield Target(f"{path}[{start}:{stop}]" if part else path, path, name,
                         range(start, stop) if stacked else layers, stacked, tuple(shape))  # fmt: skip


def layer_keys(key: Array, target: Target, leaf: str = "") -> Any:
    """A key for each layer of a target, fold_in(fold_in(key, crc32(name)), layer), whatever the layout."""
    key = jax.random.fold_in(key, zlib.crc32(f"{target.name}/{leaf}".encode()))
    if target.layers is None:
        return key
    if not target.stacked:
        return jax.random.fold_in(key, target.layers[0])
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array(target.layers))


def layer_seeds(key: Array, path: str, weight: Any) -> Array:
    """Seeds [2], or [L, 2] for a stacked weight: key data, which passes through scan and vmap as any array does."""
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    depth = jax.tree.leaves(weight)[0].shape[0]
    return jax.random.key_data(jax.random.split(key, depth) if is_stacked(path) else key)


def uniform_fan_in(key: Array, shape: tuple[int, ...], fan: int) -> Array:
    """Numbers uniform in +-fan^-1/2: how torch begins the matrices of a Linear, and most methods theirs."""
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)


def init_bottleneck(key: Array, D: int, R: int) -> dict[str, Array]:
    """down [D, R] ~ N(0, 1/D), up [R, D] = 0, and their biases 0: an adapter that adds nothing yet."""
    down = D**-0.5 * jax.random.normal(key, (D, R))
    return {"down": down, "down_bias": jnp.zeros(R), "up": jnp.zeros((R, D)), "up_bias": jnp.zeros(D)}


def dropout(x: Array, seed: Array, rate: Any) -> Array:
    """x with a part of `rate` set to 0 and the rest scaled, so that its mean stays; `seed` is a layer's key data."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(seed), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def each_layer(target: Target, fn: Any, *args: Any) -> Array:
    """fn(*args), mapped over the layer axis where the target is stacked."""
    return jax.vmap(fn)(*args) if target.stacked else fn(*args)


def iter_full_arrays(params: Any, trainable: dict[str, Any], **fill: float) -> Iterator[tuple[str, Any, Any]]:
    """(path, the base's leaf, the method's arrays over all its layers); layers that do not train are filled with zeros,
    or with what `fill` says for an array by its name.

    Raises InputError for a path that the base does not have.
    """
    flat, pieces = named(params), group_by_path(trainable)
    for path, parts in pieces.items():
        if path not in flat:
            raise InputError(f"the adapter trains {path}, which this base does not have: it belongs to another base")
        if None in parts:
            yield path, flat[path], parts[None]
            continue
        L = jax.tree.leaves(flat[path])[0].shape[0]

        def one(at: Any, *arrays: Array, ranges: Any = tuple(parts), L: int = L) -> Array:
            # Also where layers differ in rank: a column of A against a row of B that is not there.
            shape = (L, *map(max, zip(*(x.shape[1:] for x in arrays), strict=True)))
            full = jnp.full(shape, fill.get(str(getattr(at[-1], "key", "")), 0.0) if at else 0.0, arrays[0].dtype)
            for (start, stop), array in zip(ranges, arrays, strict=True):
                full = full.at[start:stop, *(slice(n) for n in array.shape[1:])].set(array)
            return full

        yield path, flat[path], jax.tree_util.tree_map_with_path(one, *parts.values())


def wrap_weights(params: Any, trainable: dict[str, Any], make: Callable[..., Weight], **fill: float) -> dict[str, Any]:
    """The base with make(w, **arrays) in the place of every matrix w that the method has arrays for."""
    return replace(params, {path: make(w, **arrays) for path, w, arrays in iter_full_arrays(params, trainable, **fill)})


def replace_biases(params: Any, trainable: dict[str, Any], make: Callable[..., Array], **fill: float) -> dict[str, Any]:
    """The base with make(b, **arrays) in the place of the bias b of every matrix that the method has arrays for."""
    flat = named(params)
    found = {f"{path}_bias": arrays for path, _, arrays in iter_full_arrays(params, trainable, **fill)}
    return replace(params, {path: make(flat[path], **arrays) for path, arrays in found.items() if path in flat})


def is_on(number: Any) -> bool:
    """Whether a number that is off at 0 is on; one that a program is given as an array may be."""
    return isinstance(number, Array) or bool(number)


def with_dropout_seeds(bound: Any, trainable: dict[str, Any], key: Array, rate: Any) -> dict[str, Any]:
    """The bound base with a seed in each weight that the method has arrays for, so that it drops a part of its x; as it
    is where the rate is 0."""
    if not is_on(rate):
        return bound
    flat, touched = named(bound), {split_layer_index(k)[0] for k in trainable}
    seeds = {path: layer_seeds(key, path, flat[path]) for path in touched}
    rates = {p: jnp.broadcast_to(jnp.float32(rate), s.shape[:-1]) for p, s in seeds.items()}
    return replace(bound, {p: dataclasses.replace(flat[p], seed=s, dropout=rates[p]) for p, s in seeds.items()})


def each_matrix(
    key: Array,
    params: Any,
    where: Where,
    make: Callable[[Array, int, int], dict[str, Array]],
    what: str,
    leaf: str = "",
) -> dict[str, Any]:
    """{target: make(key, D, F) of each layer} of the matrices that `where` picks; the same for stacked and unrolled."""
    found = targets(where, params, ndim=2, what=what)
    return {t.key: each_layer(t, lambda k, t=t: make(k, *t.shape), layer_keys(key, t, leaf)) for t in found}


def map_layers(fn: Callable[[Array], Any], params: Any, key: str) -> Any:
    """fn(w [D, F]) of each layer that a key of a method's tree names; of quantised ones one is in memory at a time."""
    path, layers = split_layer_index(key)
    dense = lambda w: fn(w.dense() if isinstance(w, Weight) else w)  # noqa: E731
    w = jax.tree.map(lambda x: x[slice(*layers) if layers else ...], named(params)[path])
    return jax.lax.map(dense, w) if is_stacked(path) else dense(w)


def group_by_path(trainable: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    """{path: {layers [start, stop), or None for all: arrays}} of a method's tree, in the order of the layers."""
    pieces: dict[str, dict[Any, Any]] = {}
    for key, arrays in trainable.items():
        path, layers = split_layer_index(key)
        pieces.setdefault(path, {})[layers] = arrays
    return {path: dict(sorted(parts.items())) for path, parts in pieces.items()}


def group_by_value(
    rules: Rules, default: Any, found: Iterator[Target], params: Any, what: str
) -> Iterator[tuple[Target, Any]]:
    """(target, the value that the rules give it): layers of one stack are apart where their values differ."""
    values = match_rules(rules, params, default=default, what=what) if rules else {}
    for t in found:
        row = values.get(t.path, [default])
        row = row * t.layers.stop if t.stacked and len(row) == 1 else row  # type: ignore[union-attr]
        picked = row[t.layers.start : t.layers.stop] if t.stacked else row  # type: ignore[union-attr]
        if len(set(picked)) == 1:
            yield t, picked[0]
            continue
        for value in dict.fromkeys(picked):
            for a, b in true_ranges([i in t.layers and v == value for i, v in enumerate(row)]):  # type: ignore[operator]
                yield t._replace(key=f"{t.path}[{a}:{b}]", layers=range(a, b)), value


def layer_values(rules: Rules, default: float, params: Any, key: str, what: str) -> Any:
    """The value that the rules give the layers of one key of a method's tree: a number, or an array [L, 1, 1]."""
    if not rules:
        return default
    path, layers = split_layer_index(key)
    row = match_rules(rules, params, default=default, what=what)[path]
    row = row[slice(*layers)] if layers and len(row) > 1 else row
    return row[0] if len(set(row)) == 1 else jnp.array(row)[:, None, None]
