"""Results as Markdown, and their place in docs/results/steps.md."""

import datetime
import math
import os
import platform
import statistics
from pathlib import Path

from ..machine import cpu_name
from .peer import threads
from .race import Result, ratio

RESULTS = Path(__file__).parents[2] / "docs" / "results"
_HEAD = (
    "case", "method", "who", "ms a step", "middle half", "CPU ms", "tokens/s", "compile s",
    "arguments", "temporaries", "peak", "peak RSS", "libraries", "loss",
)  # fmt: skip


def table(results: list[Result]) -> str:
    """One row a contender; memory in MB (10^6 bytes), losses of the first and the last step."""
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
    """Lines that compare: LoRA to full fine-tuning, and graftax to HF, by time of a step and by peak memory."""
    by = {(r.case.name, r.method, r.who): r for r in results}
    lines = []
    for (case, method, who), r in by.items():
        full, hf = by.get((case, "full", who)), by.get((case, method, "HF"))
        if method != "full" and full:
            lines.append(f"{case}: {who} {method} takes {ratio(full, r):.2f} of the time of full fine-tuning")
        if who == "graftax" and hf:
            net = (r.facts["rss"] - r.facts["libraries"]) / (hf.facts["rss"] - hf.facts["libraries"])
            rss = f"{r.facts['rss'] / hf.facts['rss']:.2f} of its peak RSS ({net:.2f} without the libraries)"
            lines.append(f"{case} {method}: graftax is {ratio(r, hf):.2f} times as fast as HF, in {rss}")
    return lines


def machine(results: list[Result]) -> str:
    """Date, machine, load and versions, in one line."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for r in results:
        versions |= r.facts["versions"]
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    said = " ".join(f"{name} {version}" for name, version in versions.items())
    return f"{datetime.date.today()}, {cpu_name()}, {threads()} cores{load}; {said}."


def section(results: list[Result], malloc: str) -> str:
    """All of one run as Markdown."""
    title = f"### {results[0].case.device}, allocator: {malloc}"
    parts = [title, machine(results), table(results), "\n".join(f"- {line}" for line in ratios(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(text: str, key: str, path: Path = RESULTS / "steps.md") -> None:
    """Put a run between the markers of `key`, in place of the last one there, or at the end."""
    begin, end = f"<!-- begin {key} -->\n", f"<!-- end {key} -->\n"
    old = path.read_text("utf-8") if path.exists() else ""
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2] if found else ""
    separator = "" if found or not before else "\n"
    path.write_text(before + separator + begin + text + end + after, "utf-8")
