"""Tables and conclusions of a comparison, computed from the lines of results.jsonl alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...runs.report import format_bytes
from ..results_log import Line, select
from ..stats import ScoreComparison, compare_scores
from .tables import Cell, Table, number, word

LEFT_OUT = "Left out, because a training diverged or did not reach its end: "
VALIDATION_SCORED = ("The task has no test rows: the scored rows also chose the learning rates, so that scores are "
                     "slightly too high.")  # fmt: skip


class TaskReport(NamedTuple):
    """The results of all methods on one task."""

    task: str  # as it was given: a name or a file
    label: str
    metric: str
    sentences: list[str]
    scores: Table
    pairs: Table
    comparison: ScoreComparison


def task_label(task: str) -> str:
    """Return the name of a task; of a file without its folder."""
    return Path(task).name


def tested_methods(lines: list[Line], task: str) -> tuple[dict[str, list[Line]], list[str]]:
    """Return ({method: its test line of each seed}, the methods of which a seed is missing) on a task."""
    setup = select(lines, kind="setup")[0]
    tested = {name: [line for line in select(lines, kind="test", task=task, method=name) if "score" in line]
              for name in setup["methods"]}  # fmt: skip
    complete = {name: seeds for name, seeds in tested.items() if len(seeds) == setup["seeds"]}
    return complete, [name for name in tested if name not in complete]


def task_report(lines: list[Line], task: str) -> TaskReport:
    """Return scores with their intervals, the best first, and what follows from them."""
    metric = select(lines, kind="setup")[0]["tasks"][task]["metric"]
    predictions, left_out = tested_methods(lines, task)
    comparison = compare_scores(predictions)
    rows, edges = [], []
    for name, e in comparison.methods.items():
        seeds = predictions[name]
        rates = sorted(line["lr"] for line in select(lines, kind="search", task=task, method=name))
        arrow = {rates[0]: " ↓", rates[-1]: " ↑"}.get(seeds[0]["lr"], "") if len(rates) > 1 else ""
        edges += [name] if arrow else []
        rows.append([
            word(name), number(e.mean), Cell(f"{e.low:.3f} to {e.high:.3f}", e.low),
            Cell(" ".join(f"{line['score']:.3f}" for line in seeds), e.mean), number(e.gap_to_best),
            Cell(f"{e.gap_low:.3f} to {e.gap_high:.3f}", e.gap_low), word("yes" if e.as_good else ""),
            number(_mean(seeds, "valid_loss")), number(seeds[0]["lr"], ".2g", arrow),
            number(_mean(seeds, "forgetting"), "+.3f"),
        ])  # fmt: skip
    heads = ["method", metric, "95 % interval", "by seed", "gap to best", "gap interval", "tied with best",
             "validation loss", "learning rate", "forgetting"]  # fmt: skip
    names = list(comparison.methods)
    pairs = [[word(a), *(_difference(comparison, a, b) for b in names[1:])] for a in names[:-1]]
    sentences = _sentences(lines, task, metric, comparison, left_out, edges)
    return TaskReport(
        task, task_label(task), metric, sentences, Table(heads, rows), Table(["", *names[1:]], pairs), comparison
    )


def _mean(lines: Sequence[Line], key: str) -> float | None:
    """Return the mean of a key, or None if a line lacks it."""
    return sum(line[key] for line in lines) / len(lines) if lines and all(key in line for line in lines) else None


def _difference(comparison: ScoreComparison, a: str, b: str) -> Cell:
    if (a, b) not in comparison.pairs:
        return Cell("", "")
    gap, low, high = comparison.pairs[a, b]
    star = " *" if gap > comparison.significant_gap else ""
    return Cell(f"{gap:+.3f} ({low:+.3f} to {high:+.3f}){star}", gap)


def _sentences(
    lines: list[Line], task: str, metric: str, comparison: ScoreComparison, left_out: list[str], edges: list[str]
) -> list[str]:
    """Return the conclusions about a task; `edges`: methods whose best learning rate is the least or largest tried."""
    setup, base = select(lines, kind="setup")[0], select(lines, kind="base", task=task)[0]
    if not comparison.methods:
        return [f"Every method diverged on {task}."]
    (first, best), *_ = comparison.methods.items()
    last = [LEFT_OUT + f"{', '.join(left_out)}."] if left_out else []
    if best.mean <= base["score"]:
        return [f"No method beats the untuned base, which scores {base['score']:.3f}: train longer, or on more.", *last]
    tied = [name for name, e in comparison.methods.items() if e.as_good]
    score, gap = f"{best.mean:.3f} ({best.low:.3f} to {best.high:.3f})", f"{comparison.significant_gap:.3f}"
    if len(comparison.methods) == 1:
        sentences = [f"Only {first} reached its end: {metric} {score}."]
    elif len(tied) == 1:
        sentences = [f"{first} has the best {metric}, {score}, and its lead over every other method is significant: "
                     f"larger than {gap}."]  # fmt: skip
    else:
        sentences = [f"No winner: {', '.join(tied)} do not differ significantly, as differences up to {gap} are within "
                     f"the noise. The highest {metric} is that of {first}, {score}."]  # fmt: skip
        sentences += _cheapest_sentences(lines, tied, setup.get("reference", "full"))
    sentences.append(f"The untuned base scores {base['score']:.3f}.")
    if setup["seeds"] > 1:
        sentences.append(f"Standard deviation between seeds: {comparison.seed_deviation:.3f}.")
    else:
        sentences.append("One seed: the variation between seeds is unknown, and the intervals cover test rows only.")
    if edges:
        sentences.append(f"The best learning rate of {', '.join(edges)} is the highest or lowest tried (↑ ↓): a better "
                         "one may lie beyond, and the score is a lower bound.")  # fmt: skip
    if setup["tasks"][task].get("part") == "validation":
        sentences.append(VALIDATION_SCORED)
    return sentences + last


def _cheapest_sentences(lines: list[Line], methods: list[str], reference: str) -> list[str]:
    costs = {line["method"]: line for line in select(lines, kind="cost")}
    measures = (("trains the fewest parameters", "trainable", lambda n: f"{n:,}"),
                ("has the fastest step", "ratio", lambda x: f"{x:.2f} of the time of {reference}"),
                ("needs the least memory", "peak_bytes", format_bytes))  # fmt: skip
    sentences = []
    for predicate, key, text in measures:
        least = min(methods, key=lambda name: costs[name][key])
        sentences.append(f"Of these {least} {predicate}: {text(costs[least][key])}.")
    return sentences


def cost_table(lines: list[Line]) -> Table:
    """Return the costs of a training step of each method."""
    reference = select(lines, kind="setup")[0].get("reference", "full")
    rows = [[
        word(cost["method"]), number(cost["trainable"], ",d"), number(100 * cost["share"], ".3g", " %"),
        Cell(format_bytes(cost["artifact_bytes"]), cost["artifact_bytes"]),
        Cell(format_bytes(cost["peak_bytes"]), cost["peak_bytes"]), number(cost["flops"] / 1e9, ".2f"),
        number(1e3 * cost["seconds"], ".0f"), number(cost["ratio"], ".2f"),
    ] for cost in select(lines, kind="cost")]  # fmt: skip
    heads = ["method", "trainable", "of the base", "artifact", "peak memory", "GFLOPs per step", "ms per step",
             f"relative to {reference}"]  # fmt: skip
    return Table(heads, rows)


def setup_facts(lines: list[Line]) -> list[tuple[str, str]]:
    """Return (name, value) of everything that is needed to repeat the experiment."""
    setup = select(lines, kind="setup")[0]
    steps = next((line["steps"] for line in lines if line["kind"] == "search"), 0)
    batch, T = setup["rows"]
    scored = ", ".join(f"{task_label(t)} {about['rows']:,} ({about.get('part', 'test')})"
                       for t, about in setup["tasks"].items())  # fmt: skip
    factors = ", ".join(f"{factor:g}" for factor in setup["factors"])
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return [
        ("command", setup["command"]), ("base", f"{setup['base']}, {setup['parameters']:,} parameters"),
        ("fingerprint of the base", setup["fingerprint"]), ("each training", f"{steps} steps of {batch} x {T} tokens"),
        ("learning rates", f"each method tries {len(setup['factors'])} on seed 0: {setup['rate']:g} x its own factor x "
                           f"{factors}; the least validation loss chooses"),
        ("seeds", str(setup["seeds"])), ("scored rows", scored), ("machine", setup["machine"]),
        ("date", setup["date"]), ("versions", f"{versions}, code {setup['code'] or 'unknown'}"),
    ]  # fmt: skip


def run_table(lines: list[Line]) -> Table:
    """Return the tested runs: the command that repeats each, and digests of its rows and of what it trained."""
    out = select(lines, kind="setup")[0].get("out", ".")
    rows = [[
        word(task_label(test["task"])), word(test["method"]), number(test["seed"], "d"), number(test["lr"], ".3g"),
        word(f"graftax finetune {out}/{test['folder']}/config.json --out again"), word(test["digests"]["rows"][:12]),
        word(test["digests"]["trainable"][:12]),
    ] for test in select(lines, kind="test") if "digests" in test]  # fmt: skip
    heads = ["task", "method", "seed", "learning rate", "command", "sha256 of rows", "sha256 of trainable"]
    return Table(heads, rows)


def answer_table(lines: list[Line], task: str) -> Table:
    """Return rows of the test with the answers of the base and of the first seed of each method."""
    shown = select(lines, kind="setup")[0]["tasks"][task]["shown"]
    columns = {"the base": select(lines, kind="base", task=task)[0]}
    columns |= {line["method"]: line for line in select(lines, kind="test", task=task, seed=0) if "samples" in line}
    rows = [[word(row["prompt"]), word(row["expected"]), *(word(line["samples"][i]) for line in columns.values())]
            for i, row in enumerate(shown)]  # fmt: skip
    return Table(["prompt", "expected", *columns], rows)
