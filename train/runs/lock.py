"""One writer: a file `lock` in the run directory says who it is; what a dead one left is taken over."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from ... import InputError
from ...atomic import atomic_write, is_leftover
from ..progress import console

LOCK = "lock"
BEAT, DEAD = 15.0, 120.0  # seconds between signs of life, and without one until a writer on another host is dead


def started(pid: int) -> str:
    """When a process of this host began, as the system says it; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    with contextlib.suppress(OSError):  # no Linux
        return subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return ""


def host() -> str:
    """This host, and the container on it: a process number means something there alone."""
    try:
        inside = os.readlink("/proc/self/ns/pid")
    except OSError:
        inside = ""
    return f"{socket.gethostname()} {inside}".strip()


class Lock:
    """Held from `with` to its end; says every BEAT seconds that its holder lives."""

    def __init__(self, folder: Path, take: bool = False):
        self.path, self.take, self.over = folder / LOCK, take, threading.Event()
        pid, key = os.getpid(), secrets.token_hex(8)  # two runs of one process are two writers
        self.mine = {"pid": pid, "host": host(), "started": started(pid), "key": key, "since": time.strftime("%F %T")}

    def __enter__(self) -> "Lock":
        """InputError naming the holder, if it lives."""
        with _exclusive(self.path.parent):
            there = self._read()
            if there and not self.take and self._lives(there):
                raise InputError(
                    f"{self.path.parent}: {_who(there)} writes here; wait for it or stop it, or take another --out "
                    f"(if it is gone: --force lock)"
                )
            if there:
                console.print(f"{self.path}: taken over from {_who(there)}, which is gone", soft_wrap=True)
            for path in filter(lambda path: is_leftover(path.name), self.path.parent.iterdir()):  # by killed writers
                with contextlib.suppress(OSError):
                    path.unlink()
            atomic_write(self.path, json.dumps(self.mine) + "\n")
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            if self._read().get("key") == self.mine["key"]:
                self.path.unlink()

    def check(self) -> None:
        """InputError if another run took the lock over: this one must write no more."""
        there = self._read()
        if there.get("key") != self.mine["key"]:
            who = _who(there) if there else "nobody: the lock was deleted"
            raise InputError(f"{self.path.parent}: now written by {who}; this run stops, and saves nothing more")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text("utf-8"))
            return found if isinstance(found, dict) else {"pid": 0}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            return {"pid": 0}  # not ours, or damaged: nobody that could live

    def _lives(self, there: dict[str, Any]) -> bool:
        if there.get("host") == self.mine["host"]:
            return bool(there.get("pid")) and started(int(there["pid"])) == there.get("started") != ""
        with tempfile.TemporaryFile(dir=self.path.parent) as now:  # by the clock of the file system
            age = os.fstat(now.fileno()).st_mtime - self.path.stat().st_mtime
        return "host" in there and age < DEAD

    def _beat(self) -> None:
        while not self.over.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._read().get("key") == self.mine["key"]:
                    os.utime(self.path)


def _who(there: dict[str, Any]) -> str:
    on = str(there.get("host", "?")).partition(" ")[0]
    return f"process {there.get('pid', '?')} on {on} (since {there.get('since', '?')})"


@contextlib.contextmanager
def _exclusive(folder: Path) -> Any:
    """Nobody else judges the lock meanwhile, where the file system can see to it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
