"""The manifest of a checkpoint: its contents, their digests, and the damage that these reveal.

`manifest.json` holds the shape, dtype and sha256 of every array, the size and sha256 of every file, and a sha256 of
itself. Array digests do not depend on sharding: arrays are gathered to the host piece by piece, and each process hashes
its share of them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ... import InputError, __version__
from ...atomic import sync
from ...model.hf.files import read_json
from ...model.tree import is_stacked, name_and_layers, named
from ..cluster import distributed
from ..progress import console
from .files import HELD_OUT

_CHECKSUM = "sha256"  # key of the digest of all other entries
PIECE_BYTES = 256 << 20  # size of the part of an array that is on the host at once


def encode_manifest(manifest: dict[str, Any]) -> str:
    """Return the text of manifest.json, with a digest of its own content."""
    content = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of manifest.json.

    Raises InputError for a manifest that is unreadable, that was changed, or that belongs to another step.
    """
    hint = "the checkpoint is damaged; load another step, or delete this one"
    try:
        manifest = read_json(path)
    except InputError as error:
        raise InputError(f"{error}: not the manifest of a checkpoint; {hint}") from None
    checksum = manifest.pop(_CHECKSUM, "")
    required = checksum or "files" in manifest  # the first versions wrote neither
    if not isinstance(manifest.get("leaves"), dict) or (required and checksum != _checksum(manifest)):
        raise InputError(f"{path}: not what was written (its own sha256 differs); {hint}")
    for item, leaves in manifest["leaves"].items():
        for name, leaf in leaves.items() if isinstance(leaves, dict) else [("", None)]:
            if not _describes_array(leaf):
                raise InputError(f"{path}: {item}/{name} has no shape, dtype and sha256; {hint}")
    if str(manifest.get("step")) != path.parent.name:
        raise InputError(f"{path}: of step {manifest.get('step')}, in the folder of {path.parent.name}; {hint}")
    return manifest


def _describes_array(leaf: Any) -> bool:
    """Return whether a value is {shape, dtype, sha256} with a valid shape and dtype."""
    if not isinstance(leaf, dict) or not isinstance(leaf.get("sha256"), str) or not isinstance(leaf.get("dtype"), str):
        return False
    try:
        jnp.dtype(leaf["dtype"])
    except (TypeError, ValueError, SyntaxError):
        return False
    shape = leaf.get("shape")
    return isinstance(shape, list) and all(isinstance(n, int) and 0 <= n < 2**62 for n in shape)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"graftax": __version__, **{name: version(name) for name in names}}


# --- files ---


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, part: int = 0, parts: int = 1, names: Iterable[str] = ()) -> dict[str, Any]:
    """Flush the files of a folder (all, or `names`) to the disk and return {file: {size, sha256}} of one part of
    them; several processes take a part each."""
    candidates = [folder / name for name in names] or folder.rglob("*")
    files = sorted(path for path in candidates if path.is_file())[part::parts]
    for file in files:
        sync(file)
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_digest(p)} for p in files}


def find_damage(folder: Path, files: dict[str, Any], full: bool, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with (one part of) the described files: missing, of another size or, with `full`, of another
    sha256."""
    damage = []
    for name, expected in sorted(files.items())[part::parts]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                damage.append(f"{path} has {size} bytes, {expected['size']} were written")
            elif full and file_digest(path) != expected["sha256"]:
                damage.append(f"{path} has other bytes than were written (its sha256 differs)")
        except FileNotFoundError:
            damage.append(f"{path} is missing")
        except OSError as error:
            damage.append(f"{path} cannot be read ({error.strerror})")
    return damage


def describe_sidecars(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return {file: {size, sha256}} of the files beside the checkpoints that never change."""
    return describe_files(folder, names=sorted({*tokenizer.files, tokenizer.file, HELD_OUT}))


def check_sidecars(folder: Path, manifest: dict[str, Any], verify: str) -> None:
    """Raise InputError for tokenizer files or held-out rows that are not those of the checkpoint."""
    files = dict(manifest.get("sidecars", {})) if verify != "off" else {}
    if HELD_OUT in files and not (folder / HELD_OUT).exists():
        console.print(f"{folder / HELD_OUT} is missing: forgetting cannot be measured", soft_wrap=True)
        del files[HELD_OUT]
    if damage := find_damage(folder, files, verify == "full"):
        raise InputError(f"{damage[0]}: damaged; restore it, or let the run write it again with --resume")


# --- arrays ---


def fingerprint(params: Any) -> str:
    """Return the sha256 of a base's values and dtypes. It is the same for stacked and unrolled layers, for any sharding
    and for any split into files."""
    return fingerprint_of(row for path, leaf in named(params).items() for row in leaf_digests(path, leaf))


def leaf_digests(path: str, leaf: Any) -> list[tuple[str, int, str]]:
    """Return the contribution of one parameter to the fingerprint: (name, layer, digest) for each of its layers."""
    name, layers = name_and_layers(path)
    first = layers[0] if layers else 0 if is_stacked(path) else -1  # -1: outside the layers
    if is_stacked(path):
        return [(name, i, array_digest(layer[0])) for i, layer in enumerate(_pieces(leaf, 1), first)]
    return [(name, first, array_digest(leaf))]


def fingerprint_of(rows: Iterable[tuple[str, int, str]]) -> str:
    """Return the fingerprint of a base from the leaf digests of all its parameters, in any order."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def describe_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return {path: {shape, dtype, sha256}}. All processes take part."""
    sha256 = array_digests(arrays)
    return {p: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": sha256[p]} for p, x in arrays.items()}


def array_digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Return {path: digest}. All processes take part; each hashes every n-th array."""
    n, index = distributed.count(), distributed.index()
    shares = [array_digest(x, i % n == index) for i, x in enumerate(arrays.values())]
    gathered = [text.split(",") for text in distributed.barrier_gather("digests", ",".join(shares))]
    return {path: gathered[i % n][i] for i, path in enumerate(arrays)}


def array_digest(array: Any, compute: bool = True) -> str:
    """Return the sha256 of an array's dtype, shape and bytes, for any sharding.

    Without `compute` this process only takes part in gathering the array, and the result is "".
    """
    sha256 = hashlib.sha256(f"{array.dtype}{list(np.shape(array))}".encode())
    for piece in _pieces(array):
        if compute:
            sha256.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        elif isinstance(piece, jax.Array):
            piece.block_until_ready()  # do not queue up gathered pieces
    return sha256.hexdigest() if compute else ""


def _pieces(x: Any, rows: int = 0) -> Iterator[Any]:
    """Yield an array along its first axis in pieces of `rows`, by default of at most PIECE_BYTES.

    Each piece of an array that is spread over processes is gathered by all of them, so all must take every piece.
    """
    if not isinstance(x, jax.Array) or not x.ndim or not x.size:
        x = np.asarray(x)
        yield from x.reshape(-1, rows, *x.shape[1:]) if rows else [x]
        return
    if x.is_fully_replicated:
        x = x.addressable_data(0)
    rows = rows or max(PIECE_BYTES * len(x) // x.nbytes, 1)
    if x.is_fully_addressable and x.nbytes <= PIECE_BYTES:
        x = np.asarray(x)
        yield from (x[i : i + rows] for i in range(0, len(x), rows))
        return
    on_host = "host" in (x.sharding.memory_kind or "")  # an optimizer state may be kept there
    for i in range(0, len(x), rows):
        yield _gather_rows(getattr(x.sharding, "mesh", None), on_host, min(rows, len(x) - i))(x, i)


@cache
def _gather_rows(mesh: Any, on_host: bool, rows: int) -> Any:
    """Return a compiled function (x, i) -> rows [i, i + rows) of x, replicated on all devices."""

    def gather(x: Any, i: Any) -> Any:
        x = jax.device_put(x, jax.memory.Space.Device) if on_host else x
        return jax.lax.dynamic_slice_in_dim(x, i, rows)

    return jax.jit(gather, out_shardings=NamedSharding(mesh, P()) if mesh is not None else None)
