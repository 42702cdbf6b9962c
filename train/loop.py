"""The training loop: from a TrainSetup to its last step, with logging, evaluation and checkpoints on the way.

The loop knows nothing of files or processes. It is given `saver` (train/runs/resume.py: restore, save, check, wait),
`log` (train/progress.py: step, note, paused) and `stop` (train/cluster/signals.py: whether a signal ends the run).
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .. import InputError
from ..data.loader import Loader
from ..model.sharding import batch_rows, put_batch
from . import faults
from .config import Run
from .evaluate import evaluate_losses, evaluate_scores
from .health import Health, check_finite
from .optim import lr_schedule
from .setup import BATCH_DTYPES, TrainSetup


def run_loop(runner: "Runner", step: Callable[..., Any], log: Any, stop: Any) -> dict[str, Any] | None:
    """Run the steps up to `run.steps`. Return the evaluation of the last one ({} if there was no step to do), or None
    if a signal stopped the run early. Either way the last step is being saved: `runner.saver.wait()` waits for it."""
    run, evaluation = runner.setup.run, {}
    for i in range(runner.first_step + 1, run.steps + 1):
        runner.saver.check()
        stopped = not stop.may_step(i)
        if not stopped:
            runner.step(i, step)
            # A checkpoint has a score only if its own step was evaluated.
            last, evaluation = i == run.steps, {}
            if last or i % run.log_every == 0:
                runner.log(log)
            with log.paused():
                if last or (run.eval_every and i % run.eval_every == 0):
                    evaluation = _evaluate(runner, stop, i, last)
                    stopped, evaluation = evaluation is None, evaluation or {}
                    log.note(i, evaluation)
                if last or (run.save_every and i % run.save_every == 0):
                    runner.save(evaluation)
        if stopped:
            runner.log(log)
            runner.save()
            return None
    return evaluation


def _evaluate(runner: "Runner", stop: Any, step: int, last: bool) -> dict[str, Any] | None:
    """Return the losses at a step, and at the last one the scores; None if a signal interrupted them.

    Scoring begins only when the checkpoint of the last step is on disk, so an evaluation that fails loses no training.
    """
    setup = runner.setup
    try:
        losses = stop.interruptible(lambda: (faults.at("score", step), evaluate_losses(setup))[1])
    except Exception:
        if jax.process_count() == 1:  # the other processes may not have failed, and would wait for this one
            runner.save()
        raise
    if not last or losses is None:
        return losses
    runner.save(losses)
    runner.saver.wait()
    with explain_scoring_failure(setup.run, step):
        scores = stop.interruptible(lambda: evaluate_scores(setup))
    return None if scores is None else losses | scores


@contextlib.contextmanager
def explain_scoring_failure(run: Run, step: int) -> Iterator[None]:
    """Turn any error while a saved step is scored into an InputError that says that the step itself is safe."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        reason = reason if isinstance(error, InputError) else f"{type(error).__name__}: {reason}"
        raise InputError(
            f"{run.out}: step {step} is done and saved, but scoring it failed ({reason}); fix that, then --resume "
            "scores it again"
        ) from error


class Runner:
    """The position of a run in its stream of rows, and the metrics of steps that are not logged yet."""

    def __init__(self, setup: TrainSetup, saver: Any):
        run = setup.run
        self.setup, self.saver = setup, saver
        start_row, self.stream_digest = saver.restore()
        self.first_step = self.last_step = self.saved_step = int(setup.state.step)
        if self.first_step > run.steps:
            raise InputError(f"--steps {run.steps}: {run.out} is at step {self.first_step}; raise it, or --resume STEP")
        self.metrics: list[dict[str, Any]] = []
        self.process_rows, self.counted_rows = batch_rows(setup.mesh, run.data.batch)
        self.loader = Loader(setup.rows, run.data.batch, start=start_row, local_rows=self.process_rows)
        self.put, self.lr = put_batch(setup.mesh, run.data.batch), lr_schedule(run.optim, run.steps)
        self.health = Health(run, setup.rows, start_row, self.first_step)
        self.updates = self.first_step - int(setup.state.skipped)  # what the schedule counts

    def next_batch(self) -> dict[str, np.ndarray]:
        """Return the next rows of this process."""
        place, batch = self.loader.state()["next_row"], next(self.loader)
        rows = batch["row"][np.searchsorted(self.process_rows, self.counted_rows)]
        self.stream_digest += stream_digest(place + self.counted_rows, rows)
        return {name: batch[name] for name in BATCH_DTYPES}

    def step(self, i: int, step: Callable[..., Any]) -> None:
        """Run step i."""
        batch = self.next_batch()
        if faults.at("step", i) == "nan":
            batch["weights"] = np.full_like(batch["weights"], np.inf)
        self.setup.state, metrics = step(self.setup.state, self.setup.frozen, self.put(batch))
        self.add_metrics(i, metrics)

    def add_metrics(self, i: int, metrics: dict[str, Any]) -> None:
        """Keep the metrics of step i, which may still be under way, until they are logged."""
        self.metrics.append(metrics)
        self.last_step = i

    def log(self, log: Any) -> None:
        """Log the means of the steps since the last time; one transfer for all of them.

        Raises InputError if too many of them were left out.
        """
        rows, self.metrics = jax.device_get(self.metrics), []
        if rows:
            data = self.setup.run.data
            self.updates += sum(bool(row["ok"]) for row in rows)
            lr = float(self.lr(max(self.updates - 1, 0)))  # of the last update: a skipped step uses none
            log.step(self.last_step, _means(rows) | {"lr": lr}, len(rows) * data.batch * data.T)
            self.health.update(self.last_step, rows)

    def save(self, evaluation: dict[str, Any] | None = None) -> None:
        """Begin to save the state, unless it is saved already.

        The best checkpoint has the least loss of the validation rows or, in pretraining, of the held-out rows.
        """
        if self.saved_step == self.last_step:
            return
        self.saved_step = self.last_step
        loss = "valid_loss" if self.setup.run.phase == "finetune" else "held_out_loss"
        check_finite(self.setup.state.trainable, self.last_step, self.setup.run)
        next_row = self.loader.state()["next_row"]
        self.saver.save(self.last_step, next_row, self.stream_digest, (evaluation or {}).get(loss))


def stream_digest(places: np.ndarray, rows: np.ndarray) -> int:
    """sum of sha256(place in the stream, row id): the sums of parts of a stream add up to the sum of the whole."""
    pairs = np.stack([places, rows], axis=1).astype(np.int64)
    return sum(int.from_bytes(hashlib.sha256(pair.tobytes()).digest(), "big") for pair in pairs)


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return means over steps, of the loss by target tokens. Steps that were left out count only if all were."""
    good = [row for row in rows if row["ok"]] or rows
    targets = sum(float(row["targets"]) for row in good)
    loss = sum(float(row["loss"]) * float(row["targets"]) for row in good) / max(targets, 1.0)
    means = {name: float(np.mean([row[name] for row in good])) for name in ("grad_norm", "update_rms")}
    return {"loss": loss, "targets": targets, **means, "skipped": len(rows) - sum(bool(row["ok"]) for row in rows)}
