"""Layout of a method's arrays over a mesh: each axis is split as the axis of the base that it follows.

A method declares the axes of its arrays as data, `axes = {"a": "DR", "b": "RF"}`, the layer axis left out: D and F are
the first and the second axis of the parameter that the array belongs to (of a matrix input and output; of the token
table vocabulary and width), M is the shorter of the two, and any other letter is an axis that is not split. The name ""
stands for an array that is a leaf of its own (`{path: array}`). An array that is not declared is replicated.
"""

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..model.tree import is_stacked, name_and_layers, named, paths, split_layer_index
from .base import Chain, Method


def adapter_shardings(mesh: Mesh, method: Method, tree: Any, base: Any, base_shardings: Any) -> Any:
    """Return the NamedShardings of a trainable tree, or of a state that holds trees like it (an optimizer's moments).

    `tree` and `base` are arrays or shapes. What belongs to no trainable array is replicated.
    """
    trainable = jax.eval_shape(method.init, jax.random.key(0), base)
    declared = {path: (array.shape, _spec(path, origin, axes, array, base, base_shardings))
                for path, origin, axes, array in iter_axes(method, trainable)}  # fmt: skip

    def sharding(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        shape, spec = next((declared[end] for end in ends if end in declared), (None, P()))
        return NamedSharding(mesh, spec if leaf.shape == shape else P())

    return jax.tree.unflatten(jax.tree.structure(tree), [sharding(path, leaf) for path, leaf in paths(tree)])


def frozen_shardings(mesh: Mesh, frozen: Any, base: Any, base_shardings: Any) -> Any:
    """Return the NamedShardings of `method.frozen_params(base)`: those of the base, also inside a method's weights."""
    flat, exact = (
        named(base),
        dict(zip((path for path, _ in paths(base)), jax.tree.leaves(base_shardings), strict=True)),
    )
    shapes = {path: leaf.shape for path, leaf in paths(base)}

    def sharding(path: str, leaf: Any) -> NamedSharding:
        if shapes.get(path) == leaf.shape:
            return exact[path]
        parts = path.split("/")
        prefixes = ("/".join(parts[:i]) for i in range(len(parts), 0, -1))
        origin = next((prefix for prefix in prefixes if prefix in flat), None)
        if origin is None or leaf.shape[is_stacked(origin) :] != flat[origin].shape[is_stacked(origin) :]:
            return NamedSharding(mesh, P())
        return jax.tree.leaves(named(base_shardings)[origin])[0]  # the layer axis, which may be shorter, is not split

    return jax.tree.unflatten(jax.tree.structure(frozen), [sharding(path, leaf) for path, leaf in paths(frozen)])


def iter_axes(method: Method, trainable: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield (path in the tree, path of the base parameter, axes, array) of every array whose axes are declared."""
    if isinstance(method, Chain):
        for name, link in method.methods:
            for path, *rest in iter_axes(link, trainable[name]):
                yield f"{name}/{path}", *rest  # type: ignore[misc]
        return
    for key, arrays in trainable.items():
        origin = method.axes_of.get(key, key)
        for name, array in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
            if name in method.axes:
                yield f"{key}/{name}".rstrip("/"), split_layer_index(origin)[0], method.axes[name], array


def base_axes(axes: str, shape: tuple[int, ...]) -> list[int | None]:
    """Return, for each letter, the axis (-2 or -1) of a parameter of this shape that it stands for."""
    shorter = -2 if shape[-2] <= shape[-1] else -1
    return [{"D": -2, "F": -1, "M": shorter}.get(letter) for letter in axes]


def _spec(path: str, origin: str, axes: str, array: Any, base: Any, base_shardings: Any) -> P:
    """Return how an array is split; a vector is not: XLA gave wrong sums for one split as the axis reduced over is."""
    flat, stacked = named(base), is_stacked(path)
    if origin not in flat:  # a name without layer indices: any layer has the axes
        origin = {name_and_layers(p)[0]: p for p in flat}.get(origin, "")
    if not origin or len(axes) < 2 or array.ndim != stacked + len(axes):
        return P()
    leaf = flat[origin]
    full = tuple(jax.tree.leaves(named(base_shardings)[origin])[0].spec) + (None,) * leaf.ndim
    split: list[Any] = [None] * stacked
    for axis, n in zip(base_axes(axes, leaf.shape), array.shape[stacked:], strict=True):
        name = full[: leaf.ndim][axis] if axis is not None and leaf.shape[axis] == n else None
        split.append(name if name not in split else None)  # a mesh axis splits one axis of an array
    return P(*split)
