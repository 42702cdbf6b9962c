"""Numbers that went wrong: steps that were left out, and parameters that are not finite."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from ..atomic import atomic_write
from ..model.tree import paths
from .config import Run


class Health:
    """Count the consecutive steps that changed nothing, and stop the run at `max_skipped` of them."""

    def __init__(self, run: Run, rows: Any, start_row: int, first_step: int):
        self.run, self.rows, self.start_row, self.first_step = run, rows, start_row, first_step
        self.skipped: list[tuple[int, bool]] = []  # the latest consecutive ones: (step, whether its numbers are finite)

    def update(self, last_step: int, metrics: list[dict[str, Any]]) -> None:
        """Take the metrics of the steps up to `last_step`.

        Raises InputError, with the ids of the rows in bad_rows.json, if too many steps in a row were left out.
        """
        for step, m in enumerate(metrics, last_step - len(metrics) + 1):
            finite = bool(np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]))
            self.skipped = [] if m["ok"] else [*self.skipped, (step, finite)]
            if self.run.max_skipped and len(self.skipped) >= self.run.max_skipped:
                self._stop()

    def _stop(self) -> None:
        steps, path = [step for step, _ in self.skipped], Path(self.run.out) / "bad_rows.json"
        spikes = sum(finite for _, finite in self.skipped)
        if jax.process_index() == 0:
            atomic_write(path, json.dumps({"steps": {str(s): self._row_ids(s) for s in steps}}, indent=1) + "\n")
        causes = f"{len(steps) - spikes} not finite" + (f", {spikes} spikes or without targets" if spikes else "")
        raise InputError(
            f"{self.run.out}: steps {steps[0]}-{steps[-1]} in a row were left out ({causes}), so the run stops; their "
            f"rows are in {path}; check them, or lower --optim.lr, then continue with --resume (or raise --max-skipped)"
        )

    def _row_ids(self, step: int) -> list[int]:
        first = self.start_row + (step - self.first_step - 1) * self.run.data.batch
        return [int(self.rows[i]["row"]) for i in range(first, first + self.run.data.batch)]


def check_finite(trainable: Any, step: int, run: Run) -> None:
    """Raise InputError naming the first parameter that holds NaN or infinity: such a state is not saved."""
    for path in nonfinite_paths(trainable):
        raise InputError(
            f"{run.out}: at step {step} {path} is not finite, so this step was not saved; lower --optim.lr, then "
            "continue with --resume"
        )


def nonfinite_paths(tree: Any) -> list[str]:
    """Return the paths of the arrays of a tree that hold NaN or infinity; each array is read once, on its device."""
    arrays = {path: x for path, x in paths(tree) if jnp.issubdtype(x.dtype, jnp.inexact)}
    return [path for path, finite in jax.device_get(_finite(arrays)).items() if not finite]


@jax.jit
def _finite(arrays: dict[str, Any]) -> dict[str, Any]:
    return {path: jnp.isfinite(x).all() for path, x in arrays.items()}
