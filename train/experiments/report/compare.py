"""Report of a comparison: one self-contained HTML page, and the same as markdown with pictures."""

import json
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ....atomic import atomic_write
from ...progress import console, read_metrics
from ..results_log import Line, read_results, select
from .comparison import TaskReport, answer_table, cost_table, run_table, setup_facts, task_report
from .plots import plot_comparison

PAIRS_NOTE = "Row minus column, with the 95 % interval of the pair alone; * is significant over all pairs at once."
# The costs that the page can plot scores against: (key of a cost line, label, factor to the unit of the label).
COSTS = (("trainable", "trainable parameters", 1.0), ("artifact_bytes", "artifact, MB", 1e-6),
         ("peak_bytes", "peak memory of a step, MB", 1e-6), ("ratio", "time of a step, relative", 1.0),
         ("flops", "GFLOPs per step", 1e-9))  # fmt: skip
PLOTTED_COSTS = [COSTS[0][:2], COSTS[3][:2]]  # in the pictures of the markdown


def report(out: Path) -> dict[str, Any]:
    """Write report.html, report.md and pictures, print the tables, and return the results of each task."""
    lines = read_results(out / "results.jsonl")
    tasks = [task_report(lines, task) for task in select(lines, kind="setup")[0]["tasks"]]
    _write(out, lines, tasks)
    for task in tasks:
        task.scores.print(f"{task.label}: {task.metric}", without=("by seed", "gap interval"))
        console.print(" ".join(task.sentences), soft_wrap=True)
    console.print(f"wrote {out}/: report.html, report.md, results.jsonl; search/ and seeds/ are sweeps", soft_wrap=True)
    results = {
        task.task: {"metric": task.metric, "significant_gap": task.comparison.significant_gap,
                    "sentences": task.sentences,
                    "methods": {name: e._asdict() for name, e in task.comparison.methods.items()}}
        for task in tasks
    }  # fmt: skip
    return {"out": str(out), "tasks": results}


def _write(out: Path, lines: list[Line], tasks: Sequence[TaskReport]) -> None:
    data = {task.task: _plot_data(out, lines, task) for task in tasks}
    parts = {"facts": setup_facts(lines), "costs": cost_table(lines), "runs": run_table(lines), "tasks": tasks,
             "answers": {task.task: answer_table(lines, task.task) for task in tasks}}  # fmt: skip
    template = Path(__file__).with_name("compare.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no text can end the script element
    html = environment.from_string(template).render(data=script, axes=COSTS, pairs_note=PAIRS_NOTE, **parts)
    atomic_write(out / "report.html", html)
    pictures = []
    for i, task in enumerate(tasks):
        stem = "".join(c if c.isalnum() else "_" for c in task.label)
        pictures.append(f"{stem}_{i}.png" if i else f"{stem}.png")
        plot_comparison(out / pictures[-1], data[task.task], PLOTTED_COSTS)
    atomic_write(out / "report.md", _markdown(parts, pictures))


def _plot_data(out: Path, lines: list[Line], task: TaskReport) -> dict[str, Any]:
    """Return what the plots of a task show: scores and costs, losses by learning rate, losses by step (seed 0)."""
    costs = {line["method"]: line for line in select(lines, kind="cost")}
    points = [{"name": name, "score": e.mean, "low": e.low, "high": e.high, "good": e.as_good,
               "costs": {key: costs[name][key] * factor for key, _, factor in COSTS}}
              for name, e in task.comparison.methods.items()]  # fmt: skip
    rates: dict[str, Any] = {}
    for line in select(lines, kind="search", task=task.task):
        if "valid_loss" in line:
            rates.setdefault(line["method"], []).append([line["lr"], line["valid_loss"]])
    curves = {}
    for line in select(lines, kind="test", task=task.task, seed=0):
        folder = out / line["folder"]
        if (folder / "metrics.jsonl").exists():
            logged = [row for row in read_metrics(folder) if isfinite(row.get("loss", nan))]
            curves[line["method"]] = [[row["step"], row["loss"]] for row in logged]
    rates = {name: sorted(points) for name, points in rates.items()}
    return {"metric": task.metric, "points": points, "rates": rates, "curves": curves}


def _markdown(parts: dict[str, Any], pictures: Sequence[str]) -> str:
    text = ["# Methods compared", "", *(f"- {name}: {value}" for name, value in parts["facts"])]
    for task, picture in zip(parts["tasks"], pictures, strict=True):
        text += ["", f"## {task.label}", "", " ".join(task.sentences), "", *task.scores.markdown(), "",
                 f"![{task.label}]({picture})", "", PAIRS_NOTE, "", *task.pairs.markdown(), "", "Answers:", "",
                 *parts["answers"][task.task].markdown()]  # fmt: skip
    text += ["", "## Costs", "", *parts["costs"].markdown(), "", "## Runs", "", *parts["runs"].markdown()]
    return "\n".join(text) + "\n"
