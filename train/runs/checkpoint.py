"""Checkpoints: Orbax arrays, and a manifest with a digest of every leaf, written last. No manifest, no checkpoint.

`checkpoints/<step>/` holds one Orbax folder an item (`trainable/`, `optimizer/`) and `manifest.json`. It is made under
the name `<step>.partial` and renamed when all of it is on the disk, so a folder with a plain number is whole. What must
make way for another is never deleted, but becomes `<step>.aside`.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ... import InputError, __version__
from ...model.tree import is_stacked, name_and_layers, named, paths
from .. import faults
from ..cluster import distributed
from ..progress import console
from .checkpoint_reader import CheckpointReader
from .digests import digest, digests, pieces
from .manifest import describe_files, find_damage, sealed_manifest, sync, write_whole


def fingerprint(params: Any) -> str:
    """sha256 of a base's values and dtypes, the same for stacked and unrolled layers, any sharding, any file split."""
    return fingerprint_of(mark for path, leaf in named(params).items() for mark in leaf_digests(path, leaf))


def leaf_digests(path: str, leaf: Any) -> list[tuple[str, int, str]]:
    """What one parameter gives to the fingerprint: (name, layer, digest) of each layer."""
    name, layers = name_and_layers(path)
    if is_stacked(path):
        first = layers[0] if layers else 0  # of a slice that a method trains
        return [(name, i, digest(layer[0])) for i, layer in enumerate(pieces(leaf, 1), first)]
    return [(name, layers[0] if layers else -1, digest(leaf))]


def fingerprint_of(marks: Iterable[tuple[str, int, str]]) -> str:
    """The fingerprint of a base from the marks of all its parameters, in any order."""
    return hashlib.sha256(json.dumps(sorted(marks)).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"graftax": __version__, **{name: version(name) for name in names}}


class CheckpointWriter(CheckpointReader):
    """The checkpoints of one run: saved in the background, one at a time, the newest `keep` and the best kept."""

    def __init__(self, folder: Path, keep: int = 2, guard: Callable[[], None] = lambda: None):
        super().__init__(folder)
        self.keep, self.guard = keep, guard  # guard() raises if this run may write no more
        self._pool, self._pending = ThreadPoolExecutor(1), None

    _pending: Future[None] | None
    _step = 0  # of the save under way

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """However a run ends, its last save is a fact then."""
        try:
            self.close()
        except InputError as error:
            if kind is None:
                raise
            console.print(str(error), soft_wrap=True)  # and what is being raised

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], score: float | None = None) -> None:
        """Begin to save {item: pytree}; returns when all is copied from the devices.

        Raises InputError with the reason if the save before failed.
        """
        self.wait()
        flat = {item: dict(paths(tree)) for item, tree in items.items()}
        leaves = {item: _described(leaf) for item, leaf in flat.items()}
        manifest = {"step": step, "score": score, **meta, "versions": versions(), "leaves": leaves}
        work = self.folder / f"{step}.partial"
        try:
            if distributed.index() == 0:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                faults.at("save.begin", step)
            distributed.barrier_gather("the folder of a checkpoint")
            for item, tree in flat.items():
                self._saver(item).save((work / item).absolute(), tree)
        except Exception as error:
            self._drop(work)
            raise self._unwritten(step, error) from error
        self._step, self._pending = step, self._pool.submit(self._commit, step, work, manifest)

    def wait(self) -> None:
        """Until the save under way is a fact; raises InputError with the reason if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise self._unwritten(self._step, error) from error

    def check(self) -> None:
        """Raises InputError with the reason if the save under way has failed already; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _unwritten(self, step: int, error: Exception) -> InputError:
        if isinstance(error, InputError):
            return error
        reason, left = (str(error).splitlines() or [repr(error)])[0][:300], self.steps()
        have = f"the newest one is of step {left[-1]}" if left else "none was written before"
        return InputError(
            f"{self.folder / str(step)}: this checkpoint could not be written ({reason}); {have}; "
            "mend that (room, permissions), then go on with --resume"
        )

    def close(self) -> None:
        """Wait, then end the background threads; raises InputError as `wait` does."""
        try:
            self.wait()
        finally:
            for saver in self._savers.values():
                with contextlib.suppress(Exception):  # it said so before
                    saver.close()
            self._pool.shutdown()

    def _commit(self, step: int, work: Path, manifest: dict[str, Any]) -> None:
        """In the background: no device may take part here, the processes meet at the coordinator alone."""
        try:
            for saver in self._savers.values():
                saver.wait_until_finished()
            distributed.barrier_gather("the arrays of a checkpoint")
            faults.at("save.arrays", step)
            mine, files = describe_files(work, distributed.index(), distributed.count()), {}
            for said in distributed.barrier_gather("the files of a checkpoint", json.dumps(mine)):
                files |= json.loads(said)
            if distributed.index() == 0:
                self._finish(step, work, {**manifest, "files": files})
            distributed.barrier_gather("the manifest of a checkpoint")
        except Exception as error:
            distributed.report_failure(str(self._unwritten(step, error)))
            self._drop(work)
            raise

    def _drop(self, work: Path) -> None:
        """Delete what a failed save wrote, when nothing writes there any more: it may be what fills the disk."""
        for saver in self._savers.values():
            with contextlib.suppress(Exception):
                saver.wait_until_finished()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tensorstore's tasks would say it again
        for _ in range(20):  # and go on for a moment
            shutil.rmtree(work, ignore_errors=True)
            time.sleep(0.1)
            if not work.exists():
                break

    def _finish(self, step: int, work: Path, manifest: dict[str, Any]) -> None:
        for inner in (p for p in work.rglob("*") if p.is_dir()):
            sync(inner)
        write_whole(work / "manifest.json", sealed_manifest(manifest))
        faults.at("save.manifest", step)
        self.guard()
        self.put_aside(step)
        work.rename(self.folder / str(step))
        sync(self.folder)
        faults.at("save.end", step)
        if wrong := find_damage(self.folder / str(step), manifest["files"], full=False):
            raise OSError(f"{wrong[0]}; no older one was deleted")
        kept = {*self.steps()[-self.keep :], self.best()}
        for old in self.steps():
            if old not in kept:  # at no moment half a checkpoint
                shutil.rmtree((self.folder / str(old)).rename(self.folder / f"{old}.partial"))

    def put_aside(self, step: int) -> str:
        """Rename what stands where this step's checkpoint goes; returns its new name, or "" if nothing did."""
        there = self.folder / str(step)
        if not there.exists():
            return ""
        names = (f"{step}.aside" + (f"-{i}" if i > 1 else "") for i in range(1, 10**6))
        return there.rename(self.folder / next(n for n in names if not (self.folder / n).exists())).name

    def tidy(self) -> None:
        """Delete what killed saves left; for the one writer alone."""
        for left in self.folder.glob("*.partial"):
            if left.stem.isdecimal():
                shutil.rmtree(left, ignore_errors=True)


def _described(flat: dict[str, Any]) -> dict[str, Any]:
    found = digests(flat)
    return {path: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": found[path]} for path, x in flat.items()}
