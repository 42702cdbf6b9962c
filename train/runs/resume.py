"""Going on: which checkpoint is good, whether it is of this run, and the run's state from it."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...atomic import is_leftover
from ...data.tokenizers.chat import today
from ..cluster import distributed
from ..config import RUNTIME_FIELDS, Run, flatten, from_json, short, to_json
from ..progress import console
from ..setup import TrainSetup
from .checkpoint import CheckpointReader, CheckpointWriter
from .files import LOCK

# What --accept lets change -> the fields of config.json that it is made of.
_PARTS = {
    "tokenizer": ("data.tokenizer", "data.vocab", "base"),  # before the data, whose digest has it in it
    "data": ("data.", "seed", "date"),
    "base": ("base", "quantize"),
    "method": ("method.",),
    "model": ("model.",),
}
_ELSEWHERE = {"data.cache", "data.batch", "data.root"}  # fields of `data` that are not what the rows are
_SAID = ("optim.", "data.batch", "steps", "accumulate", "dtype", "quantize", "seed")  # may change, but is said


def check_out(run: Run) -> None:
    """InputError for a folder that this run must not write into."""
    folder = Path(run.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; give a folder")
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    held = [name for name in there if name != LOCK and not is_leftover(name)]
    if run.resume == "never":
        if held:
            raise InputError(f"--out {folder} is not an empty folder; take another, or go on with --resume")
        return
    if CheckpointWriter(folder / "checkpoints").steps():
        return
    if run.resume != "auto":
        raise InputError(f"--resume {run.resume}: {folder} holds no checkpoint; correct --out, or drop --resume")
    try:
        if held:
            from_json(folder / "config.json")
    except InputError:
        raise InputError(
            f"--resume: {folder} is not empty and holds no run to go on with (it has {', '.join(held[:3])}); correct "
            "--out, or take an empty folder"
        ) from None


def dated(run: Run) -> Run:
    """The run with its date: the one given, that of the run in `out` which it goes on with, or today's."""
    checkpoints, date = CheckpointReader(Path(run.out) / "checkpoints"), run.date
    for step in reversed(checkpoints.steps() if run.resume != "never" and not date else []):
        with contextlib.suppress(InputError):  # a damaged one, which `find` says
            date = date or checkpoints.manifest(step).get("config", {}).get("date", "")
    return dataclasses.replace(run, date=distributed.barrier_gather("the date", date or today())[0])


def find(run: Run, checkpoints: CheckpointWriter) -> tuple[int | None, list[int]]:
    """(the step to go on from, or None to begin, the later steps that must make way). Says what is damaged."""
    steps, bad = checkpoints.steps(), []
    distributed.check_agreement("the checkpoint", {"newest checkpoint": max(steps, default=0)})
    if run.resume == "never" or not steps:
        return None, []
    if run.resume != "auto":
        step = int(run.resume)
        have = f"{checkpoints.folder} has steps {', '.join(map(str, steps))}"
        if step not in steps:
            raise InputError(f"--resume {step}: there is no checkpoint of this step; {have}")
        if why := checkpoints.damage(step, run.verify):
            raise InputError(f"--resume {step}: damaged: {why}; {have}; `--resume auto` takes the newest good one")
        return step, [s for s in steps if s > step]
    for step in reversed(steps):
        why = checkpoints.damage(step, run.verify)
        if not why:
            return step, bad
        console.print(f"step {step} is damaged, going on from an earlier one: {why}", soft_wrap=True)
        bad.append(step)
    raise InputError(f"--resume: no checkpoint in {checkpoints.folder} is whole; put its files back, or begin anew "
                     f"in another --out. Of step {steps[-1]}: {why}")  # fmt: skip


def same_run(phase: TrainSetup, manifest: dict[str, Any]) -> list[str]:
    """What differs from the checkpoint and was accepted. InputError, in words, for what was not."""
    run, step, accept = phase.run, manifest["step"], set(phase.run.accept.split(","))
    if manifest["phase"] != run.phase:
        raise InputError(f"--resume: {run.out} holds a {manifest['phase']} run, this is a {run.phase}; correct --out")
    then, now = flatten(manifest.get("config", {})), flatten(json.loads(to_json(run)))
    digests = {"data": phase.data_digest, "tokenizer": phase.tokenizer.digest, "base": phase.base}
    taken = []
    for what, fields in _PARTS.items():
        changed = (
            {k for k in {*then, *now} if k.startswith(fields) and then.get(k) != now.get(k)}
            - RUNTIME_FIELDS
            - _ELSEWHERE
        )
        words = [f"{k} {short(then.get(k))} -> {short(now.get(k))}" for k in sorted(changed) if then]
        if what in digests:
            old, new = manifest.get(what, ""), digests[what]
            if old == new and "quantize" not in changed:
                continue
            facts = _facts(manifest, phase) if what == "data" else ""
            words = words or [f"its contents, {facts}{old[:12]} -> {new[:12]}"]
        if not words:
            continue
        said = f"the {what} changed since step {step}: {', '.join(words)}"
        if what not in accept:
            raise InputError(f"--resume: {said}; go on with what the run began with, take a new --out, or "
                             f"--accept {what}")  # fmt: skip
        console.print(f"accepted: {said}", soft_wrap=True)
        taken.append(said)
    other = [f"{k} {short(then[k])} -> {short(now[k])}" for k in sorted(set(then) & set(now))
             if k.startswith(_SAID) and then[k] != now[k]]  # fmt: skip
    for key, changes in (("optim.name", str), ("optim.spike", bool)):  # fields that change what the optimizer keeps
        if key in then and changes(then[key]) != changes(now[key]):
            raise InputError(f"--resume: --{key} {then[key]} -> {now[key]}: the optimizer of step {step} does not "
                             f"fit that; give --{key} {then[key]} again, or take a new --out")  # fmt: skip
    if other:
        console.print(f"changed since step {step}: {', '.join(other)}", soft_wrap=True)
    return taken


def _facts(manifest: dict[str, Any], phase: TrainSetup) -> str:
    then = manifest.get("rows", {})
    words = [f"{k} {then[k]:,} -> {n:,}" for k, n in phase.facts.items() if k in then and then[k] != n]
    return f"{', '.join(words)}, " if words else "as many rows but others, " if then else ""


def restore(phase: TrainSetup, checkpoints: CheckpointWriter, step: int) -> tuple[int, int]:
    """Put a checkpoint into the phase. Returns the next row and the digest of the rows before it."""
    manifest, verify = checkpoints.manifest(step), phase.run.verify
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))  # noqa: E731
    like = jax.tree.map(place, phase.state)  # a sweep has it on the host
    trainable = checkpoints.restore(step, "trainable", like.trainable, verify=verify)
    like = like._replace(trainable=None)
    if unkeyed := "key" not in manifest["leaves"]["optimizer"]:  # saved before states had a key: this run's own serves
        like = like._replace(key=None)
    rest = checkpoints.restore(step, "optimizer", like, verify=verify)
    phase.state = rest._replace(trainable=trainable, **({"key": phase.state.key} if unkeyed else {}))
    console.print(f"resumed at step {step} of {phase.run.steps}")
    return manifest["next_row"], 0 if distributed.index() else int(manifest["rows_digest"], 16)
