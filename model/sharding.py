"""The mesh `data x fsdp x tensor x context`, and rules that give every parameter its NamedSharding.

Rows are split over data and fsdp, parameters over fsdp and tensor, and T over context: each device of that axis holds a
contiguous part of T, and attention gathers the keys and values of the other parts.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .. import InputError
from .tree import (
    Rules,
    is_stacked,
    iter_layers,
    match_rules,
    name_and_layers,
    named,
    nested,
    one_value_per_array,
)

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")  # mesh axes of the rows of a batch
STATES = (BATCH, "context", None)  # mesh axes of activations [B, T, D]
KEEP = P.UNCONSTRAINED  # for `constrain`: leave this axis to the compiler

# One mesh axis per matrix axis; the layer axis of a stacked array is never split.
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
    """A mesh of `data x fsdp x tensor (x context)` over all devices; -1 in one place takes what is left.

    Raises InputError if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, n = [int(s) for s in shape], len(devices)
    product = math.prod(s for s in sizes if s != -1)
    label = f"mesh {'x'.join(map(str, sizes))} ({' x '.join(AXES[: len(sizes)])})"
    if len(sizes) not in (3, 4) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise InputError(
            f"{label}: wanted three or four sizes of 1 or more ({' x '.join(AXES)}), one of which may be -1 (the rest)"
        )
    if -1 in sizes and n % product == 0:
        sizes[sizes.index(-1)] = n // product
    if math.prod(sizes) != n:
        raise InputError(f"{label} does not match the {n} device(s) here; the product must be {n}, e.g. {n},1,1")
    sizes += [1] * (len(AXES) - len(sizes))
    if devices[0].platform == "tpu" and n > 1:  # neighbours in the mesh should be neighbours on the chip
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(mesh: Mesh, params: Any, rules: Rules = rules) -> dict[str, Any]:
    """The tree of NamedShardings of a base, from its shapes.

    The arrays of a quantised matrix that have its axes are split like the matrix where they divide; the others are
    replicated. Raises InputError for an axis of a parameter that does not divide over its mesh axis.
    """
    names = {name for _, name, _ in iter_layers(params)}
    used = [(rule, spec) for rule, spec in rules if any(re.fullmatch(rule, name) for name in names)]
    specs = one_value_per_array(match_rules(used, params, what="sharding rule"), "sharding")
    flat = {}
    for path, leaf in named(params).items():
        spec = P(None, *specs[path]) if is_stacked(path) else specs[path]
        _check_divides(path, leaf.shape, spec, mesh)

        def array_sharding(x: Any, spec: P = spec, ndim: int = leaf.ndim) -> NamedSharding:
            axes = [a if n % _shards(a, mesh) == 0 else None for a, n in zip(spec, x.shape, strict=False)]
            return NamedSharding(mesh, P(*axes) if x.ndim == ndim else P())

        flat[path] = jax.tree.map(array_sharding, leaf)
    return nested(flat)


def compute_spec(path: str, rules: Rules = rules) -> tuple[Any, ...]:
    """The mesh axes that a matrix is split over in `x @ w`, which runs after fsdp has gathered it."""
    name, _ = name_and_layers(path)
    spec = next((spec for rule, spec in rules if re.fullmatch(rule, name)), P(None, None))
    return tuple(None if axis == "fsdp" else axis for axis in spec)


def constrain(x: Array, *axes: Any) -> Array:
    """Pin the layout of an activation on the mesh in use (`jax.set_mesh`); without one, or on one device, return x.

    An axis that the mesh does not divide (one row, one token) is replicated.
    """
    mesh = _current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    axes = tuple(a if a is KEEP or n % _shards(a, mesh) == 0 else None for a, n in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, P(*axes))


def _current_mesh() -> Any:
    """The mesh in use, or None if it lacks our axes: the mesh of lanes of a sweep does not split the model."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.shape) else None


def context_shards(T: int) -> int:
    """The number of shards of T positions on the mesh in use: its context axis, if that divides T; otherwise 1."""
    mesh = _current_mesh()
    n = mesh.shape["context"] if mesh is not None else 1
    return n if T % n == 0 else 1


def batch_shards(B: int, T: int) -> int:
    """The number of shards of the tokens of a batch [B, T] on the mesh in use."""
    mesh = _current_mesh()
    rows = 1 if mesh is None else _shards(BATCH, mesh)
    return context_shards(T) * (rows if B % rows == 0 else 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [B, T]: rows over `data` and `fsdp`, positions over `context`."""
    return NamedSharding(mesh, P(BATCH, "context"))


def batch_rows(mesh: Mesh, B: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of a batch [B, T] on this process's devices, those of them that are on no lower-numbered process)."""
    mine, first = np.zeros(B, bool), np.full(B, jax.process_count())
    for device, (rows, _) in batch_sharding(mesh).devices_indices_map((B, mesh.shape["context"])).items():
        first[rows] = np.minimum(first[rows], device.process_index)
        mine[rows] |= device.process_index == jax.process_index()
    return np.flatnonzero(mine), np.flatnonzero(first == jax.process_index())


def put_batch(mesh: Mesh, B: int = 0) -> Callable[[dict[str, Any]], dict[str, Array]]:
    """A function that puts a numpy batch [B, T] on the mesh; given B, it takes only the `batch_rows` of the batch."""
    sharding, local_rows = batch_sharding(mesh), batch_rows(mesh, B)[0] if B else None

    def put(v: np.ndarray) -> Array:
        def shard(index: Any) -> np.ndarray:
            if local_rows is None:
                return v[index]
            rows = range(B)[index[0]]
            start = np.searchsorted(local_rows, rows.start)
            return v[start : start + len(rows), *index[1:]]

        return jax.make_array_from_callback((B or len(v), *v.shape[1:]), sharding, shard)

    return lambda batch: {k: put(np.asarray(v)) for k, v in batch.items()}


def to_host(x: Any) -> np.ndarray:
    """A whole array on the host, in every process; all processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(_replicate(x.sharding.mesh)(x))


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def _shards(axes: Any, mesh: Any) -> int:
    """The number of shards of a dimension that is split over these mesh axes."""
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def _check_divides(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for i, axes in enumerate(spec):
        shards, n = _shards(axes, mesh), shape[i]
        if n % shards:
            name = axes if isinstance(axes, str) else " x ".join(axes)
            sizes = ", ".join(str(k) for k in range(1, min(n, mesh.size) + 1) if n % k == 0)
            rows = -(-n // shards) * shards
            vocabulary = path in ("embed/table", "head/matrix")
            hint = f", or give it {rows} rows: graftax import --resize {rows}" if vocabulary else ""
            raise InputError(
                f"{path} {list(shape)}: dimension {i} of {n} does not divide over {name} = {shards}; "
                f"of {mesh.size} device(s), {name} may have {sizes}{hint}"
            )
