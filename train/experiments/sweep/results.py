"""results.jsonl of a sweep: one line a trial, read from the folders of the trials."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....atomic import atomic_write
from .trials import Trial


def result_row(trial: Trial) -> dict[str, Any]:
    """Return the line of a trial; one that has not been evaluated yet has the status `waiting`.

    Numbers that are not finite are left out, and the trial counts as diverged.
    """
    folder = "/".join(trial.folder.parts[-2:])
    row: dict[str, Any] = {"trial": trial.number, **trial.values, "folder": folder}
    if trial.diverged:
        return row | {"status": "diverged"}
    if not (summary := trial.summary):
        return row | {"status": "waiting"}
    after, before, lanes = summary["after"], summary["before"], summary.get("lanes", 1)
    row |= {"status": summary.get("status", "done"), "steps": summary["steps"], "trainable": summary["trainable"]}
    row |= {key: after[key] for key in ("valid_loss", "held_out_loss", "valid_scores") if key in after}
    row |= {"loss": summary["loss"], "seconds_per_step": summary["seconds_per_step"] / lanes, "lanes": lanes}
    if "held_out_loss" in after and "held_out_loss" in before:
        row["forgetting"] = after["held_out_loss"] - before["held_out_loss"]
    not_finite = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    return {k: v for k, v in row.items() if k not in not_finite} | ({"status": "diverged"} if not_finite else {})


def write_results(out: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Write results.jsonl, and return its rows."""
    rows = [result_row(trial) for trial in trials]
    atomic_write(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows
