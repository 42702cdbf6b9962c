"""Results as Markdown tables, and writing them into docs/results."""

import datetime
import math
import os
import platform
import statistics
from pathlib import Path

from ..machine import cpu_cores, cpu_name
from .race import Result
from .timing import median_ratio

RESULTS = Path(__file__).parents[2] / "docs" / "results"
_HEAD = (
    "case", "method", "who", "ms a step", "middle half", "CPU ms", "tokens/s", "compile s",
    "arguments", "temporaries", "peak", "peak RSS", "libraries", "loss",
)  # fmt: skip


def table(results: list[Result]) -> str:
    """Return a table with a row for each contender: memory in MB (10^6 bytes), losses of the first and last step."""
    rows = [_HEAD, *(_row(r) for r in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i > 2 else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(r: Result) -> tuple[str, ...]:
    ordered, n = sorted(r.seconds), len(r.seconds)
    spread = f"{1e3 * ordered[n // 4]:.0f}-{1e3 * ordered[-1 - n // 4]:.0f}"
    memory = [_number(r.facts.get(k)) for k in ("arguments", "temporaries", "peak", "rss", "libraries")]
    if r.facts.get("device") is not None:
        memory[2] = f"{_number(r.facts['device'])} (device)"
    loss = f"{r.losses[0]:.2f} > {r.losses[-1]:.2f}" if all(map(math.isfinite, r.losses)) else "NOT FINITE"
    cpu = f"{1e3 * statistics.median(r.cpu):.0f}"
    speed = (f"{r.ms:.0f}", spread, cpu, f"{1e3 * r.case.tokens / r.ms:.0f}", _number(r.facts.get("compile"), 1))
    return (r.case.name, r.method, r.who, *speed, *memory, loss)


def _number(x: float | None, digits: int = 0) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def ratios(results: list[Result]) -> list[str]:
    """Return lines that compare LoRA to full fine-tuning, and graftax to HF: step time and peak memory."""
    by = {(r.case.name, r.method, r.who): r for r in results}
    lines = []
    for (case, method, who), r in by.items():
        full, hf = by.get((case, "full", who)), by.get((case, method, "HF"))
        if method != "full" and full:
            share = median_ratio(r.seconds, full.seconds)
            lines.append(f"{case}: {who} {method} takes {share:.2f} of the time of full fine-tuning")
        if who == "graftax" and hf:
            speedup = median_ratio(hf.seconds, r.seconds)
            net = (r.facts["rss"] - r.facts["libraries"]) / (hf.facts["rss"] - hf.facts["libraries"])
            rss = f"{r.facts['rss'] / hf.facts['rss']:.2f} of its peak RSS ({net:.2f} without the libraries)"
            lines.append(f"{case} {method}: graftax is {speedup:.2f} times as fast as HF, in {rss}")
    return lines


def machine(results: list[Result]) -> str:
    """Return date, machine, load and versions in one line."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for r in results:
        versions |= r.facts["versions"]
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    packages = " ".join(f"{name} {version}" for name, version in versions.items())
    return f"{datetime.date.today()}, {cpu_name()}, {cpu_cores()} cores{load}; {packages}."


def section(results: list[Result], malloc: str) -> str:
    """Return the results of one run of the benchmark as Markdown."""
    title = f"### {results[0].case.device}, allocator: {malloc}"
    parts = [title, machine(results), table(results), "\n".join(f"- {line}" for line in ratios(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(text: str, key: str, path: Path = RESULTS / "steps.md") -> None:
    """Write text between the markers of `key`, over the last results there, or else at the end of the file."""
    begin, end = f"<!-- begin {key} -->\n", f"<!-- end {key} -->\n"
    old = path.read_text("utf-8") if path.exists() else ""
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2] if found else ""
    separator = "" if found or not before else "\n"
    path.write_text(before + separator + begin + text + end + after, "utf-8")
