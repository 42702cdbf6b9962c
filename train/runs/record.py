"""The files of a run folder besides its checkpoints: those it begins with, its evaluations, and those it ends with."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ...atomic import atomic_write
from ..cluster import distributed
from ..config import Run, to_json
from ..inputs import save_held_out
from ..progress import console, cut_metrics, plot_losses, read_metrics
from ..setup import TrainSetup
from .checkpoint import CheckpointWriter


def make_run_folder(folder: Path) -> None:
    """Create the run folder. Raises InputError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give a folder that can") from None


def write_first_files(
    setup: TrainSetup, folder: Path, checkpoints: CheckpointWriter, step: int, later_steps: list[int]
) -> None:
    """Write the files that a run starts with, each atomically, and put the checkpoints after `step` aside."""
    try:
        with tempfile.TemporaryDirectory() as work:
            setup.tokenizer.save(Path(work))
            if setup.run.phase == "pretrain":
                save_held_out(Path(work) / "held_out.npz", setup.held_out)
            for file in Path(work).iterdir():
                path, data = folder / file.name, file.read_bytes()
                old = path.read_bytes() if path.exists() else None
                if old is not None and old != data:
                    console.print(f"{path} was not what this run wrote: written anew", soft_wrap=True)
                if old != data:
                    atomic_write(path, data)
        atomic_write(folder / "config.json", to_json(setup.run))
        cut_metrics(folder, step)
        checkpoints.tidy()
        for later in later_steps:
            aside = checkpoints.folder / checkpoints.put_aside(later)
            console.print(f"step {later} is kept as {aside}", soft_wrap=True)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.filename} cannot be written ({error.strerror})") from None


def write_last_files(run: Run, folder: Path, summary: dict[str, Any]) -> None:
    """Write the loss curve and, last, summary.json: a run with it is complete."""
    curve = [(r["step"], r["loss"]) for r in read_metrics(folder) if "loss" in r]
    title = run.recipe or run.phase
    plot_losses(folder / "loss.png", {title: curve}, f"{title}: training loss")
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    console.print(f"wrote {folder}/: config.json, metrics.jsonl, summary.json, loss.png, checkpoints/", soft_wrap=True)


def is_complete(folder: Path, steps: int) -> bool:
    """Return whether a run has ended after `steps` steps, summary.json included."""
    try:
        return json.loads((folder / "summary.json").read_text("utf-8"))["steps"] == steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def logged_evaluation(folder: Path, step: int) -> dict[str, Any]:
    """Return the evaluation of a step in metrics.jsonl, as process 0 reads it; {} if there is none."""
    rows = []
    if distributed.index() == 0 and (folder / "metrics.jsonl").exists():
        rows = [r for r in read_metrics(folder) if r["step"] == step and "loss" not in r]
    evaluation = {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}
    return json.loads(distributed.barrier_gather("an earlier evaluation", json.dumps(evaluation))[0])


def summarize(setup: TrainSetup, folder: Path, before: Any, after: Any, cost: Any) -> dict[str, Any]:
    """Return the contents of summary.json: the evaluations before and after training, sizes, and the cost of a step."""
    logged = [r for r in read_metrics(folder) if "seconds_per_step" in r]
    return {
        "recipe": setup.run.recipe,
        "method": type(setup.method).__name__.lower(),
        "steps": setup.run.steps,
        "loss": logged[-1]["loss"],
        "seconds_per_step": float(np.median([r["seconds_per_step"] for r in logged])),
        "skipped": int(setup.state.skipped),
        **setup.totals,
        **cost,
        "before": before,
        "after": after,
    }
