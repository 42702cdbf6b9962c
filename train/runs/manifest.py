"""What a manifest says of the files of its checkpoint."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ... import InputError
from ...atomic import sync
from ...model.hf.files import read_json

_SEAL = "sha256"  # of the rest of the manifest


def encode_manifest(manifest: dict[str, Any]) -> str:
    """manifest.json, with the digest of all that it says."""
    body = {key: value for key, value in manifest.items() if key != _SEAL}
    return json.dumps({**body, _SEAL: _digest(body)}, indent=1) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says. InputError for one that is unreadable, that was changed, or that is of another step."""
    hint = "it is damaged; go on from another step, or delete this one"
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{error}: no manifest of a checkpoint; {hint}") from None
    seal = found.pop(_SEAL, "")
    if not isinstance(found.get("leaves"), dict) or ((seal or "files" in found) and seal != _digest(found)):
        raise InputError(f"{path}: not what was written (its own sha256 differs); {hint}")
    for item, leaves in found["leaves"].items():
        for name, leaf in leaves.items() if isinstance(leaves, dict) else [("", None)]:
            if not _is_leaf(leaf):
                raise InputError(f"{path}: {item}/{name} has no shape, dtype and sha256; {hint}")
    if str(found.get("step")) != path.parent.name:
        raise InputError(f"{path}: of step {found.get('step')}, in the folder of {path.parent.name}; {hint}")
    return found


def _is_leaf(leaf: Any) -> bool:
    """Whether a leaf's description is one: {shape, dtype, sha256}."""
    if not isinstance(leaf, dict) or not isinstance(leaf.get("sha256"), str) or not isinstance(leaf.get("dtype"), str):
        return False
    sizes = leaf.get("shape")
    try:
        jnp.dtype(leaf["dtype"])
    except (TypeError, ValueError, SyntaxError):
        return False
    return isinstance(sizes, list) and all(isinstance(n, int) and 0 <= n < 2**62 for n in sizes)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, part: int = 0, parts: int = 1, names: Iterable[str] = ()) -> dict[str, Any]:
    """{file: size and sha256} of (a part of) the files in a folder, or of those named; they are on the disk then."""
    found = [folder / name for name in names] or folder.rglob("*")
    files = sorted(p for p in found if p.is_file())[part::parts]
    for file in files:
        sync(file)
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_digest(p)} for p in files}


def find_damage(folder: Path, files: dict[str, Any], full: bool, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with (a part of) the files that a manifest names: missing, of another size, or of other bytes."""
    found = []
    for name, said in sorted(files.items())[part::parts]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != said["size"]:
                found.append(f"{path} has {size} bytes, {said['size']} were written")
            elif full and file_digest(path) != said["sha256"]:
                found.append(f"{path} has other bytes than were written (its sha256 differs)")
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} cannot be read ({error.strerror})")
    return found


def fingerprint(params: Any) -> str:
    """sha256 of a base's values and dtypes, the same for stacked and unrolled layers, any sharding, any file split."""
    return fingerprint_of(mark for path, leaf in named(params).items() for mark in leaf_digests(path, leaf))


def leaf_digests(path: str, leaf: Any) -> list[tuple[str, int, str]]:
    """What one parameter gives to the fingerprint: (name, layer, digest) of each layer."""
    name, layers = canonical(path)
    if is_stacked(path):
        first = layers[0] if layers else 0  # of a slice that a method trains
        return [(name, i, array_digest(layer[0])) for i, layer in enumerate(pieces(leaf, 1), first)]
    return [(name, layers[0] if layers else -1, array_digest(leaf))]


def fingerprint_of(marks: Iterable[tuple[str, int, str]]) -> str:
    """The fingerprint of a base from the marks of all its parameters, in any order."""
    return hashlib.sha256(json.dumps(sorted(marks)).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"graftax": __version__, **{name: version(name) for name in names}}


def describe_sidecars(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Size and digest of the files beside the checkpoints that never change."""
    return describe_files(folder, names=sorted({*tokenizer.files, tokenizer.file, "held_out.npz"}))


def check_sidecars(folder: Path, manifest: dict[str, Any], verify: str) -> None:
    """InputError for a tokenizer or held-out rows that are not those of a run's checkpoint."""
    said = dict(manifest.get("sidecars", {})) if verify != "off" else {}
    if "held_out.npz" in said and not (folder / "held_out.npz").exists():
        console.print(f"{folder}/held_out.npz is gone: what is forgotten is not measured", soft_wrap=True)
        del said["held_out.npz"]
    if bad := find_damage(folder, said, verify == "full"):
        raise InputError(f"{bad[0]}: damaged; put it back, or have the run write it anew with --resume")


PIECE_BYTES = 256 << 20  # bytes of an array that are on the host at once


def pieces(x: Any, rows: int = 0) -> Iterator[Any]:
    """An array along its first axis in pieces of `rows`, or of at most PIECE bytes, each whole in every process.

    All processes must take all pieces of an array that lies on several of them: each is gathered by all.
    """
    if not isinstance(x, jax.Array) or not x.ndim or not x.size:
        x = np.asarray(x)
        yield from x.reshape(-1, rows, *x.shape[1:]) if rows else [x]
        return
    if x.is_fully_replicated:
        x = x.addressable_data(0)
    rows = rows or max(PIECE_BYTES * len(x) // x.nbytes, 1)
    if x.is_fully_addressable and x.nbytes <= PIECE_BYTES:
        x, step = np.asarray(x), rows
        yield from (x[i : i + step] for i in range(0, len(x), step))
        return
    for i in range(0, len(x), rows):
        hosts = "host" in (x.sharding.memory_kind or "")  # an optimizer's state may lie there
        yield _cut(getattr(x.sharding, "mesh", None), hosts, min(rows, len(x) - i))(x, i)


@cache
def _cut(mesh: Any, hosts: bool, rows: int) -> Any:
    """x, i -> rows [i, i + rows) of x, on every device."""
    whole = NamedSharding(mesh, P()) if mesh is not None else None

    def cut(x: Any, i: Any) -> Any:
        x = jax.device_put(x, jax.memory.Space.Device) if hosts else x
        return jax.lax.dynamic_slice_in_dim(x, i, rows)

    return jax.jit(cut, out_shardings=whole)


def array_digest(array: Any, mine: bool = True) -> str:
    """sha256 of an array's dtype, shape and bytes, for any sharding; "" if another process computes it."""
    shape = list(np.shape(array))
    found = hashlib.sha256(f"{array.dtype}{shape}".encode())
    for piece in pieces(array):
        if mine:
            found.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        elif isinstance(piece, jax.Array):
            piece.block_until_ready()  # no queue of gathered pieces
    return found.hexdigest() if mine else ""


def array_digests(flat: Mapping[str, Any]) -> dict[str, str]:
    """{path: digest}; each process hashes every n-th leaf."""
    n, me = distributed.count(), distributed.index()
    mine = [array_digest(x, i % n == me) for i, x in enumerate(flat.values())]
    said = [text.split(",") for text in distributed.barrier_gather("digests", ",".join(mine))]
    return {path: said[i % n][i] for i, path in enumerate(flat)}
