"""A comparison as one self-contained HTML page, and the same as markdown with pictures."""

import json
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ...atomic import atomic_write
from ..progress import read_metrics, save_figure
from .compare_report import Finding, TableGrid, expenses, facts, runs, samples
from .results_log import Line, found

DIFFERENCES = "Row less column, with the 95 % interval of the pair alone; * is told apart, over all pairs at once."
# What a Pareto plot may have on its axis: (key of a cost line, what it is, factor to its unit).
COSTS = (("trainable", "trainable parameters", 1.0), ("artifact_bytes", "artifact, MB", 1e-6),
         ("peak_bytes", "peak memory of a step, MB", 1e-6), ("ratio", "time of a step, relative", 1.0),
         ("flops", "GFLOPs a step", 1e-9))  # fmt: skip


def write(out: Path, lines: list[Line], findings: Sequence[Finding]) -> None:
    """report.html and report.md with its pictures."""
    data = {f.task: plotted(out, lines, f) for f in findings}
    parts = {"facts": facts(lines), "costs": expenses(lines), "runs": runs(lines), "findings": findings,
             "samples": {f.task: samples(lines, f.task) for f in findings}}  # fmt: skip
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no text ends the script
    atomic_write(out / "report.html", env.from_string(template).render(data=text, axes=COSTS, **parts))
    atomic_write(out / "report.md", markdown(parts, [picture(out, i, f, data[f.task]) for i, f in enumerate(findings)]))


def plotted(out: Path, lines: list[Line], f: Finding) -> dict[str, Any]:
    """What the pictures of a task show: points of score and costs, losses by rate, losses by step (seed 0)."""
    costs = {line["method"]: line for line in found(lines, kind="cost")}
    points = [{"name": name, "score": e.mean, "low": e.low, "high": e.high, "good": e.as_good,
               "costs": {key: costs[name][key] * factor for key, _, factor in COSTS}}
              for name, e in f.verdict.methods.items()]  # fmt: skip
    rates: dict[str, Any] = {}
    for line in found(lines, kind="search", task=f.task):
        if "valid_loss" in line:
            rates.setdefault(line["method"], []).append([line["lr"], line["valid_loss"]])
    curves = {}
    for line in found(lines, kind="test", task=f.task, seed=0):
        folder = out / line["folder"]
        if (folder / "metrics.jsonl").exists():
            rows = [r for r in read_metrics(folder) if isfinite(r.get("loss", nan))]
            curves[line["method"]] = [[r["step"], r["loss"]] for r in rows]
    return {"metric": f.metric, "points": points, "rates": {k: sorted(v) for k, v in rates.items()}, "curves": curves}


def markdown(parts: dict[str, Any], pictures: Sequence[str]) -> str:
    """The same numbers as markdown."""
    text = ["# Methods compared", "", *(f"- {name}: {value}" for name, value in parts["facts"])]
    for f, picture in zip(parts["findings"], pictures, strict=True):
        text += ["", f"## {f.label}", "", " ".join(f.words), "", *table(f.scores), "", f"![{f.label}]({picture})", "",
                 DIFFERENCES, "", *table(f.pairs), "", "Answers:", "", *table(parts["samples"][f.task])]  # fmt: skip
    text += ["", "## Costs", "", *table(parts["costs"]), "", "## Runs", "", *table(parts["runs"])]
    return "\n".join(text) + "\n"


def table(grid: TableGrid) -> list[str]:
    """A table's lines."""
    plain = lambda text: text.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    rows = [grid.heads, ["---"] * len(grid.heads), *([cell.text for cell in row] for row in grid.rows)]
    return ["| " + " | ".join(map(plain, row)) + " |" for row in rows]


def picture(out: Path, number: int, f: Finding, data: dict[str, Any]) -> str:
    """A PNG: score against trainable parameters and against a step's time, losses by rate, losses by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, (key, label, _) in zip(axes[0], (COSTS[0], COSTS[3]), strict=True):
        for p in data["points"]:
            x, off = p["costs"][key], [[max(p["score"] - p["low"], 0)], [max(p["high"] - p["score"], 0)]]
            ax.errorbar([x], [p["score"]], yerr=off, fmt="o", color="C0" if p["good"] else "0.6")
            ax.annotate(p["name"], (x, p["score"]), textcoords="offset points", xytext=(5, 4), fontsize=8)
        ax.set(xlabel=label, ylabel=f.metric, xscale="log" if key == "trainable" else "linear")
    for ax, (key, label, scale) in zip(axes[1], (("rates", "learning rate", "log"), ("curves", "step", "linear")),
                                       strict=True):  # fmt: skip
        for name, points in data[key].items():
            ax.plot(*zip(*points, strict=True), marker="o" if key == "rates" else "", markersize=3, label=name)
        ax.set(xlabel=label, ylabel="validation loss" if key == "rates" else "training loss", xscale=scale)
        if data[key]:
            ax.legend(fontsize=7)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    name = "".join(c if c.isalnum() else "_" for c in f.label) + (f"_{number}.png" if number else ".png")
    save_figure(figure, out / name, 110)
    return name
