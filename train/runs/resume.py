"""Resume a run: find a good checkpoint, check that it belongs to this run, restore its state, and save new ones."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...atomic import is_leftover
from ...data.tokenizers.chat import today
from ..cluster import distributed
from ..config import RUNTIME_FIELDS, Run, flatten, from_json, shorten, to_json
from ..config_versions import upgrade
from ..progress import console
from ..setup import TrainSetup
from .checkpoint import CheckpointReader, CheckpointWriter
from .files import LOCK
from .lineage import code_version
from .manifest import describe_sidecars

# What --force lets change -> the fields of config.json that determine it. The digest of the data depends on the
# tokenizer, so the tokenizer comes first.
_FORCIBLE = {
    "tokenizer": ("data.tokenizer", "data.vocab", "base"),
    "data": ("data.", "seed", "date"),
    "base": ("base", "quantize"),
    "method": ("method.",),
    "model": ("model.",),
}
_NOT_DATA = {"data.cache", "data.batch", "data.root"}  # fields of `data` that do not change its rows
_REPORTED = ("optim.", "data.batch", "steps", "accumulate", "dtype", "quantize", "seed")  # may change, with a line


def check_out(run: Run) -> None:
    """Raise InputError if a run must not write into its folder."""
    folder = Path(run.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; give a folder")
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    names = [name for name in names if name != LOCK and not is_leftover(name)]
    if run.resume == "never":
        if names:
            raise InputError(f"--out {folder} is not an empty folder; choose another, or continue with --resume")
        return
    if CheckpointReader(folder / "checkpoints").steps():
        return
    if run.resume != "auto":
        raise InputError(f"--resume {run.resume}: {folder} holds no checkpoint; correct --out, or drop --resume")
    try:
        if names:
            from_json(folder / "config.json")
    except InputError:
        raise InputError(
            f"--resume: {folder} is not empty and holds no run to continue (it has {', '.join(names[:3])}); correct "
            "--out, or choose an empty folder"
        ) from None


def with_date(run: Run) -> Run:
    """Return the run with its date: as configured, else that of the run that it resumes, else today's."""
    checkpoints, date = CheckpointReader(Path(run.out) / "checkpoints"), run.date
    for step in reversed(checkpoints.steps() if run.resume != "never" and not date else []):
        with contextlib.suppress(InputError):  # find_checkpoint reports damage
            date = date or checkpoints.manifest(step).get("config", {}).get("date", "")
    return dataclasses.replace(run, date=distributed.barrier_gather("the date", date or today())[0])


def find_checkpoint(run: Run, checkpoints: CheckpointWriter) -> tuple[int | None, list[int]]:
    """Return (the step to resume from, or None to start anew; the later steps, which must be put aside).

    Reports damaged checkpoints. Raises InputError if --resume finds none that is whole.
    """
    steps = checkpoints.steps()
    distributed.check_agreement("the checkpoint", {"newest checkpoint": max(steps, default=0)})
    if run.resume == "never" or not steps:
        return None, []
    available = f"{checkpoints.folder} has steps {', '.join(map(str, steps))}"
    if run.resume != "auto":
        step = int(run.resume)
        if step not in steps:
            raise InputError(f"--resume {step}: there is no checkpoint of this step; {available}")
        if damage := checkpoints.damage(step, run.verify):
            raise InputError(
                f"--resume {step}: damaged: {damage}; {available}; `--resume auto` takes the newest good one"
            )
        return step, [s for s in steps if s > step]
    damage, damaged = "", []
    for step in reversed(steps):
        damage = checkpoints.damage(step, run.verify)
        if not damage:
            return step, damaged
        console.print(f"step {step} is damaged, resuming from an earlier one: {damage}", soft_wrap=True)
        damaged.append(step)
    raise InputError(
        f"--resume: no checkpoint in {checkpoints.folder} is whole; restore its files, or start anew in another "
        f"--out. Step {steps[0]}: {damage}"
    )


def accepted_changes(setup: TrainSetup, manifest: dict[str, Any]) -> list[str]:
    """Return, in words, what differs from a checkpoint and is allowed by --force.

    Raises InputError for any other change of the tokenizer, data, base, method or model, and for one of the optimizer
    that its saved state does not fit. Other changes are reported.
    """
    run, step, allowed = setup.run, manifest["step"], set(setup.run.force.split(","))
    if manifest["phase"] != run.phase:
        raise InputError(f"--resume: {run.out} holds a {manifest['phase']} run, this is a {run.phase}; correct --out")
    old, new = flatten(upgrade(manifest.get("config", {}))), flatten(json.loads(to_json(run)))
    accepted = []
    for part, fields in _FORCIBLE.items():
        changes = _changes(part, fields, old, new, setup, manifest)
        if not changes:
            continue
        message = f"the {part} changed since step {step}: {', '.join(changes)}"
        if part not in allowed:
            raise InputError(
                f"--resume: {message}; give the values that the run began with, choose a new --out, or --force {part}"
            )
        console.print(f"accepted: {message}", soft_wrap=True)
        accepted.append(message)
    for key, state_kind in (("optim.name", str), ("optim.spike", bool)):  # fields that change what the optimizer keeps
        if key in old and state_kind(old[key]) != state_kind(new[key]):
            raise InputError(
                f"--resume: --{key} {old[key]} -> {new[key]}: the optimizer state of step {step} does not fit that; "
                f"give --{key} {old[key]} again, or choose a new --out"
            )
    reported = [key for key in sorted(set(old) & set(new)) if key.startswith(_REPORTED) and old[key] != new[key]]
    if reported:
        changes = [f"{key} {shorten(old[key])} -> {shorten(new[key])}" for key in reported]
        console.print(f"changed since step {step}: {', '.join(changes)}", soft_wrap=True)
    return accepted


def _changes(
    part: str,
    fields: tuple[str, ...],
    old: dict[str, Any],
    new: dict[str, Any],
    setup: TrainSetup,
    manifest: dict[str, Any],
) -> list[str]:
    """Return what changed of one part of a run. Contents with the digest of the checkpoint are unchanged, whatever
    the fields say."""
    differing = {k for k in {*old, *new} if k.startswith(fields) and old.get(k) != new.get(k)}
    differing -= RUNTIME_FIELDS | _NOT_DATA
    changes = [f"{k} {shorten(old.get(k))} -> {shorten(new.get(k))}" for k in sorted(differing) if old]
    digests = {"data": setup.data_digest, "tokenizer": setup.tokenizer.digest, "base": setup.base_fingerprint}
    if part not in digests:
        return changes
    old_digest, new_digest = manifest.get(part, ""), digests[part]
    if old_digest == new_digest and "quantize" not in differing:
        return []
    sizes = _size_changes(manifest.get("rows", {}), setup.data_sizes) if part == "data" else ""
    return changes or [f"its contents, {sizes}{old_digest[:12]} -> {new_digest[:12]}"]


def _size_changes(old: dict[str, int], new: dict[str, int]) -> str:
    changes = [f"{name} {old[name]:,} -> {n:,}" for name, n in new.items() if name in old and old[name] != n]
    return f"{', '.join(changes)}, " if changes else "the same number of rows but other rows, " if old else ""


class RunSaver:
    """Restores the state of a run from the checkpoint of one step, and saves later ones."""

    def __init__(
        self,
        setup: TrainSetup,
        folder: Path,
        checkpoints: CheckpointWriter,
        step: int | None = None,
        accepted: Sequence[str] = (),
    ):
        self.setup, self.folder, self.checkpoints, self.step = setup, folder, checkpoints, step
        earlier = checkpoints.manifest(step).get("accepted", []) if step is not None else []
        self.accepted = [*earlier, *accepted]
        self.check, self.wait = checkpoints.check, checkpoints.wait

    def restore(self) -> tuple[int, int]:
        """Restore the state of the checkpoint, if there is one. Return (next row, stream digest of earlier rows)."""
        if self.step is None:
            return 0, 0
        setup, manifest, verify = self.setup, self.checkpoints.manifest(self.step), self.setup.run.verify

        def shape(x: Any) -> jax.ShapeDtypeStruct:  # the state of a sweep's trial is on the host, without sharding
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

        shapes = jax.tree.map(shape, setup.state)
        trainable = self.checkpoints.restore(self.step, "trainable", shapes.trainable, verify=verify)
        shapes = shapes._replace(trainable=None)
        has_key = "key" in manifest["leaves"]["optimizer"]  # else saved before states had one: the new state's serves
        if not has_key:
            shapes = shapes._replace(key=None)
        state = self.checkpoints.restore(self.step, "optimizer", shapes, verify=verify)
        setup.state = state._replace(trainable=trainable, key=state.key if has_key else setup.state.key)
        console.print(f"resumed at step {self.step} of {setup.run.steps}")
        return manifest["next_row"], 0 if distributed.index() else int(manifest["rows_digest"], 16)

    @cached_property
    def _constant(self) -> dict[str, Any]:
        """The entries that all manifests of this run share. Reads the files that the run begins with."""
        setup = self.setup
        return {
            "phase": setup.run.phase,
            "config": json.loads(to_json(setup.run)),
            "base": setup.base_fingerprint,
            "tokenizer": setup.tokenizer.digest,
            "data": setup.data_digest,
            "rows": setup.data_sizes,
            "seed": setup.run.seed,
            "code": code_version(),
            "lineage": setup.lineage,
            "added_tokens": setup.untrained_tokens,
            "mesh": list(setup.mesh.devices.shape),
            "accepted": self.accepted,
            "sidecars": describe_sidecars(self.folder, setup.tokenizer),
        }

    def save(self, step: int, next_row: int, stream_digest: int, score: float | None) -> None:
        """Begin to save the state. `stream_digest` is of the rows that this process has read."""
        state = self.setup.state
        digest = sum(int(part) for part in distributed.barrier_gather("the rows of a checkpoint", str(stream_digest)))
        items = {"trainable": state.trainable, "optimizer": state._replace(trainable=None)}
        position = {"next_row": next_row, "rows_digest": f"{digest % 2**256:064x}"}
        self.checkpoints.save(step, items, self._constant | position, score)
