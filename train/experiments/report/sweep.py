"""Report of a sweep: a table of its trials, the best first, curves and a heat map."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ....atomic import atomic_write
from ...progress import console
from ..sweep.results import write_results
from ..sweep.trials import Trial
from .plots import picture, plot_heatmap, plot_range
from .tables import Table, number, word

SEED = "seed"  # the axis that is averaged over
PRINTED = 20  # rows of the table on the console


def report(out: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    """Write results.jsonl, table.md and the pictures, print the table; return the best trial and the counts."""
    rows = write_results(out, trials)
    axes, measure = list(trials[0].values), "valid_loss" if any("valid_loss" in row for row in rows) else "loss"
    ranked = sorted((row for row in rows if measure in row), key=lambda row: row[measure])
    table = _table(ranked, [row for row in rows if measure not in row], axes, measure)
    atomic_write(out / "table.md", "\n".join(table.markdown()) + "\n")
    table.print(most=PRINTED)
    _draw(out, rows, axes, measure)
    best = ranked[0] if ranked else None
    if best:
        console.print(f"best by {measure.replace('_', ' ')}: trial {best['trial']}, {out}/{best['folder']}; all trials "
                      f"in {out}/results.jsonl, table.md, *.png", soft_wrap=True)  # fmt: skip
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "stopped", "diverged")}
    return {"out": str(out), "trials": len(rows), **counts, "best": best}


def _table(ranked: list[Any], others: list[Any], axes: list[str], measure: str) -> Table:
    """Return the table of ranked trials, then of those without a measure."""
    losses = [measure, *(key for key in ("valid_loss", "loss", "forgetting")
                         if key != measure and any(key in row for row in ranked))]  # fmt: skip
    scores = list(dict.fromkeys(name for row in ranked for name in row.get("valid_scores", {})))
    rows = [
        [number(row["trial"], "d"), *(word(str(row[axis])) for axis in axes),
         *(number(row.get(key), ".4f") for key in losses),
         *(number(row.get("valid_scores", {}).get(name), ".4f") for name in scores),
         number(row.get("steps"), "d"), word(row["status"])]
        for row in ranked + others
    ]  # fmt: skip
    return Table(["trial", *axes, *losses, *scores, "steps", "status"], rows)


def over_seeds(rows: Sequence[dict[str, Any]], x: str, series: Sequence[str], measure: str) -> pd.DataFrame:
    """Return mean, min and max over seeds of a measure, indexed by (values of the series' axes, x)."""
    frame = pd.DataFrame(
        [(" ".join(str(row[axis]) for axis in series), float(row[x]), row[measure]) for row in rows if measure in row],
        columns=["series", x, measure],
    )
    return frame.groupby(["series", x])[measure].agg(["mean", "min", "max"])


def _draw(out: Path, rows: Sequence[dict[str, Any]], axes: Sequence[str], measure: str) -> None:
    """Draw curves.png: the measure by learning rate (or by the first axis of numbers), with a line for each value of
    the other axes; and heat.png, if there are other axes."""
    axes = [axis for axis in axes if axis != SEED]
    frame = pd.DataFrame(rows)[list(axes)].apply(pd.to_numeric, errors="coerce")
    numeric = [axis for axis in axes if frame[axis].notna().all()]
    if not numeric:
        return
    x = "optim.lr" if "optim.lr" in numeric else numeric[0]
    series = [axis for axis in axes if axis != x]
    frame, label = over_seeds(rows, x, series, measure), measure.replace("_", " ")
    if frame.empty:
        return
    with picture(out / "curves.png", (7, 4.2)) as ax:
        for name, points in frame.groupby(level="series"):
            plot_range(ax, points.index.get_level_values(x), points["mean"], points["min"], points["max"], str(name))
        ax.set(xlabel=x, ylabel=label)
        if all(float(row[x]) > 0 for row in rows):
            ax.set_xscale("log")
    if series:
        plot_heatmap(out / "heat.png", frame["mean"].unstack(x), x, " ".join(series), f"{label}, mean of seeds")
