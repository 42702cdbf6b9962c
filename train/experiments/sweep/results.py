"""What the cells of a sweep found: results.jsonl, a table, curves and a heat map, all from the cells' own folders."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ....atomic import atomic_write
from ...progress import console, save_figure
from .trials import Trial

REPEATS = "seed"  # the axis that is averaged over


def diverged(cell: Trial) -> bool:
    """Whether a cell ended because its loss was not finite any more."""
    return (Path(cell.run.out) / "bad_rows.json").exists()


def told(cell: Trial) -> dict[str, Any]:
    """A cell's summary.json; {} if it has none yet."""
    path = Path(cell.run.out) / "summary.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def reached(cell: Trial) -> float:
    """The step up to which all of a cell is done; infinity if it ended before."""
    return math.inf if diverged(cell) else told(cell).get("steps", 0)


def result(cell: Trial) -> dict[str, Any]:
    """One line of results.jsonl; a cell that has nothing yet has the status `waiting`. What is not finite is left out,
    and its cell has diverged."""
    row: dict[str, Any] = {"cell": cell.number, **cell.values, "folder": f"cells/{cell.number:03d}"}
    if diverged(cell):
        return row | {"status": "diverged"}
    if not (said := told(cell)):
        return row | {"status": "waiting"}
    after, before, lanes = said["after"], said["before"], said.get("lanes", 1)
    row |= {"status": said.get("status", "done"), "steps": said["steps"], "trainable": said["trainable"]}
    row |= {key: after[key] for key in ("valid_loss", "held_out_loss", "valid_scores") if key in after}
    row |= {"loss": said["loss"], "seconds_per_step": said["seconds_per_step"] / lanes, "lanes": lanes}
    if "held_out_loss" in after and "held_out_loss" in before:
        row["forgetting"] = after["held_out_loss"] - before["held_out_loss"]
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    return {k: v for k, v in row.items() if k not in bad} | ({"status": "diverged"} if bad else {})


def write(out: Path, made: Sequence[Trial]) -> list[dict[str, Any]]:
    """results.jsonl, as far as the cells are."""
    rows = [result(cell) for cell in made]
    atomic_write(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def measure(rows: Sequence[dict[str, Any]]) -> str:
    """What cells are ordered by: the validation loss of the task, or the training loss where it has no such rows."""
    return "valid_loss" if any("valid_loss" in row for row in rows) else "loss"


def report(out: Path, made: Sequence[Trial]) -> dict[str, Any]:
    """All of it, said and written; returns the best cell and the counts."""
    rows = write(out, made)
    key, axes = measure(rows), list(made[0].values)
    have = sorted((row for row in rows if key in row), key=lambda row: row[key])
    table = _table(have, [row for row in rows if key not in row], axes, key)
    atomic_write(out / "table.md", "\n".join(["| " + " | ".join(line) + " |" for line in table]) + "\n")
    shown = Table(box=None, pad_edge=False)
    for column in table[0]:
        shown.add_column(column, justify="right")
    for line in table[2:22]:
        shown.add_row(*line)
    console.print(shown)
    pictures(out, rows, axes, key)
    best = have[0] if have else None
    if best:
        console.print(f"best by {key.replace('_', ' ')}: cell {best['cell']}, {out}/{best['folder']}; all of them in "
                      f"{out}/results.jsonl, table.md, *.png", soft_wrap=True)  # fmt: skip
    counts = {s: sum(row["status"] == s for row in rows) for s in ("done", "stopped", "diverged")}
    return {"out": str(out), "cells": len(rows), **counts, "best": best}


def _table(have: list[Any], rest: list[Any], axes: list[str], key: str) -> list[list[str]]:
    """Heads, a rule, and a line a cell, the best first."""
    shown = [key, *(k for k in ("valid_loss", "loss", "forgetting") if k != key and any(k in row for row in have))]
    scores = list(dict.fromkeys(k for row in have for k in row.get("valid_scores", {})))
    lines = [["cell", *axes, *shown, *scores, "steps", "status"]]
    lines.append(["--:"] * len(lines[0]))
    for row in have + rest:
        numbers = [f"{row[k]:.4f}" if k in row else "" for k in shown]
        numbers += [f"{row['valid_scores'][k]:.4f}" if k in row.get("valid_scores", {}) else "" for k in scores]
        lines.append(
            [str(row["cell"]), *(str(row[a]) for a in axes), *numbers, str(row.get("steps", "")), row["status"]]
        )
    return lines


def pictures(out: Path, rows: Sequence[dict[str, Any]], axes: Sequence[str], key: str) -> None:
    """curves.png: the measure against the learning rate (or the first axis of numbers), a line for each value of
    another axis, seeds averaged, their range shaded. heat.png: the mean over both."""
    free = [a for a in axes if a != REPEATS]
    numeric = [a for a in free if all(_number(str(row[a])) is not None for row in rows)]
    if not numeric:
        return
    x = "optim.lr" if "optim.lr" in numeric else numeric[0]
    lines = [a for a in free if a != x]
    from matplotlib.figure import Figure

    grid = gathered(rows, [x], lines, key)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, points in grid.items():
        at = sorted(points, key=lambda v: float(v[0]))
        xs, means = [float(v[0]) for v in at], [float(np.mean(points[v])) for v in at]
        (line,) = ax.plot(xs, means, marker="o", markersize=3, label=" ".join(name))
        ax.fill_between(
            xs, [min(points[v]) for v in at], [max(points[v]) for v in at], alpha=0.15, color=line.get_color()
        )
    if all(float(row[x]) > 0 for row in rows):
        ax.set_xscale("log")
    ax.set(xlabel=x, ylabel=key.replace("_", " "))
    ax.grid(alpha=0.3)
    if lines:
        ax.legend(title=" ".join(lines), fontsize=8)
    save_figure(figure, out / "curves.png")
    if lines:
        _heat(out, grid, x, lines, key)


def _heat(out: Path, grid: Any, x: str, lines: Sequence[str], key: str) -> None:
    from matplotlib.figure import Figure

    columns = sorted({v for points in grid.values() for v in points}, key=lambda v: float(v[0]))
    values = np.array([[np.mean(points[c]) if c in points else np.nan for c in columns] for points in grid.values()])
    figure = Figure(figsize=(2 + 0.9 * len(columns), 1.6 + 0.5 * len(grid)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(values, cmap="viridis_r", aspect="auto")
    ax.set_xticks(range(len(columns)), [c[0] for c in columns])
    ax.set_yticks(range(len(grid)), [" ".join(name) for name in grid])
    ax.set(xlabel=x, ylabel=" ".join(lines), title=f"{key.replace('_', ' ')}, mean of seeds")
    middle = np.nanmean(values) if np.isfinite(values).any() else 0.0
    for i, j in np.argwhere(np.isfinite(values)):
        ax.text(j, i, f"{values[i, j]:.3f}", ha="center", va="center", fontsize=8,
                color="white" if values[i, j] > middle else "black")  # fmt: skip
    save_figure(figure, out / "heat.png")


def gathered(rows: Sequence[dict[str, Any]], inner: Sequence[str], outer: Sequence[str], key: str) -> dict[Any, Any]:
    """{values of outer: {values of inner: [measures]}} of the rows that have one."""
    pick: Callable[[Any, Any], Any] = lambda row, names: tuple(str(row[n]) for n in names)  # noqa: E731
    found: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        if key in row:
            found.setdefault(pick(row, outer), {}).setdefault(pick(row, inner), []).append(row[key])
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
