"""What a run found: its evaluations, and the files that it begins and ends with."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ...atomic import atomic_write
from ...model.sharding import put_batch
from ..cluster import distributed
from ..config import Run, to_json
from ..evaluate import held_out_losses, longest_answer, mean_loss, outputs, row_losses, scored, within
from ..inputs import save_held_out
from ..progress import console, cut_metrics, plot_losses, read_metrics
from ..setup import TrainSetup
from .checkpoint import CheckpointWriter


def evaluate(phase: TrainSetup, score: bool = True) -> dict[str, Any]:
    """`losses` and, with `score`, `scores`."""
    return losses(phase) | (scores(phase) if score else {})


def bound(phase: TrainSetup) -> tuple[Any, Any, Any]:
    """(model, bound parameters, context) of a phase as it is now."""
    method, trainable = phase.method, phase.state.trainable
    return phase.model, method.bind(phase.frozen, trainable), method.context(trainable)


def losses(phase: TrainSetup) -> dict[str, Any]:
    """Held-out loss of the base's domains, and validation loss of the task, where there are rows for them."""
    run, found, args = phase.run, {}, bound(phase)
    if phase.held_out:
        held = held_out_losses(*args, phase.held_out, run.data.batch, run.eval_tokens, put_batch(phase.mesh))
        found = {"held_out_loss": mean_loss(held), "held_out": held}
    if phase.valid:
        found["valid_loss"] = rows_loss(args, phase.valid, run, phase.mesh)
    return found


def scores(phase: TrainSetup) -> dict[str, Any]:
    """Scores of the task's test rows, with some samples; {} for a run without rows to judge by."""
    rows = scored(phase.task, phase.tokenizer, phase.run.eval_rows) if phase.task else []
    if not rows:
        return {}
    answers = outputs(*bound(phase), phase.tokenizer, rows, longest_answer(rows, phase.tokenizer))
    pairs = list(zip(rows, answers, strict=True))[:8]
    samples = [{"prompt": r["prompt"], "wanted": r["completion"], "got": a} for r, a in pairs]
    return {"scores": phase.task.score(rows, answers), "samples": samples}


@contextlib.contextmanager
def of_saved(run: Run, step: int) -> Iterator[None]:
    """Around the scoring of a step whose checkpoint is there: whatever goes wrong is one line that says so."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        reason = reason if isinstance(error, InputError) else f"{type(error).__name__}: {reason}"
        raise InputError(f"{run.out}: step {step} is done and saved, but scoring it failed ({reason}); mend that, and "
                         "--resume scores it again") from error  # fmt: skip


def rows_loss(args: Any, rows: Any, run: Run, mesh: Any) -> float:
    """Nats a target token of rows, of at most `eval_tokens` tokens (0: all); args: (model, bound, context)."""
    rows = within(rows, run.eval_tokens)
    model, bound, context = args
    loss = row_losses(model, bound, context, rows, run.data.batch, put_batch(mesh)).sum()
    return float(loss / max(sum(float(row["weights"].sum()) for row in rows), 1.0))


def make(folder: Path) -> None:
    """The run directory. InputError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give a folder that can") from None


def begin(phase: TrainSetup, folder: Path, checkpoints: CheckpointWriter, step: int, later: list[int]) -> None:
    """The files that a run starts with, each whole or as it was; what is behind `step` makes way."""
    try:
        with tempfile.TemporaryDirectory() as work:
            made = Path(work)
            phase.tokenizer.save(made)
            if phase.run.phase == "pretrain":
                save_held_out(made / "held_out.npz", phase.held_out)
            for file in made.iterdir():
                there, data = folder / file.name, file.read_bytes()
                if there.exists() and there.read_bytes() != data:
                    console.print(f"{there} was not what this run wrote: written anew", soft_wrap=True)
                if not there.exists() or there.read_bytes() != data:
                    atomic_write(there, data)
        atomic_write(folder / "config.json", to_json(phase.run))
        cut_metrics(folder, step)
        checkpoints.tidy()
        for old in later:
            console.print(f"step {old} is kept as {checkpoints.folder / checkpoints.put_aside(old)}", soft_wrap=True)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.filename} cannot be written ({error.strerror})") from None


def finish(run: Run, folder: Path, found: dict[str, Any]) -> None:
    """The files that a run ends with."""
    curve = [(r["step"], r["loss"]) for r in read_metrics(folder) if "loss" in r]
    title = run.recipe or run.phase
    plot_losses(folder / "loss.png", {title: curve}, f"{title}: training loss")
    atomic_write(folder / "summary.json", json.dumps(found, indent=1) + "\n")  # the last: with it a run is complete
    console.print(f"wrote {folder}/: config.json, metrics.jsonl, summary.json, loss.png, checkpoints/", soft_wrap=True)


def complete(folder: Path, steps: int) -> bool:
    """Whether a run has come to its end, summary.json included."""
    try:
        return json.loads((folder / "summary.json").read_text("utf-8"))["steps"] == steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def noted(folder: Path, step: int) -> dict[str, Any]:
    """The evaluation that metrics.jsonl has of a step, if it has one; what process 0 finds."""
    rows = []
    if distributed.index() == 0 and (folder / "metrics.jsonl").exists():
        rows = [r for r in read_metrics(folder) if r["step"] == step and "loss" not in r]
    found = {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}
    return json.loads(distributed.barrier_gather("what was found before", json.dumps(found))[0])


def summary(phase: TrainSetup, folder: Path, before: Any, after: Any, cost: Any) -> dict[str, Any]:
    """What summary.json says."""
    logged = [r for r in read_metrics(folder) if "seconds_per_step" in r]
    return {
        "recipe": phase.run.recipe,
        "method": type(phase.method).__name__.lower(),
        "steps": phase.run.steps,
        "loss": logged[-1]["loss"],
        "seconds_per_step": float(np.median([r["seconds_per_step"] for r in logged])),
        "skipped": int(phase.state.skipped),
        **phase.totals,
        **cost,
        "before": before,
        "after": after,
    }
