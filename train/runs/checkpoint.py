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
from ...model.tree import canonical, is_stacked, named, paths
from ..cluster import distributed
from .. import faults
from ...atomic import sync, atomic_write
from .manifest import find_damage, describe_files, encode_manifest
from .manifest import array_digest, array_digests, pieces
from ..progress import console
from .checkpoint import CheckpointReader










class CheckpointReader:
    """The checkpoints in a folder, to be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._savers: dict[str, ocp.StandardCheckpointer] = {}  # one an item: they write side by side

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, oldest first."""
        found = self.folder.glob("*/manifest.json") if self.folder.exists() else []
        return sorted(int(p.parent.name) for p in found if re.fullmatch("0|[1-9][0-9]*", p.parent.name, re.ASCII))

    def best(self) -> int | None:
        """The step with the lowest score, if any has a finite one."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(InputError):  # a damaged one has none
                scores[step] = self.manifest(step).get("score")
        scores = {step: x for step, x in scores.items() if isinstance(x, int | float) and math.isfinite(x)}
        return min(scores, key=lambda s: (scores[s], -s)) if scores else None

    def manifest(self, step: int) -> dict[str, Any]:
        """What is written about a checkpoint."""
        return read_manifest(self.folder / str(step) / "manifest.json")

    def damage(self, step: int, verify: str = "full") -> str:
        """What is wrong with a checkpoint, by file and parameter, or "". verify: `full` reads every file, `fast` looks
        at their sizes, `off` at the manifest alone. All processes take part, each with its files."""
        found, n, me = [], distributed.count(), distributed.index()
        try:
            manifest = self.manifest(step)
        except InputError as error:
            return str(error)
        if verify != "off":
            mine = find_damage(self.folder / str(step), manifest.get("files", {}), verify == "full", me, n)
            for said in distributed.barrier_gather("the damage of a checkpoint", json.dumps(mine)):
                found += json.loads(said)
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        return f"{found[0]}{more}{self._lost(step, manifest)}" if found else ""

    def _lost(self, step: int, manifest: dict[str, Any], most: int = 3) -> str:
        """The parameters that cannot be read any more, by reading each."""
        if distributed.count() > 1:
            return ""
        lost = []
        for item, leaves in manifest["leaves"].items():
            for path, x in leaves.items():
                one = jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"], sharding=_sharding(None))
                try:
                    self._read(self.folder / str(step) / item, {path: one}, {**leaves, "": {}})
                except InputError:
                    lost.append(f"{item}/{path}")
        more = f" and {len(lost) - most} more" if len(lost) > most else ""
        return f"; lost: {', '.join(lost[:most])}{more}" if lost else "; all parameters can still be read"

    def restore(
        self, step: int, item: str, like: Any, each: Callable[[str, Any], Any] | None = None, verify: str = "full"
    ) -> Any:
        """An item saved at a step, with the structure, dtypes and shardings of `like`. verify: `full` checks the
        digest of every array, `fast` the files' sizes.

        Stacked layers are restored into unrolled ones and the other way round. With `each`, one parameter (of all
        layers) is read at a time, and each(path, array) is kept in place of the array.
        """
        where, wanted = self.folder / str(step) / item, dict(paths(like))
        leaves = self.manifest(step)["leaves"].get(item, {})
        if bad := self.damage(step, "fast" if verify != "off" else "off"):
            raise InputError(f"{bad}: damaged; {self._others(step)}")
        saved = {path: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"]) for path, x in leaves.items()}
        wanted = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)) for path, x in wanted.items()}
        relaid = set(saved) != set(wanted) and layout.same_layers(saved, wanted)
        if not relaid:
            _agree(where, wanted, saved)
        target, flat = layout.saved_targets(saved, wanted) if relaid else wanted, {}
        for name in dict.fromkeys(canonical(path)[0] if each else "" for path in wanted):
            these, of = ({p: x for p, x in t.items() if name in ("", canonical(p)[0])} for t in (target, wanted))
            try:
                found = self._read(where, these, leaves, verify == "full")
            except InputError as error:
                why = self.damage(step) or "no file of it changed" if distributed.count() == 1 else "damaged"
                raise InputError(f"{error}; {why}; {self._others(step)}") from error
            found = layout.convert_arrays(found, of) if relaid else found
            flat |= {p: each(p, x) for p, x in found.items()} if each else found
        return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in wanted])

    def _others(self, step: int) -> str:
        left = ", ".join(str(s) for s in self.steps() if s != step)
        return f"put that file back, or take another step ({left})" if left else "put that file back"

    def _read(self, where: Path, target: Any, leaves: Any, check: bool = True) -> dict[str, Any]:
        """The arrays of an item that `target` wants, all of them or some, as they were saved."""
        try:
            if set(target) == set(leaves):
                found = self._saver(where.name).restore(where.absolute(), target)
            else:
                how: Any = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(target, how, partial_restore=True)
                reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_together(where.name))
                found = reader.restore(where.absolute(), args=args)
        except Exception as error:
            raise InputError(f"{where}: the arrays cannot be read ({str(error).splitlines()[0][:200]})") from error
        for path, now in array_digests(found).items() if check else ():
            if now != leaves[path]["sha256"]:
                raise InputError(f"{where}: {path} is not what was saved (its sha256 differs)")
        return found

    def _saver(self, item: str) -> ocp.StandardCheckpointer:
        if item not in self._savers:
            self._savers[item] = ocp.StandardCheckpointer(multiprocessing_options=_together(item))
        return self._savers[item]


def _together(item: str) -> Any:
    """All processes take part; said, Orbax's barriers have time limits."""
    everyone = set(range(distributed.count()))
    return ocp.options.MultiprocessingOptions(active_processes=everyone, barrier_sync_key_prefix=item)


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _agree(where: Path, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise InputError naming the first leaf that the saved tree and the wanted one do not share."""
    if extra := sorted(set(saved) ^ set(wanted)):
        side = "has no" if extra[0] in wanted else "has an unexpected"
        raise InputError(
            f"{where}: the checkpoint {side} {extra[0]} ({len(extra)} leaves differ); method or model changed?"
        )
    for path, x in wanted.items():
        got = saved[path]
        if (got.shape, got.dtype) != (x.shape, x.dtype):
            raise InputError(f"{where}: {path} is {got.dtype}{list(got.shape)}, wanted {x.dtype}{list(x.shape)}")


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
        atomic_write(work / "manifest.json", encode_manifest(manifest))
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
    found = array_digests(flat)
    return {path: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": found[path]} for path, x in flat.items()}
