"""A method: what trains, as a pytree of its own, and how it is put together with the frozen base."""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .. import InputError
from ..model import Config, Context, Transformer, Weight, forward, shapes_of
from ..model.tree import canonical, cut_key, is_stacked, named, nested
from .masks import Where, select


@dataclass_transform(frozen_default=True)
class Method:
    """A pair of pure functions, as an Optax optimizer is; the fields of a subclass are its hyperparameters.

    trainable = method.init(key, params)                    # {path: arrays}, fp32
    logits = model.apply({"params": method.bind(params, trainable)}, ids)
    """

    identity: ClassVar[bool] = True  # logits right after init equal the base's
    rate: ClassVar[float] = 5.0  # the learning rate to begin a search at, over full fine-tuning's

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True)(cls)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """The trainable pytree, `{path: arrays}`, for a base (or its shapes, under `jax.eval_shape`)."""
        raise TypeError(f"{type(self).__name__} defines no init")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        """The base with weights where the method acts; params may be all of it or what `freeze` left."""
        return params

    def context(self, trainable: Any) -> Context:
        """What is put before the text: virtual tokens or a key/value past."""
        return Context()

    def freeze(self, params: Any) -> Any:
        """The base without what `trainable` now holds: one copy of each parameter.

        A method with frozen constants puts them here, in a Weight that its `bind` knows again (PiSSA's residual), or
        makes them anew in `bind` from a seed that is one of its fields (VeRA's projections).
        """
        return params

    def noisy(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        """`bind` as it is in training, where it may draw (dropout)."""
        return self.bind(params, trainable)

    def penalty(self, trainable: Any) -> Any:
        """What training adds to the mean loss."""
        return 0.0

    def transform(self, steps: int) -> optax.GradientTransformation:
        """What is done to the optimizer's updates: other rates for some leaves, ranks that end. `grads=` is given."""
        return optax.identity()


class Target(NamedTuple):
    """One array that a method acts on: all of a matrix, or the layers [start, stop) of a stacked one."""

    key: str  # in the trainable tree: `layers/attn/q`, `layers/attn/q[4:8]`
    path: str  # in the base
    name: str  # the path without layer indices, which seeds
    layers: range | None
    stacked: bool
    shape: tuple[int, ...]  # of one layer


def targets(where: Where, params: Any, ndim: int | None = None, what: str = "method") -> Iterator[Target]:
    """The arrays that `where` picks, by layer range; ndim asks for matrices (2) and makes anything else an error."""
    flat = named(params)
    for path, ranges in select(where, params).items():
        name, layers = canonical(path)
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


def each_layer(target: Target, fn: Any, *args: Any) -> Array:
    """fn(*args), mapped over the layer axis where the target is stacked."""
    return jax.vmap(fn)(*args) if target.stacked else fn(*args)


def whole(params: Any, trainable: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(path, the base's leaf, the method's arrays over all its layers); layers that do not train are filled with zeros.

    Raises InputError for a path that the base does not have.
    """
    flat, pieces = named(params), group(trainable)
    for path, parts in pieces.items():
        if path not in flat:
            raise InputError(f"the adapter trains {path}, which this base does not have: it belongs to another base")
        if None in parts:
            yield path, flat[path], parts[None]
            continue
        L = jax.tree.leaves(flat[path])[0].shape[0]

        def fill(*arrays: Array, ranges: Any = tuple(parts), L: int = L) -> Array:
            full = jnp.zeros((L, *arrays[0].shape[1:]), arrays[0].dtype)
            for (start, stop), array in zip(ranges, arrays, strict=True):
                full = full.at[start:stop].set(array)
            return full

        yield path, flat[path], jax.tree.map(fill, *parts.values())


def group(trainable: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    """{path: {layers [start, stop), or None for all: arrays}} of a method's tree, in the order of the layers."""
    pieces: dict[str, dict[Any, Any]] = {}
    for key, arrays in trainable.items():
        path, layers = cut_key(key)
        pieces.setdefault(path, {})[layers] = arrays
    return {path: dict(sorted(parts.items())) for path, parts in pieces.items()}


def partition(method: Method, params: Any, key: Array) -> tuple[Any, dict[str, Any]]:
    """(frozen, trainable): each parameter is in one of the two. Differentiate the second alone."""
    return method.freeze(params), method.init(key, params)


def apply(
    model: Transformer, params: Any, method: Method, trainable: Any, ids_BT: Array,
    positions_BT: Array | None = None, segments_BT: Array | None = None, **kw: Any,
) -> Array:  # fmt: skip
    """logits_BTV of the real positions, with the method's context before the text."""
    bound, context = method.bind(params, trainable), method.context(trainable)
    return forward(model, bound, ids_BT, positions_BT, segments_BT, context=context, **kw)[0]


def count(method: Method, base: Config | Any) -> int:
    """How many numbers a method trains on a config or a params tree, without memory."""
    params = shapes_of(base) if isinstance(base, Config) else base
    shapes = jax.eval_shape(method.init, jax.random.key(0), params)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def fold(bound: Any, dtype: Any = None) -> dict[str, Any]:
    """The bound tree as plain matrices, each weight replaced by `I @ w` in `dtype`, or in that of its base.

    Raises InputError for a weight that is not linear in x. A context (prompt, prefix) is not part of it: see `merge`.
    """

    def dense(path: str, w: Any) -> Any:
        if not isinstance(w, Weight):
            return w
        if not w.linear:
            raise InputError(f"{path}: {type(w).__name__} is not linear in x, so it cannot be folded into a matrix")
        base = w
        while isinstance(base, Weight):
            base = getattr(base, "w", None)
        matrix = jax.lax.map(lambda one: one.dense(), w) if is_stacked(path) else w.dense()
        kind = dtype or getattr(base, "dtype", None)
        return matrix if kind is None else matrix.astype(kind)

    with jax.default_matmul_precision("highest"):  # a TPU would multiply in bfloat16
        return nested({path: dense(path, w) for path, w in named(bound).items()})


def merge(method: Method, params: Any, trainable: Any, dtype: Any = None) -> dict[str, Any]:
    """A base that computes by itself what base + trainable compute; InputError where no such base exists."""
    if method.context(trainable).length:
        raise InputError(f"{type(method).__name__} puts positions before the text; a base alone cannot hold them")
    return fold(method.bind(params, trainable), dtype)


class Chain(Method):
    """Several methods at once, bound in order, each with its branch of the trainable tree; make it with `chain`."""

    methods: tuple[tuple[str, Method], ...]

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return {n: m.init(jax.random.fold_in(key, zlib.crc32(n.encode())), params) for n, m in self.methods}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        for name, method in self.methods:
            params = method.bind(params, trainable[name])
        return params

    def context(self, trainable: Any) -> Context:
        found = [c for name, m in self.methods if (c := m.context(trainable[name])).length]
        if len(found) > 1:
            raise InputError("chain: two methods put positions before the text; keep one of them")
        return found[0] if found else Context()

    def freeze(self, params: Any) -> Any:
        for _, method in self.methods:
            params = method.freeze(params)
        return params

    def noisy(self, params: Any, trainable: Any, key: Array) -> dict[str, Any]:
        for i, (name, method) in enumerate(self.methods):
            params = method.noisy(params, trainable[name], jax.random.fold_in(key, i))
        return params

    def penalty(self, trainable: Any) -> Any:
        return sum(method.penalty(trainable[name]) for name, method in self.methods)

    def transform(self, steps: int) -> optax.GradientTransformation:
        parts = {n: optax.with_extra_args_support(m.transform(steps)) for n, m in self.methods}

        def update(updates: Any, state: Any, params: Any = None, grads: Any = None) -> tuple[Any, Any]:
            done = {n: part.update(updates[n], state[n], params[n], grads=grads[n]) for n, part in parts.items()}
            return {n: d[0] for n, d in done.items()}, {n: d[1] for n, d in done.items()}

        init = lambda trainable: {n: part.init(trainable[n]) for n, part in parts.items()}  # noqa: E731
        return optax.GradientTransformationExtraArgs(init, update)

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return all(method.identity for _, method in self.methods)


def chain(*methods: Method) -> Chain:
    """All the methods at once: `chain(LoRA(), Subset("norms"))`, one branch `lora`, `subset`, `lora_2` each."""
    names: list[str] = []
    for method in methods:
        name = type(method).__name__.lower()
        seen = sum(n.split("_")[0] == name for n in names)
        names.append(f"{name}_{seen + 1}" if seen else name)
    return Chain(tuple(zip(names, methods, strict=True)))
