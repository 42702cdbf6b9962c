"""What is on the disk of a run's checkpoints: which are whole, what they say, what is damaged, and their arrays."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ... import InputError
from ...model.tree import name_and_layers, paths
from ..cluster import distributed
from ..progress import console
from . import layout
from .digests import digests
from .manifest import describe_files, find_damage, read_manifest


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
        relaid = set(saved) != set(wanted) and layout.same_values(saved, wanted)
        if not relaid:
            _agree(where, wanted, saved)
        target, flat = layout.like(saved, wanted) if relaid else wanted, {}
        for name in dict.fromkeys(name_and_layers(path)[0] if each else "" for path in wanted):
            these, of = ({p: x for p, x in t.items() if name in ("", name_and_layers(p)[0])} for t in (target, wanted))
            try:
                found = self._read(where, these, leaves, verify == "full")
            except InputError as error:
                why = self.damage(step) or "no file of it changed" if distributed.count() == 1 else "damaged"
                raise InputError(f"{error}; {why}; {self._others(step)}") from error
            found = layout.converted(found, of) if relaid else found
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
        for path, now in digests(found).items() if check else ():
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


def sidecars(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Size and digest of the files beside the checkpoints that never change."""
    return describe_files(folder, names=sorted({*tokenizer.files, tokenizer.file, "held_out.npz"}))


def check_sidecars(folder: Path, manifest: dict[str, Any], verify: str) -> None:
    """InputError for a tokenizer or held-out rows that are not those of a run's checkpoint."""
    said = dict(manifest.get("sidecars", {})) if verify != "off" else {}
    if "held_out.npz" in said and not (folder / "held_out.npz").exists():
        console.print(f"{folder}/held_out.npz is gone: what is forgotten is not measured", soft_wrap=True)
        del said["held_out.npz"]
    if bad := find_damage(folder, said, verify == "full"):
        raise InputError(f"{bad[0]}: damaged; put it back, or have the run write it anew with --resume")
