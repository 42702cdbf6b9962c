"""The arrays of one item of a checkpoint, read by Orbax into the structure, layout and shardings of a target."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ... import InputError
from ...model import layout
from ...model.tree import name_and_layers, paths
from ..cluster import distributed
from .manifest import array_digests


class UnreadableArrays(InputError):
    """Arrays that are damaged on the disk."""


def read_item(
    where: Path, like: Any, leaves: Mapping[str, Any], each: Callable[[str, Any], Any] | None = None, check: bool = True
) -> Any:
    """Return the item saved in a folder, with the structure, dtypes and shardings of `like`.

    Stacked layers become unrolled ones and vice versa. With `each`, one parameter (of all layers) is read at a time,
    and `each(path, array)` replaces it. leaves: {path: {shape, dtype, sha256}} from the manifest. check: compare the
    sha256. Raises UnreadableArrays for damage and InputError for another structure.
    """
    target = {path: _with_sharding(x.shape, x.dtype, getattr(x, "sharding", None)) for path, x in paths(like)}
    source = {path: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"]) for path, x in leaves.items()}
    convert = set(source) != set(target) and layout.same_layers(source, target)
    if convert:
        source = layout.saved_targets(source, target)
    else:
        _check_structure(where, target, source)
        source = target
    result, sources = {}, _by_parameter(source) if each else {"": source}
    for name, part in (_by_parameter(target) if each else {"": target}).items():
        arrays = read_arrays(where, sources[name], leaves, check)
        arrays = layout.convert_arrays(arrays, part) if convert else arrays
        result |= {path: each(path, x) for path, x in arrays.items()} if each else arrays
    return jax.tree.unflatten(jax.tree.structure(like), [result[path] for path in target])


def read_arrays(where: Path, target: Any, leaves: Mapping[str, Any], check: bool = True) -> dict[str, Any]:
    """Return those arrays of an item that `target` names, in their saved layout. Raises UnreadableArrays."""
    restore_args: Any = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args, partial_restore=True)
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(), multiprocessing_options=all_processes(where.name)
        ) as reader:
            arrays = reader.restore(where.absolute(), args=args)
    except Exception as error:
        raise UnreadableArrays(f"{where}: the arrays cannot be read ({str(error).splitlines()[0][:200]})") from error
    for path, digest in array_digests(arrays).items() if check else ():
        if digest != leaves[path]["sha256"]:
            raise UnreadableArrays(f"{where}: {path} is not what was saved (its sha256 differs)")
    return arrays


def lost_parameters(folder: Path, items: Mapping[str, Any], limit: int = 3) -> str:
    """Return, as the end of a sentence, which parameters of a damaged checkpoint cannot be read; "" if several
    processes run, which do not try.

    items: {item: {path: {shape, dtype, sha256}}} from the manifest.
    """
    if distributed.count() > 1:
        return ""
    lost = []
    for item, leaves in items.items():
        for path, leaf in leaves.items():
            try:
                read_arrays(folder / item, {path: _with_sharding(leaf["shape"], leaf["dtype"])}, leaves)
            except UnreadableArrays:
                lost.append(f"{item}/{path}")
    more = f" and {len(lost) - limit} more" if len(lost) > limit else ""
    return f"; lost: {', '.join(lost[:limit])}{more}" if lost else "; all parameters can still be read"


def all_processes(item: str) -> Any:
    """Return Orbax options that name all processes: then its barriers have time limits."""
    everyone = set(range(distributed.count()))
    return ocp.options.MultiprocessingOptions(active_processes=everyone, barrier_sync_key_prefix=item)


def _with_sharding(shape: Any, dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Return a shape with a sharding, by default on the first device."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def _by_parameter(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group {path: leaf} by the parameter's name without layer indices."""
    groups: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.items():
        groups.setdefault(name_and_layers(path)[0], {})[path] = leaf
    return groups


def _check_structure(where: Path, target: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise InputError naming the first leaf in which the saved tree and the target differ."""
    if differing := sorted(set(saved) ^ set(target)):
        verb, n = "has no" if differing[0] in target else "has an unexpected", len(differing)
        raise InputError(
            f"{where}: the checkpoint {verb} {differing[0]} ({n} leaves differ); did the method or the model change?"
        )
    for path, x in target.items():
        y = saved[path]
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise InputError(f"{where}: {path} is {y.dtype}{list(y.shape)}, expected {x.dtype}{list(x.shape)}")
