"""Files and folders that are whole or not there: written beside their place under a name of their own, then renamed.

The name is random and is made exclusively, so that two writers never share it and no link that stands there is
followed. A process that is killed leaves it; in a run directory the next writer deletes it (train/lock.py), elsewhere
nothing reads it, and it may be deleted.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import InputError

_LEFT = re.compile(r".+\.[0-9a-f]{16}\.tmp")


def _beside(path: Path) -> Path:
    """A name beside a path's, which nobody else has."""
    return path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.tmp")


def is_leftover(name: str) -> bool:
    """Whether a name is one that a killed writer left."""
    return bool(_LEFT.fullmatch(name))


def atomic_write(path: Path, data: bytes | str) -> None:
    """A file that has its old content or all of the new one, whenever the machine stops."""
    made = _beside(path)
    try:
        with open(made, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder that is `out` when the block has gone well, `out` being empty or not there; else nothing is left.

    InputError if it cannot be written, or another writer filled `out` meanwhile.
    """
    made = _beside(out)
    try:
        made.mkdir(parents=True)
        yield made
        made.rename(out)  # takes the place of an empty folder
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        hint = "another process wrote there; take another" if error.filename2 else "give a folder that can, with room"
        raise InputError(f"{out}: cannot be written ({error.strerror}); {hint}") from None
    sync(out.parent)


def sync(path: Path) -> None:
    """To the disk: a file, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
