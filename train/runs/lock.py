"""One writer for each run folder: a lease file `lock` that names the writer, and is taken over when it is dead.

filelock's SoftFileLease writes the file, refreshes it, and takes over at once from a dead process of this host (known
by pid, start time, boot and container). Added here: a file without a refresh for DEAD seconds by the clock of its own
file system is dead, whoever wrote it, without waiting to watch it; `check` before each save; and the messages.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from ... import InputError
from ...atomic import is_leftover
from ..progress import console
from .files import LOCK

BEAT, DEAD = 15.0, 120.0  # seconds between refreshes, and without one until the writer counts as dead
WAIT = 3.0  # seconds to try: filelock takes over a damaged lock file after it has not changed for 2


class Lock:
    """The right to write into a run folder, from the beginning of a `with` block to its end.

    take_over: take the folder over from a live writer, which then saves nothing more.
    """

    def __init__(self, folder: Path, take_over: bool = False):
        self.folder, self.path, self.take_over = folder, folder / LOCK, take_over
        self._lease = SoftFileLease(
            self.path, lease_duration=DEAD, heartbeat_interval=BEAT, timeout=WAIT, thread_local=False
        )

    def __enter__(self) -> "Lock":
        """Acquire the lock. Raises InputError naming the writer that has it."""
        previous = self._writer() if self.path.exists() else ""
        if self.take_over or self._is_silent():
            self._lease.force_break()
        try:
            self._lease.acquire()
        except (Timeout, LeaseSettingsMismatch):
            raise InputError(
                f"{self.folder}: {self._writer()} is writing here; wait for it or stop it, or choose another --out "
                "(if it is gone: --force lock)"
            ) from None
        if previous:
            console.print(f"{self.path}: taken over from {previous}, which is gone", soft_wrap=True)
        for path in self.folder.iterdir():
            if is_leftover(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.release()

    def check(self) -> None:
        """Raise InputError if another run has taken the folder over: this run must save nothing more."""
        owner = self._lease.owner
        if owner is None or owner.token != self._lease.token:
            writer = self._writer() if self.path.exists() else "nobody (the lock file was deleted)"
            raise InputError(f"{self.folder}: now written by {writer}; this run stops and saves nothing more")

    def _writer(self) -> str:
        """Return the process that the lock file names."""
        owner = self._lease.owner
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "an unknown process"

    def _is_silent(self) -> bool:
        """Return whether the lock file has not been refreshed for DEAD seconds, by the clock of the file system."""
        with contextlib.suppress(FileNotFoundError), tempfile.TemporaryFile(dir=self.folder) as now:
            return os.fstat(now.fileno()).st_mtime - self.path.lstat().st_mtime >= DEAD
        return False
