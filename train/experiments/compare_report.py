"""What a comparison found, from the lines of results.jsonl alone: tables and plain words, as HTML and as markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ..progress import console
from ..runs.report import format_bytes
from .results_log import Line, found, read
from .stats import ScoreComparison, compare_scores

LOST = "Left out, as a training diverged or none reached its end: "
CHOSEN = "The task has no test: the rows that are scored also chose the rates, so that scores are a little too high."


class TableCell(NamedTuple):
    """What a table shows, and what it is sorted by."""

    text: str
    value: float | str


class TableGrid(NamedTuple):
    """A table."""

    heads: list[str]
    rows: list[list[TableCell]]


class Finding(NamedTuple):
    """What was found on one task."""

    task: str  # as it was given
    label: str
    metric: str
    words: list[str]
    scores: TableGrid
    pairs: TableGrid
    verdict: ScoreComparison


def number(x: float | None, form: str = ".3f", tail: str = "") -> TableCell:
    """A number as a cell; nothing where there is none."""
    return TableCell("", "") if x is None else TableCell(f"{x:{form}}{tail}", float(x))


def word(text: str) -> TableCell:
    """Words as a cell."""
    return TableCell(text, text)


def label(task: str) -> str:
    """What a task is called: a file by its name."""
    return Path(task).name


def mean(lines: Sequence[Line], key: str) -> float | None:
    """The mean of what the lines have; None if one has it not."""
    return sum(line[key] for line in lines) / len(lines) if lines and all(key in line for line in lines) else None


def judged(lines: list[Line], task: str) -> tuple[dict[str, list[Line]], list[str]]:
    """({method: a tested line a seed}, the methods that diverged) on a task."""
    setup = found(lines, kind="setup")[0]
    whole = {name: [line for line in found(lines, kind="test", task=task, method=name) if "score" in line]
             for name in setup["methods"]}  # fmt: skip
    return ({name: sheets for name, sheets in whole.items() if len(sheets) == setup["seeds"]},
            [name for name, sheets in whole.items() if len(sheets) < setup["seeds"]])  # fmt: skip


def finding(lines: list[Line], task: str) -> Finding:
    """Scores with their intervals, the best first, and what they say."""
    setup = found(lines, kind="setup")[0]
    metric = setup["tasks"][task]["metric"]
    sheets, diverged = judged(lines, task)
    seen = compare_scores(sheets)
    heads = ["method", metric, "95 % interval", "by seed", "behind the best", "interval", "tied with it",
             "validation loss", "rate", "forgetting"]  # fmt: skip
    rows = []
    for name, e in seen.methods.items():
        mine = sheets[name]
        rates = sorted(line["lr"] for line in found(lines, kind="search", task=task, method=name))
        edge = {rates[0]: " ↓", rates[-1]: " ↑"}.get(mine[0]["lr"], "") if len(rates) > 1 else ""
        rows.append([
            word(name), number(e.mean), TableCell(f"{e.low:.3f} to {e.high:.3f}", e.low),
            TableCell(" ".join(f"{line['score']:.3f}" for line in mine), e.mean), number(e.behind),
            TableCell(f"{e.behind_low:.3f} to {e.behind_high:.3f}", e.behind_low), word("yes" if e.as_good else ""),
            number(mean(mine, "valid_loss")), number(mine[0]["lr"], ".2g", edge),
            number(mean(mine, "forgetting"), "+.3f"),
        ])  # fmt: skip
    names = list(seen.methods)
    pairs = TableGrid(["", *names[1:]], [
        [word(a), *(_difference(seen, a, b) for b in names[1:])] for a in names[:-1]
    ])  # fmt: skip
    words = _words(lines, task, metric, seen, diverged, [row[0].text for row in rows if row[8].text[-1:] in "↓↑"])
    return Finding(task, label(task), metric, words, TableGrid(heads, rows), pairs, seen)


def _difference(seen: ScoreComparison, a: str, b: str) -> TableCell:
    if (a, b) not in seen.pairs:
        return TableCell("", "")
    d, low, high = seen.pairs[a, b]
    return TableCell(f"{d:+.3f} ({low:+.3f} to {high:+.3f}){' *' if d > seen.apart else ''}", d)


def _words(
    lines: list[Line], task: str, metric: str, seen: ScoreComparison, diverged: list[str], edges: list[str]
) -> list[str]:
    """What may be said of a task."""
    setup, said = found(lines, kind="setup")[0], []
    reference = setup.get("reference", "full")
    costs = {line["method"]: line for line in found(lines, kind="cost")}
    (first, best), *_ = seen.methods.items() if seen.methods else [("", None)]
    if best is None:
        return [f"Every method diverged on {task}."]
    good = [name for name, e in seen.methods.items() if e.as_good]
    base = found(lines, kind="base", task=task)[0]
    lost = [LOST + f"{', '.join(diverged)}."] if diverged else []
    if best.mean <= base["score"]:
        none = f"No method is above the base as it is, which has {base['score']:.3f}: train longer, or on more."
        return [none, *lost]
    score = f"{best.mean:.3f} ({best.low:.3f} to {best.high:.3f})"
    if len(seen.methods) == 1:
        said.append(f"{first} alone reached its end: {metric} {score}.")
    elif len(good) == 1:
        said.append(f"{first} has the best {metric}, {score}, and is told apart from every other method: it is ahead "
                    f"by more than {seen.apart:.3f}.")  # fmt: skip
    else:
        said.append(f"No winner: {', '.join(good)} are not told apart, as differences up to {seen.apart:.3f} are "
                    f"within the noise. The highest {metric} is {first}'s, {score}.")  # fmt: skip
    for what, key, shown in (("trains least", "trainable", lambda n: f"{n:,} parameters"),
                             ("has the fastest step", "ratio", lambda x: f"{x:.2f} of {reference}'s"),
                             ("needs the least memory", "peak_bytes", format_bytes)):  # fmt: skip
        least = min(good, key=lambda name: costs[name][key])
        if len(good) > 1:
            said.append(f"Of these {least} {what}: {shown(costs[least][key])}.")
    said.append(f"The base as it is has {base['score']:.3f}.")
    if setup["seeds"] > 1:
        said.append(f"Standard deviation between seeds: {seen.spread:.3f}.")
    else:
        said.append("One seed: what another would have given is not known, and the intervals are of the rows alone.")
    if edges:
        said.append(f"The best rate is the highest or lowest tried (↑ ↓) of {', '.join(edges)}: a better one may lie "
                    "beyond, and the score is a lower bound.")  # fmt: skip
    if setup["tasks"][task].get("part") == "validation":
        said.append(CHOSEN)
    return said + lost


def expenses(lines: list[Line]) -> TableGrid:
    """What a step of each method costs."""
    reference = found(lines, kind="setup")[0].get("reference", "full")
    heads = ["method", "trainable", "of the base", "artifact", "peak memory", "GFLOPs a step", "ms a step",
             f"of {reference}'s"]  # fmt: skip
    rows = [[
        word(c["method"]), number(c["trainable"], ",d"), number(100 * c["share"], ".3g", " %"),
        TableCell(format_bytes(c["artifact_bytes"]), c["artifact_bytes"]),
        TableCell(format_bytes(c["peak_bytes"]), c["peak_bytes"]),
        number(c["flops"] / 1e9, ".2f"), number(1e3 * c["seconds"], ".0f"), number(c["ratio"], ".2f"),
    ] for c in found(lines, kind="cost")]  # fmt: skip
    return TableGrid(heads, rows)


def facts(lines: list[Line]) -> list[tuple[str, str]]:
    """How it was made."""
    s = found(lines, kind="setup")[0]
    steps = next((line["steps"] for line in lines if line["kind"] == "search"), 0)
    rows, T = s["rows"]
    tested = ", ".join(f"{label(task)} {t['rows']:,} ({t.get('part', 'test')})" for task, t in s["tasks"].items())
    return [
        ("command", s["command"]), ("base", f"{s['base']}, {s['parameters']:,} parameters"),
        ("fingerprint of the base", s["fingerprint"]), ("each training", f"{steps} steps of {rows} x {T} tokens"),
        ("rates", f"of each method {len(s['factors'])} are tried on seed 0: its own guess x {s['rate']:g} x "
                  f"{', '.join(f'{f:g}' for f in s['factors'])}; the least validation loss chooses"),
        ("seeds", str(s["seeds"])), ("rows that are scored", tested), ("machine", s["machine"]), ("date", s["date"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in s["versions"].items()) + f", code {s['code'] or 'unknown'}"),
    ]  # fmt: skip


def runs(lines: list[Line]) -> TableGrid:
    """The tested runs: the command that makes each again, and digests of what went in and came out."""
    out = found(lines, kind="setup")[0].get("out", ".")
    rows = [[
        word(label(t["task"])), word(t["method"]), number(t["seed"], "d"), number(t["lr"], ".3g"),
        word(f"graftax finetune {out}/{t['folder']}/config.json --out again"), word(t["digests"]["rows"][:12]),
        word(t["digests"]["trainable"][:12]),
    ] for t in found(lines, kind="test") if "digests" in t]  # fmt: skip
    heads = ["task", "method", "seed", "rate", "command", "sha256 of its rows", "of what it trained"]
    return TableGrid(heads, rows)  # fmt: skip


def samples(lines: list[Line], task: str) -> TableGrid:
    """Rows of the test, and what each method's first seed answers."""
    shown = found(lines, kind="setup")[0]["tasks"][task]["shown"]
    sheets = {"the base": found(lines, kind="base", task=task)[0]}
    sheets |= {line["method"]: line for line in found(lines, kind="test", task=task, seed=0) if "samples" in line}
    rows = [[word(row["prompt"]), word(row["wanted"]), *(word(sheet["samples"][i]) for sheet in sheets.values())]
            for i, row in enumerate(shown)]  # fmt: skip
    return TableGrid(["prompt", "wanted", *sheets], rows)


def report(out: Path) -> dict[str, Any]:
    """Writes report.html and report.md, says the tables, and returns what they hold."""
    from .report_page import write

    lines = read(out / "results.jsonl")
    found_here = [finding(lines, task) for task in found(lines, kind="setup")[0]["tasks"]]
    write(out, lines, found_here)
    for f in found_here:
        shown = Table(box=None, pad_edge=False, title=f"{f.label}: {f.metric}", title_justify="left")
        few = [i for i, head in enumerate(f.scores.heads) if head not in ("by seed", "interval")]  # of a line's width
        for i in few:
            shown.add_column(f.scores.heads[i], justify="right" if i else "left")
        for row in f.scores.rows:
            shown.add_row(*(row[i].text for i in few))
        console.print(shown)
        console.print(" ".join(f.words), soft_wrap=True)
    said = f"wrote {out}/: report.html, report.md, results.jsonl; search/ and seeds/ are sweeps"
    console.print(said, soft_wrap=True)
    tasks = {}
    for f in found_here:
        methods = {name: e._asdict() for name, e in f.verdict.methods.items()}
        tasks[f.task] = {"metric": f.metric, "apart": f.verdict.apart, "words": f.words, "methods": methods}
    return {"out": str(out), "tasks": tasks}
