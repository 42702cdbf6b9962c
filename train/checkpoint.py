"""Checkpoints: Orbax arrays, and a manifest with a digest of every leaf, written last. No manifest, no checkpoint.

`checkpoints/<step>/` holds one Orbax folder an item (`trainable/`, `optimizer/`) and `manifest.json`. It is made under
a temporary name and renamed when complete, so a folder with a plain number is whole.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from .. import InputError, __version__
from ..model.tree import canonical, is_stacked, named, paths


def digest(array: Any) -> str:
    """sha256 of an array's dtype, shape and bytes."""
    array = np.asarray(array)
    head = f"{array.dtype}{list(array.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def fingerprint(params: Any) -> str:
    """sha256 of a base's values and dtypes, the same for stacked and unrolled layers, any sharding, any file split."""
    parts = []
    for path, leaf in named(params).items():
        name, layers = canonical(path)
        array = np.asarray(leaf)
        if is_stacked(path):
            parts += [(name, i, digest(layer)) for i, layer in enumerate(array)]
        else:
            parts.append((name, layers[0] if layers else -1, digest(array)))
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"graftax": __version__, **{name: version(name) for name in names}}


class Checkpoints:
    """The checkpoints of one run: saved in the background, one at a time, the newest `keep` and the best kept."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self._savers: dict[str, ocp.StandardCheckpointer] = {}  # one an item: they write side by side
        self._pool, self._pending = ThreadPoolExecutor(1), None

    _pending: Future[None] | None

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, oldest first."""
        found = self.folder.glob("*/manifest.json") if self.folder.exists() else []
        return sorted(int(p.parent.name) for p in found if p.parent.name.isdigit())

    def best(self) -> int | None:
        """The step with the lowest score, if any has one."""
        scores = {s: score for s in self.steps() if (score := self.manifest(s).get("score")) is not None}
        return min(scores, key=lambda s: (scores[s], -s)) if scores else None

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], score: float | None = None) -> None:
        """Begin to save {item: pytree}; returns when all is copied from the devices.

        Raises InputError with the reason if the save before failed.
        """
        self.wait()
        flat = {item: dict(paths(tree)) for item, tree in items.items()}
        leaves = {item: {path: _described(x) for path, x in leaf.items()} for item, leaf in flat.items()}
        manifest = {"step": step, "score": score, **meta, "versions": versions(), "leaves": leaves}
        work = self.folder / f"{step}.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for item, tree in flat.items():
            self._saver(item).save((work / item).absolute(), tree)
        self._pending = self._pool.submit(self._commit, step, work, manifest)

    def _saver(self, item: str) -> ocp.StandardCheckpointer:
        return self._savers.setdefault(item, ocp.StandardCheckpointer())

    def wait(self) -> None:
        """Until the save under way is a fact; raises InputError with the reason if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise InputError(f"{self.folder}: a checkpoint could not be written ({error})") from error

    def close(self) -> None:
        """Wait, then end the background threads."""
        self.wait()
        for saver in self._savers.values():
            saver.close()
        self._pool.shutdown()

    def manifest(self, step: int) -> dict[str, Any]:
        """What is written about a checkpoint."""
        path = self.folder / str(step) / "manifest.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable manifest ({error}); delete that checkpoint") from None

    def restore(self, step: int, item: str, like: Any) -> Any:
        """An item saved at a step, with the structure, dtypes and shardings of `like`; every digest is checked."""
        where, wanted = self.folder / str(step) / item, paths(like)
        leaves = self.manifest(step)["leaves"].get(item, {})
        _agree(where, dict(wanted), leaves)
        target = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)) for path, x in wanted}
        try:
            flat = self._saver(item).restore(where.absolute(), target)
        except Exception as error:
            raise InputError(f"{where}: the arrays cannot be read ({str(error).splitlines()[0]})") from error
        for path, x in flat.items():
            if digest(x) != leaves[path]["sha256"]:
                raise InputError(f"{where}: {path} is not what was saved (its sha256 differs): the file is damaged")
        return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path, _ in wanted])

    def _commit(self, step: int, work: Path, manifest: dict[str, Any]) -> None:
        for saver in self._savers.values():
            saver.wait_until_finished()
        with open(work / "manifest.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        final = self.folder / str(step)
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        kept = {*self.steps()[-self.keep :], self.best()}
        for old in self.steps():
            if old not in kept:
                shutil.rmtree(self.folder / str(old))


def _described(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": digest(x)}


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
        got = (tuple(saved[path]["shape"]), saved[path]["dtype"])
        if got != (tuple(x.shape), str(x.dtype)):
            raise InputError(f"{where}: {path} is {got[1]}{list(got[0])}, wanted {x.dtype}{list(x.shape)}")
