"""Caches of a user: tokens and compiled programs, in a folder that nobody else can write to.

What lies in a cache is trusted: a compiled program runs. So none is taken from the current folder, which may be
somebody else's repository, and none that another user owns or may write to.
"""

import os
from pathlib import Path

from .progress import console

AUTO = "auto"


def cache_folder(kind: str, given: str = AUTO) -> Path | None:
    """The folder for one kind of thing (`data`, `jax`), or None for no cache; a line says so if it cannot be used.

    given: a folder; `auto`: `graftax/KIND` in XDG_CACHE_HOME or ~/.cache; empty: none.
    """
    if not given:
        return None
    below = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(below if os.path.isabs(below) else os.path.expanduser("~/.cache")) / "graftax"
    folder = home / kind if given == AUTO else Path(given)
    for path in (home, folder) if given == AUTO else (folder,):
        if why := _unusable(path):
            console.print(f"without a cache: {path} {why}", soft_wrap=True)
            return None
    return folder


def _unusable(folder: Path) -> str:
    """Why a folder cannot be a cache; it is made, private, if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        return f"cannot be made ({error.strerror}); name another folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user; name another folder"
    if found.st_mode & 0o022:
        return "can be written to by others; chmod go-w it, once you trust what is in it, or name another folder"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "cannot be read and written; chmod u+rwx it"
