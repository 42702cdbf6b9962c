"""The loop: from a Run to a run directory."""

import contextlib
import hashlib
import json
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import InputError
from ..data.loader import Loader
from ..model.sharding import batch_rows, make_mesh, put_batch
from . import faults
from .cluster import distributed
from .cluster.signals import Stop, Stopped
from .config import Run, flatten, to_json
from .health import Health, must_be_finite
from .optim import schedule
from .program import KEYS, check_batch, lower
from .progress import Log, NoLog, console, step_flops
from .runs import record
from .runs.checkpoint import CheckpointWriter
from .runs.lineage import code_version
from .runs.lock import Lock
from .runs.manifest import describe_sidecars
from .runs.record import evaluate
from .runs.resume import check_out, dated, find, restore, same_run
from .setup import TrainSetup, prepare


def train(run: Run) -> Path:
    """Run a phase to its end and return its directory. Raises InputError, before anything is written, for bad input,
    and Stopped (exit code 75) when a signal ended it and all is saved."""
    folder, writes = Path(run.out), distributed.index() == 0
    distributed.check_agreement("the command", flatten(json.loads(to_json(run))))
    check_out(run)
    run, mesh = dated(run), make_mesh(run.mesh)
    check_batch(run, mesh)
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory() as work, jax.set_mesh(mesh):
        stop = held.enter_context(Stop())
        phase = prepare(run, mesh, Path(work))
        distributed.barrier_gather("the checks")  # none finds what process 0 makes now
        guard: Any = lambda: None  # noqa: E731
        if writes:
            record.make(folder)
            guard = held.enter_context(Lock(folder, "lock" in run.accept.split(","))).check
            check_out(run)  # nobody came before
        checkpoints = held.enter_context(CheckpointWriter(folder / "checkpoints", run.keep, guard))
        step, later = find(phase.run, checkpoints)
        taken = same_run(phase, checkpoints.manifest(step)) if step is not None else []
        if step and step == phase.run.steps and record.complete(folder, step):
            console.print(f"{folder} is complete at step {step}; nothing is left to do", soft_wrap=True)
            return folder
        course = Runner(phase, folder, checkpoints, step, taken)  # a resume that is refused has changed no file
        if writes:
            record.begin(phase, folder, checkpoints, step or 0, later)
        distributed.barrier_gather("the folder of the run")
        if not (folder / "config.json").exists():
            raise InputError(f"--out {folder}: not the folder that process 0 made; all processes must share it")
        summary = _go(phase, folder, course, stop)
        if writes:
            record.finish(run, folder, summary)
        distributed.barrier_gather("the end of the run")
    return folder


def _go(phase: TrainSetup, folder: Path, loop: "Runner", stop: Stop) -> dict[str, Any]:
    """The loop proper: from the phase's state to the last step. Returns the summary."""
    run, first, left = phase.run, loop.first, False
    before = record.noted(folder, 0)
    begins = run.phase == "finetune" and not first and not before
    before = evaluate(phase, run.score_base) if begins else before
    faults.at("compile")
    step, cost = compile_step(phase)
    found = {} if first < run.steps else record.noted(folder, first)
    with record.of_saved(run, first):
        late = {} if first < run.steps or found else evaluate(phase)  # it ended behind the last save
    stop.begin(first)
    with contextlib.closing(_log(phase, folder, first)) as log:
        log.note(0, before if begins else {})
        log.note(first, late)
        for i in range(first + 1, run.steps + 1):
            loop.checkpoints.check()
            if not stop.may(i):
                left = True
                break
            loop.step(i, step)
            last, found = i == run.steps, {}  # a checkpoint has a score only if its own step was evaluated
            if last or i % run.log_every == 0:
                loop.log(log)
            with log.paused():
                if last or (run.eval_every and i % run.eval_every == 0):
                    found = _evaluated(loop, stop, i, last)
                    left, found = found is None, found or {}
                    log.note(i, found)
                if last or (run.save_every and i % run.save_every == 0):
                    loop.save(found)
        if left:
            loop.log(log)
            loop.save()
    loop.checkpoints.wait()
    if left:
        console.print(f"stopped at step {loop.done} of {run.steps}, saved; go on with --resume")
        raise Stopped
    return record.summary(phase, folder, before, found or late, cost) if distributed.index() == 0 else {}


def _evaluated(loop: "Runner", stop: Stop, i: int, last: bool) -> dict[str, Any] | None:
    """The losses at a step and, at the last one, the scores, which only begin when its checkpoint is on the disk; None
    if a signal ended that. What has been trained is not lost by an evaluation that fails."""
    phase = loop.phase
    try:
        found = stop.between(lambda: (faults.at("score", i), record.losses(phase))[1])
    except Exception:
        if distributed.count() == 1:  # the others may not have failed, and would wait
            loop.save()
        raise
    if not last or found is None:
        return found
    loop.save(found)
    loop.checkpoints.wait()
    with record.of_saved(phase.run, i):
        scores = stop.between(lambda: record.scores(phase))
    return None if scores is None else found | scores


class Runner:
    """Where a run is in its rows, and what of it is neither logged nor saved yet."""

    def __init__(
        self, phase: TrainSetup, folder: Path, checkpoints: CheckpointWriter, at: int | None, taken: list[str]
    ):
        run = phase.run
        self.phase, self.folder, self.checkpoints = phase, folder, checkpoints
        start, self.seen = restore(phase, checkpoints, at) if at is not None else (0, 0)
        self.first = self.done = int(phase.state.step)
        if self.first > run.steps:
            raise InputError(f"--steps {run.steps}: {folder} is at step {self.first}; raise it, or --resume STEP")
        self.saved, self.pending = at or 0, []
        self.held, self.counted = batch_rows(phase.mesh, run.data.batch)
        self.loader = Loader(phase.rows, run.data.batch, start=start, local_rows=self.held)
        self.put, self.schedule = put_batch(phase.mesh, run.data.batch), schedule(run.optim, run.steps)
        self.health = Health(run, phase.rows, start, self.first)
        told = checkpoints.manifest(at).get("accepted", []) if at is not None else []
        self.accepted = [*told, *taken]
        self.updates = self.first - int(phase.state.skipped)  # what the schedule counts

    @cached_property
    def constant(self) -> dict[str, Any]:
        """What the manifests of all checkpoints of this run say alike. Needs the files that the run begins with."""
        return {"accepted": self.accepted, "sidecars": describe_sidecars(self.folder, self.phase.tokenizer)}

    def feed(self) -> dict[str, np.ndarray]:
        """The next rows, as this process holds them."""
        at, batch = self.loader.state()["next_row"], next(self.loader)
        self.seen += row_sum(at + self.counted, batch["row"][np.searchsorted(self.held, self.counted)])
        return {k: batch[k] for k in KEYS}

    def step(self, i: int, step: Any) -> None:
        """Step i."""
        batch = self.feed()
        if faults.at("step", i) == "nan":
            batch["weights"] = np.full_like(batch["weights"], np.inf)
        self.phase.state, metrics = step(self.phase.state, self.phase.frozen, self.put(batch))
        self.took(i, metrics)

    def took(self, i: int, metrics: dict[str, Any]) -> None:
        """Step i is done, or under way, and gave this."""
        self.pending.append(metrics)
        self.done = i

    def log(self, log: Any) -> None:
        """Write the means of the steps since the last time; one transfer for all of them. Raises if they went wrong."""
        rows, self.pending = jax.device_get(self.pending), []
        if rows:
            data = self.phase.run.data
            self.updates += sum(bool(row["ok"]) for row in rows)
            lr = float(self.schedule(max(self.updates - 1, 0)))  # of the last update: a skipped step uses none
            log.step(self.done, _means(rows) | {"lr": lr}, len(rows) * data.batch * data.T)
            self.health.see(self.done, rows)

    def save(self, found: dict[str, Any] | None = None) -> None:
        """Begin to save the state, unless it is saved already. The best checkpoint has the least loss in `found`: of
        the validation rows or, in pretraining, of the held-out rows."""
        if self.saved == self.done:
            return
        state, self.saved = self.phase.state, self.done
        score = (found or {}).get("valid_loss" if self.phase.run.phase == "finetune" else "held_out_loss")
        must_be_finite(state.trainable, self.done, self.phase.run)
        items = {"trainable": state.trainable, "optimizer": state._replace(trainable=None)}
        meta = _meta(self.phase, self.loader, self.seen) | self.constant
        self.checkpoints.save(self.done, items, meta, score)


def _log(phase: TrainSetup, folder: Path, first: int) -> Any:
    run, tokens = phase.run, phase.run.data.batch * phase.run.data.T
    flops = step_flops(phase.model.config, phase.totals["base"], phase.totals["trainable"], tokens, run.data.T)
    make = NoLog if distributed.index() else Log
    return make(folder, run.recipe or run.phase, run.steps, first, flops, run.tensorboard, run.wandb)


def row_sum(places: np.ndarray, rows: np.ndarray) -> int:
    """sum of sha256(place in the stream, row id): sums of parts of a stream, added up, are the digest of all of it."""
    pairs = np.stack([places, rows], axis=1).astype(np.int64)
    return sum(int.from_bytes(hashlib.sha256(pair.tobytes()).digest(), "big") for pair in pairs)


def compile_step(phase: TrainSetup) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and what the compiler says of its time and memory."""
    began = time.perf_counter()
    lowered, options = lower(phase)
    compiled = lowered.compile(compiler_options=options)
    m: Any = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    seconds = round(time.perf_counter() - began, 2)
    return compiled, {"compile_seconds": seconds, "step_temp_bytes": m.temp_size_in_bytes, "step_peak_bytes": peak}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over steps, the loss by target tokens; steps that were left out count only if all were."""
    good = [r for r in rows if r["ok"]] or rows
    targets = sum(float(r["targets"]) for r in good)
    loss = sum(float(r["loss"]) * float(r["targets"]) for r in good) / max(targets, 1.0)
    mean = {k: float(np.mean([r[k] for r in good])) for k in ("grad_norm", "update_rms")}
    return {"loss": loss, "targets": targets, **mean, "skipped": len(rows) - sum(bool(r["ok"]) for r in rows)}


def _meta(phase: TrainSetup, loader: Loader, seen: int) -> dict[str, Any]:
    """What a checkpoint says besides its arrays."""
    rows = sum(int(part) for part in distributed.barrier_gather("the rows of a checkpoint", str(seen)))
    return {
        "phase": phase.run.phase,
        "config": json.loads(to_json(phase.run)),
        "base": phase.base,
        "tokenizer": phase.tokenizer.digest,
        "data": phase.data_digest,
        "rows": phase.facts,
        "seed": phase.run.seed,
        "code": code_version(),
        "lineage": phase.lineage,
        "added_tokens": phase.added,
        "next_row": loader.state()["next_row"],
        "rows_digest": f"{rows % 2**256:064x}",
        "mesh": list(phase.mesh.devices.shape),
    }
