"""Mesh `data x fsdp x tensor x context`, and rules that give every parameter its NamedSharding.

Rows are split over data and fsdp, parameters over fsdp and tensor, the positions of a row over context: each device
of that axis holds its own stretch of T, and attention gathers the keys and values of the others.
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
from .tree import Rules, name_and_layers, is_stacked, match_rules, named, nested, one_value_per_array

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")  # the axes the rows of a batch are split over
STATES = (BATCH, "context", None)  # of activations [B, T, D]
KEEP = P.UNCONSTRAINED

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
    """A mesh of `data x fsdp x tensor (x context)` devices; -1 in one place takes what is left. All must be used."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, n = [int(s) for s in shape], len(devices)
    known = math.prod(s for s in sizes if s != -1)
    wanted = f"mesh {'x'.join(map(str, sizes))} ({' x '.join(AXES[: len(sizes)])})"
    if len(sizes) not in (3, 4) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise InputError(f"{wanted}: wanted three or four sizes of 1 or more ({' x '.join(AXES)}), one of which may be "
                         "-1 (what is left)")  # fmt: skip
    if -1 in sizes and n % known == 0:
        sizes[sizes.index(-1)] = n // known
    if math.prod(sizes) != n:
        raise InputError(f"{wanted} does not match the {n} device(s) here; the product must be {n}, e.g. {n},1,1")
    sizes += [1] * (len(AXES) - len(sizes))
    torus = devices[0].platform == "tpu" and n > 1  # where neighbours on the mesh should be neighbours on the chip
    near: Any = mesh_utils.create_device_mesh
    laid = near(sizes, devices, allow_split_physical_axes=True) if torus else np.array(devices).reshape(sizes)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(mesh: Mesh, params: Any, rules: Rules = rules) -> dict[str, Any]:
    """The tree of NamedShardings of a base, from its shapes; an axis that does not divide is an error that says so.

    The arrays of a quantised matrix that have its two axes are split as it is, where they divide; the others are whole.
    """
    used = [(rule, spec) for rule, spec in rules if _matches(rule, params)]
    specs = one_value_per_array(match_rules(used, params, what="sharding rule"), "sharding")
    flat = {}
    for path, leaf in named(params).items():
        spec = P(None, *specs[path]) if is_stacked(path) else specs[path]
        _check(path, leaf.shape, spec, mesh)

        def one(x: Any, spec: P = spec, ndim: int = leaf.ndim) -> NamedSharding:
            fits = [a if n % _parts(a, mesh) == 0 else None for a, n in zip(spec, x.shape, strict=False)]
            return NamedSharding(mesh, P(*fits) if x.ndim == ndim else P())

        flat[path] = jax.tree.map(one, leaf)
    return nested(flat)


def compute_spec(path: str, rules: Rules = rules) -> tuple[Any, ...]:
    """The axes of the mesh that a matrix is split over where it multiplies: fsdp gathers it before."""
    spec = next((spec for rule, spec in rules if re.fullmatch(rule, name_and_layers(path)[0])), P(None, None))
    return tuple(None if axis == "fsdp" else axis for axis in spec)


def constrain(x: Array, *axes: Any) -> Array:
    """Pin an activation's layout on the mesh in use (`jax.set_mesh`); without a mesh, or on one device, x itself.

    An axis whose size the mesh does not divide (one row, one token) is left whole.
    """
    mesh = _ours()
    if mesh is None or mesh.size == 1:
        return x
    fits = [a if a is KEEP or n % _parts(a, mesh) == 0 else None for a, n in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*fits))


def _ours() -> Any:
    """The mesh in use (`jax.set_mesh`), if it is of our axes: a sweep's, of lanes, splits nothing of a model."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.shape) else None


def context_shards(T: int) -> int:
    """How many stretches the mesh in use (`jax.set_mesh`) splits T positions into: its context axis, if it divides."""
    mesh = _ours()
    n = mesh.shape["context"] if mesh is not None else 1
    return n if T % n == 0 else 1


def batch_shards(B: int, T: int) -> int:
    """How many parts the mesh in use (`jax.set_mesh`) splits the tokens of a batch [B, T] into."""
    mesh = _ours()
    rows = 1 if mesh is None else _parts(BATCH, mesh)
    return context_shards(T) * (rows if B % rows == 0 else 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch [B, T] with its rows split over `data` and `fsdp`, their positions over `context`."""
    return NamedSharding(mesh, P(BATCH, "context"))


def batch_rows(mesh: Mesh, B: int) -> tuple[np.ndarray, np.ndarray]:
    """(the rows of a batch [B, T] that this process's devices hold, those of them that no process before it holds)."""
    mine, first = np.zeros(B, bool), np.full(B, jax.process_count())
    for device, (rows, _) in batch_sharding(mesh).devices_indices_map((B, mesh.shape["context"])).items():
        first[rows] = np.minimum(first[rows], device.process_index)
        mine[rows] |= device.process_index == jax.process_index()
    return np.flatnonzero(mine), np.flatnonzero(first == jax.process_index())


def put_batch(mesh: Mesh, B: int = 0) -> Callable[[dict[str, Any]], dict[str, Array]]:
    """A function that puts a numpy batch [B, T] on the mesh; given B, it takes the batch's `batch_rows` alone."""
    sharding, held = batch_sharding(mesh), batch_rows(mesh, B)[0] if B else None

    def put(v: np.ndarray) -> Array:
        def part(at: Any) -> np.ndarray:
            if held is None:
                return v[at]
            rows = range(B)[at[0]]
            start = np.searchsorted(held, rows.start)
            return v[start : start + len(rows), *at[1:]]

        return jax.make_array_from_callback((B or len(v), *v.shape[1:]), sharding, part)

    return lambda batch: {k: put(np.asarray(v)) for k, v in batch.items()}


def to_host(x: Any) -> np.ndarray:
    """An array on the host, whole in every process: all of them must ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(_everywhere(x.sharding.mesh)(x))


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def _matches(rule: str, params: Any) -> bool:
    try:
        match_rules([(rule, None)], params, default=None)
    except InputError:
        return False
    return True


def _check(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for i, axes in enumerate(spec):
        parts = _parts(axes, mesh)
        if shape[i] % parts:
            name = axes if isinstance(axes, str) else " x ".join(axes)
            would = ", ".join(str(n) for n in range(1, min(shape[i], mesh.size) + 1) if shape[i] % n == 0)
            raise InputError(
                f"{path} {list(shape)}: dimension {i} of {shape[i]} does not divide over {name} = {parts}; "
                f"of {mesh.size} device(s), {name} may have {would}{_more_rows(path, shape[i], parts)}"
            )


def _parts(axes: Any, mesh: Any) -> int:
    """How many parts a dimension has that is split over these axes."""
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def _more_rows(path: str, V: int, parts: int) -> str:
    """How a vocabulary that does not divide is made to."""
    padded = -(-V // parts) * parts
    return (
        f", or give it {padded} rows: graftax import --resize {padded}"
        if path in ("embed/table", "head/matrix")
        else ""
    )
