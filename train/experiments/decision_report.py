"""Which way to a target is the cheapest, by a stated rule, and what would change that: from results.jsonl alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ...atomic import atomic_write
from ..progress import console, format_time
from ..runs.report import format_bytes
from .compare_report import CHOSEN, LOST, TableGrid, facts, judged, label, number, runs, samples, word
from .learning_curve import Outlook, draw, outlook
from .report_page import table
from .results_log import Line, found, read
from .stats import Estimate, averaged, compare_scores

RULE = ("An option reaches the target if its score does, surely if the lower end of its 95 % interval does. Of those "
        "that surely reach it (of those that reach it, if none surely does) the one with the fewest FLOPs is taken: of "
        "its trainings, all rates that were tried, and of the requests.")  # fmt: skip


class Option(NamedTuple):
    """A way to answer: how good, and what it costs."""

    name: str
    estimate: Estimate
    examples: int
    train_flops: float
    train_seconds: float
    request_flops: float
    request_seconds: float
    prompt_tokens: float
    bytes: int  # beside the base, where it is deployed

    def flops(self, requests: float) -> float:
        """Of its trainings and of so many requests."""
        return self.train_flops + requests * self.request_flops


def question(lines: list[Line]) -> tuple[str, dict[str, Any], Line]:
    """(the task, what is known of it, what was asked)."""
    (task, about), *_ = found(lines, kind="setup")[0]["tasks"].items()
    return task, about, found(lines, kind="asked")[0]


def options(lines: list[Line]) -> list[Option]:
    """All that were measured, as they were tried."""
    task, about, asked = question(lines)
    prompted = found(lines, kind="option")
    seen = compare_scores({line["name"]: [line] for line in prompted}).methods if prompted else {}
    made = [Option(line["name"], seen[line["name"]], line["examples"], line["made_flops"], line["made_seconds"],
                   line["request_flops"], line["request_seconds"], line["prompt_tokens"], line["bytes"])
            for line in prompted]  # fmt: skip
    sheets, _ = judged(lines, task)
    trained = compare_scores(sheets).methods if sheets else {}
    costs = {line["method"]: line for line in found(lines, kind="cost")}
    for name in sheets:
        cost, tested = costs[name], sheets[name]
        tried = len(found(lines, kind="search", task=task, method=name))
        steps = tested[0]["steps"] * tried
        fast = min(line["seconds"] for line in tested) / about["rows"]
        request = asked["request_flops"] * (1 + cost["virtual"] / asked["request_tokens"])
        examples = tested[0].get("examples", 0) or asked["examples"]
        made.append(Option(name, trained[name], examples, cost["flops"] * steps,
                           cost["seconds"] * steps, request, fast, asked["prompt_tokens"] + cost["virtual"],
                           cost["artifact_bytes"]))  # fmt: skip
    return made


def cheapest(made: Sequence[Option], target: float, requests: float) -> tuple[Option | None, bool]:
    """(what the rule takes, whether it surely reaches the target); None if nothing reaches it."""
    for reach, sure in ((lambda o: o.estimate.low >= target, True), (lambda o: o.estimate.mean >= target, False)):
        if able := [option for option in made if reach(option)]:
            return min(able, key=lambda option: (option.flops(requests), option.bytes)), sure
    return None, False


def predicted_scores(lines: list[Line], target: float) -> tuple[list[int], Outlook] | None:
    """(sizes, what their curve says of more examples); None for fewer than two sizes."""
    task, _, asked = question(lines)
    sheets, _ = judged(lines, task)
    whole = {name: sheets[name] for name in asked["sizes"] if name in sheets}
    if len(whole) < 2:
        return None
    sizes = [asked["sizes"][name] for name in whole]
    means = [asked["gold"] - float(np.mean([line["score"] for line in tested])) for tested in whole.values()]
    draws = asked["gold"] - averaged(whole)
    return sizes, outlook(sizes, draws, means, asked["gold"] - target)


def decision(lines: list[Line]) -> str:
    """One plain paragraph."""
    task, about, _ = question(lines)
    _, lost = judged(lines, task)
    said = [_decided(lines), *([LOST + f"{', '.join(lost)}."] if lost else [])]
    return " ".join([*said, *([CHOSEN] if about.get("part") == "validation" else [])])


def _decided(lines: list[Line]) -> str:
    _, about, asked = question(lines)
    made, target, requests = options(lines), asked["target"], asked["requests"]
    goal = f"{about['metric']} >= {target:g}"
    best, sure = cheapest(made, target, requests)
    if best is None:
        top = max(made, key=lambda option: option.estimate.mean)
        return (f"No option reaches {goal}: the best is {top.name} with {scored(top)}. {more(lines, target)} What is "
                "left is a better base (trained longer, on more, or larger), which was not measured here, or a lower "
                "target.")  # fmt: skip
    reaches = "surely reaches" if sure else "reaches"
    said = [
        f"The cheapest that {reaches} {goal} is {best.name}: {scored(best)}, for "
        f"{best.flops(requests):.2g} FLOPs over {requests:,} requests ({best.train_flops:.2g} to train)."
    ]
    if not sure:
        said.append("Its interval goes below the target, so another test, or another seed, may find that it misses.")
    able = [o for o in made if (o.estimate.low if sure else o.estimate.mean) >= target and o is not best]
    if able:
        second = min(able, key=lambda option: option.flops(requests))
        times = f"{second.flops(requests) / best.flops(requests):.2g} times that" if best.flops(requests) else (
            f"{second.flops(requests):.2g}")  # fmt: skip
        said.append(f"The next is {second.name} with {scored(second)}, at {times}.")
    said += [*changes(made, able, best, target, requests), *raised(made, best, sure, requests)]
    return " ".join([*said, more(lines, target)]).strip()


def scored(option: Option) -> str:
    """`0.812 (0.790 to 0.833)`."""
    e = option.estimate
    return f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})"


def changes(
    made: Sequence[Option], able: Sequence[Option], best: Option, target: float, requests: float
) -> list[str]:  # fmt: skip
    """What would change the answer: the number of requests, and the target."""
    said = []
    for other in able:  # where the two lines of cost over requests cross
        slope = best.request_flops - other.request_flops
        if slope and (cross := (other.train_flops - best.train_flops) / slope) > 0:
            way = "more" if cross > requests else "fewer"
            said.append((abs(math.log(cross / max(requests, 1))), f"With {way} than about {cross:,.0f} requests "
                         f"{other.name} would be cheaper."))  # fmt: skip
    said = [text for _, text in sorted(said)[:1]]
    less = [o for o in made if 0 < o.estimate.low < target and o.flops(requests) < best.flops(requests)]
    if less:
        lower = max(less, key=lambda option: option.estimate.low)
        said.append(f"A target of {lower.estimate.low:.3f} or less would let {lower.name} do, for "
                    f"{lower.flops(requests):.2g} FLOPs.")  # fmt: skip
    return said


def raised(made: Sequence[Option], best: Option, sure: bool, requests: float) -> list[str]:
    """What a higher target would take, and the highest score, if it is of yet another."""
    reached = lambda o: o.estimate.low if sure else o.estimate.mean  # noqa: E731
    other, surely = best, "surely " * sure
    said = [f"Nothing that was tried {surely}reaches more than {reached(best):.3f}."]
    if better := [o for o in made if reached(o) > reached(best)]:
        other = min(better, key=lambda option: option.flops(requests))
        said = [f"A target above {reached(best):.3f} would take {other.name}, {scored(other)}, at "
                f"{other.flops(requests):.2g} FLOPs."]  # fmt: skip
    top = max(made, key=lambda option: option.estimate.mean)
    if top is not best and top is not other:
        said.append(f"The highest score is that of {top.name}, {scored(top)}.")
    return said


def more(lines: list[Line], target: float) -> str:
    """What the learning curve says."""
    *_, asked = question(lines)
    seen = predicted_scores(lines, target)
    if seen is None:
        return ""
    sizes, look = seen
    name = asked["peft"].get("name", "the method")
    said = f"In as many steps the error of {name} falls as n^-{look.curve.c:.2f} with n examples"
    if look.curve.c <= 0.005:
        said = f"In as many steps the error of {name} does not fall with more examples"
    elif math.isfinite(look.missed):
        said += f" (a fit to fewer than {sizes[-1]:,} foretold {sizes[-1]:,}'s to within {abs(look.missed):.3f})"
    options_ = {option.name: option.estimate.mean for option in options(lines)}
    enough = [n for name, n in asked["sizes"].items() if options_.get(name, -math.inf) >= target]
    if enough:
        return f"{said}; {min(enough):,} were enough for the target."
    if not look.needed <= 100 * sizes[-1]:
        return f"{said}: no number of examples that could be got would reach the target."
    high = f"{look.needed_high:,.0f}" if look.needed_high < 1e9 else "more than could be got"
    return (f"{said}: it would take about {look.needed:,.0f} examples ({look.needed_low:,.0f} to {high}), of which "
            f"there are {asked['examples']:,}; beyond those that were tried this is a guess.")  # fmt: skip


def grid(lines: list[Line]) -> TableGrid:
    """The table of all that was measured."""
    _, about, asked = question(lines)
    heads = ["option", about["metric"], "95 % interval", "reaches it", "examples", "trained for", "to train, FLOPs",
             "prompt tokens", "a request, FLOPs", "ms", "bytes beside the base", "in all, FLOPs"]  # fmt: skip
    rows = []
    for o in options(lines):
        e, target = o.estimate, asked["target"]
        reach = "surely" if e.low >= target else "yes" if e.mean >= target else ""
        rows.append([
            word(o.name), number(e.mean), word(f"{e.low:.3f} to {e.high:.3f}"), word(reach), number(o.examples, ",d"),
            word(format_time(o.train_seconds) if o.train_flops else ""), number(o.train_flops, ".2g"),
            number(o.prompt_tokens, ".0f"), number(o.request_flops, ".2g"), number(1e3 * o.request_seconds, ".1f"),
            word(format_bytes(o.bytes)), number(o.flops(asked["requests"]), ".2g"),
        ])  # fmt: skip
    return TableGrid(heads, rows)


def report(out: Path) -> dict[str, Any]:
    """Writes decision.md and curve.png, says table and decision, and returns them."""
    lines = read(out / "results.jsonl")
    task, about, asked = question(lines)
    seen, text = grid(lines), decision(lines)
    form = found(lines, kind="form")
    parts = ["# Decision", "", text, "", f"Rule: {RULE}", "", *table(seen), ""]
    if drawn_ := picture(out, lines):
        parts += [f"![learning curve]({drawn_})", ""]
    parts += [f"- {name}: {value}" for name, value in facts(lines)]
    parts += [f"- prompts: as {form[0]['form']}, up to {asked['shots']} examples"] if form else []
    parts += ["", "## Trained runs", "", *table(runs(lines)), "", "## Answers", "", *table(samples(lines, task))]
    atomic_write(out / "decision.md", "\n".join(parts) + "\n")
    shown, few = Table(box=None, pad_edge=False, title=f"{label(task)}: {about['metric']}"), (0, 1, 2, 3, 4, 7, 11)
    for i in few:
        shown.add_column(seen.heads[i], justify="right" if i else "left")
    for row in seen.rows:
        shown.add_row(*(row[i].text for i in few))
    console.print(shown)
    console.print(text, soft_wrap=True)
    console.print(f"wrote {out}/: decision.md, results.jsonl; search/ and seeds/ are sweeps", soft_wrap=True)
    rows = [dict(zip(seen.heads, (cell.value for cell in row), strict=True)) for row in seen.rows]
    return {"out": str(out), "decision": text, "options": rows}


def picture(out: Path, lines: list[Line]) -> str:
    """curve.png: error over examples, its fit, and the target."""
    *_, asked = question(lines)
    if (seen := predicted_scores(lines, asked["target"])) is None:
        return ""
    sizes, look = seen
    by_name = {option.name: option for option in options(lines)}
    kept = [by_name[name].estimate for name in asked["sizes"] if name in by_name]
    errors = [[asked["gold"] - getattr(e, key) for e in kept] for key in ("mean", "high", "low")]
    draw(out / "curve.png", sizes, errors, look.curve, asked["gold"] - asked["target"])
    return "curve.png"
