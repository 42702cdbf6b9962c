"""Mesh `data x fsdp x tensor`, and rules that give every parameter its NamedSharding."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .. import InputError
from .tree import Rules, is_stacked, match, named, nested, paths, uniform

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes a batch is split over

# One value per matrix axis; the layer axis of a stacked array is never split.
rules: Rules = [
    ("embed/table", P("tensor", "fsdp")),
    ("embed/positions", P(None, "fsdp")),
    ("layers/attn/(qkv|[qkv])", P("fsdp", "tensor")),
    ("layers/attn/o", P("tensor", "fsdp")),
    ("layers/mlp/(gate|up)", P("fsdp", "tensor")),
    ("layers/mlp/down", P("tensor", "fsdp")),
    ("head/matrix", P("fsdp", "tensor")),
    (".*(norm/scale|bias)", P()),
]


def make_mesh(shape: Sequence[int] = (1, 1, 1), devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data x fsdp x tensor` devices; -1 in one place takes what is left. All devices must be used."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, n = [int(s) for s in shape], len(devices)
    known = math.prod(s for s in sizes if s != -1)
    wanted = f"mesh {'x'.join(map(str, sizes))} (data x fsdp x tensor)"
    if len(sizes) != 3 or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise InputError(f"{wanted}: wanted three sizes of 1 or more, one of which may be -1 (what is left)")
    if -1 in sizes and n % known == 0:
        sizes[sizes.index(-1)] = n // known
    if math.prod(sizes) != n:
        raise InputError(f"{wanted} does not match the {n} device(s) here; the product must be {n}, e.g. {n},1,1")
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, params: Any, rules: Rules = rules) -> dict[str, Any]:
    """The tree of NamedShardings of a base, from its shapes; an axis that does not divide is an error that says so."""
    used = [(rule, spec) for rule, spec in rules if _matches(rule, params)]
    specs = uniform(match(used, params, what="sharding rule"), "sharding")
    flat = {}
    for path, leaf in named(params).items():
        spec = P(None, *specs[path]) if is_stacked(path) else specs[path]
        _check(path, leaf.shape, spec, mesh)
        flat[path] = NamedSharding(mesh, spec)
    return nested(flat)


def follow(mesh: Mesh, make: Callable[[Any], Any], base: Any, base_shardings: Any) -> Any:
    """Shardings for the tree `make(base)`: an axis that is an axis of a base parameter is split as that one is.

    Which axis is which shows when every axis of the base has a length of its own: a LoRA `a` [L, D, R] follows the
    input axis of its matrix, `b` [L, R, F] the output axis. The rest, and vectors, are not split. A wrong guess is not
    only slow: XLA has given wrong sums for a vector split over the axis that its matrix was reduced over.
    """
    tree, lengths = jax.eval_shape(make, base), itertools.count(100_003)
    axis_of: dict[int, Any] = {}  # a length in the probe -> (how that axis is split, its length in the base)
    probe = {}
    for path, leaf in named(base).items():
        stacked = is_stacked(path)
        shape = tuple(n if stacked and i == 0 else next(lengths) for i, n in enumerate(leaf.shape))
        spec = tuple(named(base_shardings)[path].spec) + (None,) * leaf.ndim
        axis_of |= {p: (s, n) for p, s, n in zip(shape[stacked:], spec[stacked:], leaf.shape[stacked:], strict=False)}
        probe[path] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    try:
        probed = dict(paths(jax.eval_shape(make, nested(probe))))
    except InputError:  # a method that needs lengths that divide
        probed = {}

    def one(path: str, leaf: Any) -> NamedSharding:
        shape = probed[path].shape if path in probed else ()  # a method may do otherwise at other lengths
        if leaf.ndim - is_stacked(path) < 2 or len(shape) != leaf.ndim:
            return NamedSharding(mesh, P())
        found = [axis_of.get(p, (None, n)) for p, n in zip(shape, leaf.shape, strict=True)]
        axes = [spec if real == n else None for (spec, real), n in zip(found, leaf.shape, strict=True)]
        return NamedSharding(mesh, P(*(a if a not in axes[:i] else None for i, a in enumerate(axes))))

    return jax.tree.unflatten(jax.tree.structure(tree), [one(path, leaf) for path, leaf in paths(tree)])


def constrain(x: Array, *axes: Any) -> Array:
    """Pin an activation's layout on the mesh in use (`jax.set_mesh`); without a mesh, or on one device, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch [B, ...] split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def put_batch(mesh: Mesh) -> Callable[[dict[str, Any]], dict[str, Array]]:
    """A function that puts a numpy batch [B, ...] on the mesh.

    In a run of several processes each gives its own rows of the global batch.
    """
    sharding = batch_sharding(mesh)
    return lambda batch: {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _matches(rule: str, params: Any) -> bool:
    try:
        match([(rule, None)], params, default=None)
    except InputError:
        return False
    return True


def _check(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for i, axes in enumerate(spec):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[a] for a in names)
        if shape[i] % parts:
            raise InputError(
                f"{path} {list(shape)}: dimension {i} of {shape[i]} does not divide over {'x'.join(names)} = {parts}; "
                f"take a mesh size that divides {shape[i]}{_more_rows(path, shape[i], parts)}"
            )


def _more_rows(path: str, V: int, parts: int) -> str:
    """How a vocabulary that does not divide is made to."""
    padded = -(-V // parts) * parts
    return (
        f", or give it {padded} rows: graftax import --resize {padded}"
        if path in ("embed/table", "head/matrix")
        else ""
    )
