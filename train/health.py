"""Numbers that went wrong: steps that were left out, counted when they are logged, and parameters not finite."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from ..atomic import atomic_write
from ..model.tree import paths
from .cluster import distributed
from .config import Run
from .runs.load import load_run
from .runs.loaded import LoadedRun


class Health:
    """Counts the steps in a row that changed nothing, and stops the run at `max_bad` of them."""

    def __init__(self, run: Run, rows: Any, start: int, first: int):
        self.run, self.rows, self.start, self.first = run, rows, start, first  # the loop began at row `start`
        self.bad: list[tuple[int, bool]] = []  # (step, whether it was a spike) in a row

    def see(self, step: int, metrics: list[dict[str, Any]]) -> None:
        """The metrics of the steps up to `step`. InputError, with the rows in bad_rows.json, if too many were bad."""
        for at, m in enumerate(metrics, step - len(metrics) + 1):
            finite = bool(np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]))
            self.bad = [] if m["ok"] else [*self.bad, (at, finite)]
            if self.run.max_bad and len(self.bad) >= self.run.max_bad:
                self._stop()

    def _stop(self) -> None:
        steps, path = [step for step, _ in self.bad], Path(self.run.out) / "bad_rows.json"
        spikes = sum(spike for _, spike in self.bad)
        if distributed.index() == 0:
            atomic_write(path, json.dumps({"steps": {str(s): self._rows(s) for s in steps}}, indent=1) + "\n")
        what = f"{len(steps) - spikes} not finite" + (f", {spikes} spikes or without targets" if spikes else "")
        raise InputError(
            f"{self.run.out}: steps {steps[0]}-{steps[-1]} in a row were left out ({what}), so the run stops; their "
            f"rows are in {path}; look at them, or lower --optim.lr, then go on with --resume (or raise --max-bad)"
        )

    def _rows(self, step: int) -> list[int]:
        """The ids of a step's rows."""
        at = self.start + (step - self.first - 1) * self.run.data.batch
        return [int(self.rows[i]["row"]) for i in range(at, at + self.run.data.batch)]


def must_be_finite(trainable: Any, step: int, run: Run) -> None:
    """InputError naming the first parameter with NaN or infinity in it: such a state is not saved."""
    for path in not_finite(trainable):
        raise InputError(
            f"{run.out}: at step {step} {path} is not finite, so nothing was saved of it; lower --optim.lr, then "
            "go on with --resume"
        )


def load_base(run: Run, mesh: Any) -> LoadedRun:
    """The base that a run trains on, with a tokenizer whose templates write the run's date.

    Raises InputError for a parameter of the base that holds NaN or infinity.
    """
    got = load_run(run.base, mesh, layers=run.layers, quantize=run.quantize, verify=run.verify)
    if bad := not_finite(got.base):
        others = f" (and so do {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"{run.base}: the parameter {bad[0]} holds NaN or infinity{others}, so nothing can be trained on it; copy "
            "the base again, or take an earlier checkpoint or another base"
        )
    return dataclasses.replace(got, tokenizer=dataclasses.replace(got.tokenizer, date=run.date))


def not_finite(tree: Any) -> list[str]:
    """The paths of the arrays of a tree that hold NaN or infinity; each array is read once, where it is."""
    flat = {path: x for path, x in paths(tree) if jnp.issubdtype(x.dtype, jnp.inexact)}
    return [path for path, fine in jax.device_get(_finite(flat)).items() if not fine]


@jax.jit
def _finite(flat: dict[str, Any]) -> dict[str, Any]:
    return {path: jnp.isfinite(x).all() for path, x in flat.items()}
