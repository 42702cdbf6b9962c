"""Atomic writes: a file or folder appears under its name only when it is complete.

Each is written beside its place under a random name, created exclusively (so no other writer shares it and no existing
link is followed), and then renamed. A killed process leaves that temporary name behind. In a run folder the next writer
deletes it (train/runs/lock.py); elsewhere nothing reads it, and it may be deleted.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import InputError

_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")


def _temporary(path: Path) -> Path:
    """Return an unused temporary name in the folder of `path`."""
    return path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.tmp")


def is_leftover(name: str) -> bool:
    """Return whether a file name is a temporary one, which only a killed writer leaves."""
    return bool(_TEMPORARY.fullmatch(name))


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file that has either its old content or all of the new one, even if the machine stops."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block succeeds, and is deleted when it fails.

    `out` must be missing or empty. Raises InputError if it cannot be written, or if another writer filled it meanwhile.
    """
    temporary = _temporary(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)  # replaces an empty folder
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        hint = "another process wrote there; choose another" if error.filename2 else "choose a writable folder"
        raise InputError(f"{out}: cannot be written ({error.strerror}); {hint}") from None
    sync(out.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
