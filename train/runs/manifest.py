"""What a manifest says of the files of its checkpoint."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ... import InputError
from ...atomic import sync, write_whole
from ...model.hf.files import read_json

__all__ = ["describe_files", "file_digest", "find_damage", "read_manifest", "sealed_manifest", "sync", "write_whole"]
_SEAL = "sha256"  # of the rest of the manifest


def sealed_manifest(manifest: dict[str, Any]) -> str:
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
