"""Train: from a Run to a run folder."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...model.sharding import make_mesh
from .. import faults
from ..cluster import distributed
from ..cluster.signals import Stop, Stopped
from ..config import Run, flatten, to_json
from ..evaluate import evaluate
from ..loop import Runner, explain_scoring_failure, run_loop
from ..progress import Log, NoLog, console, step_flops
from ..setup import TrainSetup, check_batch, compile_step
from . import record
from .checkpoint import CheckpointWriter
from .lock import Lock
from .prepare import prepare
from .resume import RunSaver, accepted_changes, check_out, find_checkpoint, with_date


def train(run: Run) -> Path:
    """Train to the last step of a run and return its folder.

    Raises InputError for bad input, before anything is written, and Stopped (exit code 75) when a signal ended the run
    and its state is saved.
    """
    folder, is_writer = Path(run.out), distributed.index() == 0
    distributed.check_agreement("the command", flatten(json.loads(to_json(run))))
    check_out(run)
    run, mesh = with_date(run), make_mesh(run.mesh)
    check_batch(run, mesh)
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as work, jax.set_mesh(mesh):
        stop = stack.enter_context(Stop())
        setup = prepare(run, mesh, Path(work))
        distributed.barrier_gather("the checks")  # all processes check before process 0 creates files
        guard = _claim(run, folder, stack) if is_writer else lambda: None
        checkpoints = stack.enter_context(CheckpointWriter(folder / "checkpoints", run.keep, guard))
        step, later_steps = find_checkpoint(setup.run, checkpoints)
        accepted = accepted_changes(setup, checkpoints.manifest(step)) if step is not None else []
        if step and step == setup.run.steps and record.is_complete(folder, step):
            console.print(f"{folder} is complete at step {step}; nothing is left to do", soft_wrap=True)
            return folder
        # Restores the state first: a resume that is refused has changed no file.
        runner = Runner(setup, RunSaver(setup, folder, checkpoints, step, accepted))
        if is_writer:
            record.write_first_files(setup, folder, checkpoints, step or 0, later_steps)
        distributed.barrier_gather("the folder of the run")
        if not (folder / "config.json").exists():
            raise InputError(f"--out {folder}: not the folder that process 0 made; all processes must share it")
        summary = _run(runner, folder, stop)
        if is_writer:
            record.write_last_files(run, folder, summary)
        distributed.barrier_gather("the end of the run")
    return folder


def _claim(run: Run, folder: Path, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Create the run folder and lock it until the stack ends. Return a check that this run still holds the lock."""
    record.make_run_folder(folder)
    lock = stack.enter_context(Lock(folder, "lock" in run.force.split(",")))
    check_out(run)  # again, now that the lock is held
    return lock.check


def _run(runner: Runner, folder: Path, stop: Stop) -> dict[str, Any]:
    """Evaluate, compile, and run the loop from the state of the setup to the last step. Return the summary."""
    setup, run, first = runner.setup, runner.setup.run, runner.first_step
    before = record.logged_evaluation(folder, 0)
    starts = run.phase == "finetune" and not first and not before
    before = evaluate(setup, run.eval_base_first) if starts else before
    faults.at("compile")
    step, cost = compile_step(setup)
    after, missed = {}, {}  # a run that ended after its last save resumes at its last step and may miss the evaluation
    if first == run.steps:
        after = record.logged_evaluation(folder, first)
        with explain_scoring_failure(run, first):
            missed = {} if after else evaluate(setup)
    stop.begin_steps(first)
    with contextlib.closing(_make_log(setup, folder, first)) as log:
        log.note(0, before if starts else {})
        log.note(first, missed)
        evaluation = run_loop(runner, step, log, stop)
    runner.saver.wait()
    if evaluation is None:
        console.print(f"stopped at step {runner.last_step} of {run.steps}, saved; continue with --resume")
        raise Stopped
    after = evaluation or after or missed
    return record.summarize(setup, folder, before, after, cost) if distributed.index() == 0 else {}


def _make_log(setup: TrainSetup, folder: Path, first: int) -> Any:
    run, tokens = setup.run, setup.run.data.batch * setup.run.data.T
    flops = step_flops(setup.model.config, setup.totals["base"], setup.totals["trainable"], tokens, run.data.T)
    make = NoLog if distributed.index() else Log
    return make(folder, run.recipe or run.phase, run.steps, first, flops, run.tensorboard, run.wandb)
