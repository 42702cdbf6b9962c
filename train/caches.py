"""The user's caches of tokens and compiled programs, in a folder that nobody else can write to.

The contents of a cache are trusted: a compiled program runs. So no cache is read from the current folder, which may be
someone else's repository, nor from a folder that another user owns or may write to.
"""

import os
from pathlib import Path

from .progress import console

AUTO = "auto"


def cache_folder(kind: str, setting: str = AUTO) -> Path | None:
    """Return the folder of one kind of cache (`data`, `jax`), or None for no cache; an unusable folder is reported.

    setting: a folder; `auto`: `graftax/KIND` in XDG_CACHE_HOME or ~/.cache; empty: no cache.
    """
    if not setting:
        return None
    parent = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(parent if os.path.isabs(parent) else os.path.expanduser("~/.cache")) / "graftax"
    folder = home / kind if setting == AUTO else Path(setting)
    for path in (home, folder) if setting == AUTO else (folder,):
        if problem := _problem(path):
            console.print(f"without a cache: {path} {problem}", soft_wrap=True)
            return None
    return folder


def _problem(folder: Path) -> str:
    """Create a folder, private, if it does not exist. Return why it cannot be a cache, or ""."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return f"cannot be made ({error.strerror}); name another folder"
    if status.st_uid != os.geteuid():
        return "belongs to another user; name another folder"
    if status.st_mode & 0o022:
        return "can be written to by others; chmod go-w it if you trust its contents, or name another folder"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "cannot be read and written; chmod u+rwx it"
