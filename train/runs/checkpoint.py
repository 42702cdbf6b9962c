"""Checkpoints: Orbax arrays and a manifest, written in the background and complete or absent.

`checkpoints/<step>/` holds one Orbax folder for each item (`trainable/`, `optimizer/`) and `manifest.json`. It is
written as `<step>.partial` and renamed when everything is on the disk, so a folder with a plain number is complete. An
older checkpoint of the same step is not deleted but renamed to `<step>.aside`.

Orbax's own CheckpointManager is not used: it loads flipped bits silently, and a failed asynchronous save can end a
program with exit code 0.
"""

import contextlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from ... import InputError
from ...atomic import atomic_write, sync
from ...model.tree import paths
from .. import faults
from ..cluster import distributed
from ..progress import console
from .arrays import UnreadableArrays, all_processes, lost_parameters, read_item
from .manifest import describe_arrays, describe_files, encode_manifest, find_damage, read_manifest, versions

Verify = Literal["full", "fast", "off"]  # check every digest, the sizes of the files, or the manifest alone


class CheckpointReader:
    """The checkpoints in a folder, for reading."""

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in ascending order."""
        names = (path.parent.name for path in self.folder.glob("*/manifest.json"))
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name, re.ASCII))

    def best(self) -> int | None:
        """Return the step with the lowest score, the later one of equals, or None if no step has a finite score."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(InputError):  # a damaged checkpoint has no score
                score = self.manifest(step).get("score")
                if isinstance(score, int | float) and math.isfinite(score):
                    scores[step] = score
        return min(scores, key=lambda step: (scores[step], -step), default=None)

    def manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest of a step. Raises InputError if it is damaged."""
        return read_manifest(self.folder / str(step) / "manifest.json")

    def damage(self, step: int, verify: str = "full") -> str:
        """Return what is wrong with a checkpoint, by file and parameter, or "".

        verify: `full` reads every file, `fast` compares the sizes, `off` reads the manifest alone. All processes take
        part, each with its share of the files.
        """
        try:
            manifest = self.manifest(step)
        except InputError as error:
            return str(error)
        if verify == "off":
            return ""
        share = (distributed.index(), distributed.count())
        damage = find_damage(self.folder / str(step), manifest.get("files", {}), verify == "full", *share)
        gathered = distributed.barrier_gather("the damage of a checkpoint", json.dumps(damage))
        damage = [line for text in gathered for line in json.loads(text)]
        more = f" and {len(damage) - 1} more files" if len(damage) > 1 else ""
        return f"{damage[0]}{more}{lost_parameters(self.folder / str(step), manifest['leaves'])}" if damage else ""

    def restore(
        self, step: int, item: str, like: Any, each: Callable[[str, Any], Any] | None = None, verify: str = "full"
    ) -> Any:
        """Return an item saved at a step as `read_item` does, with the structure, dtypes and shardings of `like`.

        verify: `full` checks the digest of every array, `fast` the sizes of the files, `off` only the manifest. Raises
        InputError for damage and for another structure.
        """
        leaves = self.manifest(step)["leaves"].get(item, {})
        if damage := self.damage(step, "off" if verify == "off" else "fast"):
            raise InputError(f"{damage}: damaged; {self._remedy(step)}")
        try:
            return read_item(self.folder / str(step) / item, like, leaves, each, check=verify == "full")
        except UnreadableArrays as error:
            why = "damaged" if distributed.count() > 1 else self.damage(step) or "no file of it changed"
            raise InputError(f"{error}; {why}; {self._remedy(step)}") from error

    def _remedy(self, step: int) -> str:
        others = ", ".join(str(s) for s in self.steps() if s != step)
        return "restore that file" + (f", or load another step ({others})" if others else "")


class CheckpointWriter(CheckpointReader):
    """The checkpoints of one run, saved in the background one at a time; the newest `keep` and the best are kept.

    guard: raises InputError if this run may no longer write.
    """

    def __init__(self, folder: Path, keep: int = 2, guard: Callable[[], None] = lambda: None):
        super().__init__(folder)
        self.keep, self.guard = keep, guard
        self._pool = ThreadPoolExecutor(1)
        self._savers: dict[str, ocp.StandardCheckpointer] = {}  # one for each item: items are saved in parallel
        self._pending: tuple[int, Future[None]] | None = None  # the step and result of the save under way

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Wait for the last asynchronous save, however the run ends."""
        try:
            self.close()
        except InputError as error:
            if kind is None:
                raise
            console.print(str(error), soft_wrap=True)  # beside the error that ends the run

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], score: float | None = None) -> None:
        """Start to save {item: pytree} and return when everything is copied from the devices.

        Raises InputError with the reason if this save cannot start or the one before failed.
        """
        self.wait()
        arrays = {item: dict(paths(tree)) for item, tree in items.items()}
        leaves = {item: describe_arrays(flat) for item, flat in arrays.items()}
        manifest = {"step": step, "score": score, **meta, "versions": versions(), "leaves": leaves}
        work = self.folder / f"{step}.partial"
        try:
            if distributed.index() == 0:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                faults.at("save.begin", step)
            distributed.barrier_gather("the folder of a checkpoint")
            for item, flat in arrays.items():
                if item not in self._savers:
                    self._savers[item] = ocp.StandardCheckpointer(multiprocessing_options=all_processes(item))
                self._savers[item].save((work / item).absolute(), flat)
        except Exception as error:
            self._delete(work)
            raise self._save_error(step, error) from error
        self._pending = step, self._pool.submit(self._commit, step, work, manifest)

    def wait(self) -> None:
        """Wait for the save under way. Raises InputError with the reason if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending[1].result()
            except Exception as error:
                raise self._save_error(pending[0], error) from error

    def check(self) -> None:
        """Raise InputError if the save under way has failed already; do not wait for it."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def close(self) -> None:
        """Wait for the save under way, then end the background threads. Raises InputError as `wait` does."""
        try:
            self.wait()
        finally:
            for saver in self._savers.values():
                with contextlib.suppress(Exception):  # `wait` has reported it
                    saver.close()
            self._pool.shutdown()

    def put_aside(self, step: int) -> str:
        """Rename an existing checkpoint of a step; return its new name, or "" if there is none."""
        existing = self.folder / str(step)
        if not existing.exists():
            return ""
        names = (f"{step}.aside" + (f"-{i}" if i > 1 else "") for i in range(1, 10**6))
        return existing.rename(self.folder / next(n for n in names if not (self.folder / n).exists())).name

    def tidy(self) -> None:
        """Delete what killed saves left behind. Only the one writer may do this."""
        for path in self.folder.glob("*.partial"):
            if path.stem.isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def _commit(self, step: int, work: Path, manifest: dict[str, Any]) -> None:
        """Complete a save in the background, without devices: the processes only meet at the coordinator."""
        try:
            for saver in self._savers.values():
                saver.wait_until_finished()
            distributed.barrier_gather("the arrays of a checkpoint")
            faults.at("save.arrays", step)
            share, files = describe_files(work, distributed.index(), distributed.count()), {}
            for text in distributed.barrier_gather("the files of a checkpoint", json.dumps(share)):
                files |= json.loads(text)
            if distributed.index() == 0:
                self._publish(step, work, {**manifest, "files": files})
            distributed.barrier_gather("the manifest of a checkpoint")
        except Exception as error:
            distributed.report_failure(str(self._save_error(step, error)))
            self._delete(work)
            raise

    def _publish(self, step: int, work: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest, give the checkpoint its name, and delete those that need not be kept."""
        for folder in (path for path in work.rglob("*") if path.is_dir()):
            sync(folder)
        atomic_write(work / "manifest.json", encode_manifest(manifest))
        faults.at("save.manifest", step)
        self.guard()
        self.put_aside(step)
        work.rename(self.folder / str(step))
        sync(self.folder)
        faults.at("save.end", step)
        if damage := find_damage(self.folder / str(step), manifest["files"], full=False):
            raise OSError(f"{damage[0]}; no older checkpoint was deleted")
        for old in sorted({*self.steps()} - {*self.steps()[-self.keep :], self.best()}):
            shutil.rmtree((self.folder / str(old)).rename(self.folder / f"{old}.partial"))

    def _save_error(self, step: int, error: Exception) -> InputError:
        """Return an InputError that says why a step was not saved, and which one is the newest."""
        if isinstance(error, InputError):
            return error
        reason, steps = (str(error).splitlines() or [repr(error)])[0][:300], self.steps()
        newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no earlier checkpoint"
        return InputError(
            f"{self.folder / str(step)}: this checkpoint could not be written ({reason}); {newest}; fix the cause "
            "(disk space, permissions), then continue with --resume"
        )

    def _delete(self, work: Path) -> None:
        """Delete what a failed save wrote once nothing writes there any more: it may be what fills the disk."""
        for saver in self._savers.values():
            with contextlib.suppress(Exception):
                saver.wait_until_finished()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tensorstore's tasks would report the error again
        for _ in range(20):  # and they may write for a moment longer
            shutil.rmtree(work, ignore_errors=True)
            time.sleep(0.1)
            if not work.exists():
                break
