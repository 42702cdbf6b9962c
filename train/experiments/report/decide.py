"""Report of a decision: the cheapest approach that reaches the target, and what would change that."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....atomic import atomic_write
from ...progress import console, format_time
from ...runs.report import format_bytes
from ..results_log import Line, read_results, select
from .comparison import (
    LEFT_OUT,
    VALIDATION_SCORED,
    answer_table,
    run_table,
    setup_facts,
    task_label,
    tested_methods,
)
from .options import RULE, Option, cheapest, forecast_examples, question, read_options
from .plots import plot_learning_curve
from .tables import Table, number, word

NOT_PRINTED = ("trained for", "training FLOPs", "FLOPs per request", "ms per request", "stored bytes")


def report(out: Path) -> dict[str, Any]:
    """Write decision.md and curve.png, print table and decision, and return them."""
    lines = read_results(out / "results.jsonl")
    task, about, settings = question(lines)
    table, text = option_table(lines), decision(lines)
    parts = ["# Decision", "", text, "", f"Rule: {RULE}", "", *table.markdown(), ""]
    if _draw_curve(out / "curve.png", lines):
        parts += ["![learning curve](curve.png)", ""]
    parts += [f"- {name}: {value}" for name, value in setup_facts(lines)]
    for line in select(lines, kind="prompt_format"):
        parts.append(f"- prompts: as {line['format']}, up to {settings['shots']} examples")
    parts += ["", "## Trained runs", "", *run_table(lines).markdown(), "", "## Answers", "",
              *answer_table(lines, task).markdown()]  # fmt: skip
    atomic_write(out / "decision.md", "\n".join(parts) + "\n")
    table.print(f"{task_label(task)}: {about['metric']}", without=NOT_PRINTED)
    console.print(text, soft_wrap=True)
    console.print(f"wrote {out}/: decision.md, results.jsonl; search/ and seeds/ are sweeps", soft_wrap=True)
    return {"out": str(out), "decision": text, "options": table.records()}


def option_table(lines: list[Line]) -> Table:
    """Return the table of all options."""
    _, about, settings = question(lines)
    heads = ["option", about["metric"], "95 % interval", "reaches target", "examples", "trained for", "training FLOPs",
             "prompt tokens", "FLOPs per request", "ms per request", "stored bytes", "total FLOPs"]  # fmt: skip
    rows = []
    for o in read_options(lines):
        e, target = o.estimate, settings["target"]
        reaches = "reliably" if e.low >= target else "yes" if e.mean >= target else ""
        rows.append([
            word(o.name), number(e.mean), word(f"{e.low:.3f} to {e.high:.3f}"), word(reaches), number(o.examples, ",d"),
            word(format_time(o.train_seconds) if o.train_flops else ""), number(o.train_flops, ".2g"),
            number(o.prompt_tokens, ".0f"), number(o.request_flops, ".2g"), number(1e3 * o.request_seconds, ".1f"),
            word(format_bytes(o.bytes)), number(o.flops(settings["requests"]), ".2g"),
        ])  # fmt: skip
    return Table(heads, rows)


def decision(lines: list[Line]) -> str:
    """Return the decision as one paragraph."""
    task, about, _ = question(lines)
    _, left_out = tested_methods(lines, task)
    sentences = _decision_sentences(lines)
    if left_out:
        sentences.append(LEFT_OUT + f"{', '.join(left_out)}.")
    if about.get("part") == "validation":
        sentences.append(VALIDATION_SCORED)
    return " ".join(sentences)


def _decision_sentences(lines: list[Line]) -> list[str]:
    _, about, settings = question(lines)
    options, target, requests = read_options(lines), settings["target"], settings["requests"]
    goal = f"{about['metric']} >= {target:g}"
    best, reliably = cheapest(options, target, requests)
    if best is None:
        top = max(options, key=lambda option: option.estimate.mean)
        return [f"No option reaches {goal}: the best is {top.name} with {top.score}.",
                *_more_examples(lines, options, target),
                "What remains is a better base (trained longer, on more data, or larger), which was not measured here, "
                "or a lower target."]  # fmt: skip
    total = best.flops(requests)
    sentences = [f"The cheapest option that {'reliably ' * reliably}reaches {goal} is {best.name}: {best.score}, for "
                 f"{total:.2g} FLOPs over {requests:,} requests ({best.train_flops:.2g} to train)."]  # fmt: skip
    if not reliably:
        sentences.append("Its interval extends below the target, so that with other test rows or seeds it may miss it.")
    able = [o for o in options if (o.estimate.low if reliably else o.estimate.mean) >= target and o is not best]
    if able:
        second = min(able, key=lambda option: option.flops(requests))
        times = f"{second.flops(requests) / total:.2g} times that" if total else f"{second.flops(requests):.2g}"
        sentences.append(f"The next is {second.name} with {second.score}, at {times}.")
    sentences += _changes(options, able, best, target, requests)
    sentences += _higher_targets(options, best, reliably, requests)
    return sentences + _more_examples(lines, options, target)


def _changes(
    options: Sequence[Option], able: Sequence[Option], best: Option, target: float, requests: float
) -> list[str]:
    """Return what would change the decision: another number of requests, and a lower target."""
    crossings = []
    for other in able:  # the requests at which the costs of both, linear in them, are equal
        slope = best.request_flops - other.request_flops
        if slope and (crossing := (other.train_flops - best.train_flops) / slope) > 0:
            way = "more" if crossing > requests else "fewer"
            distance = abs(math.log(crossing / max(requests, 1)))
            crossings.append(
                (distance, f"With {way} than about {crossing:,.0f} requests {other.name} would be cheaper.")
            )
    sentences = [text for _, text in sorted(crossings)[:1]]
    below = [o for o in options if 0 < o.estimate.low < target and o.flops(requests) < best.flops(requests)]
    if below:
        lower = max(below, key=lambda option: option.estimate.low)
        sentences.append(f"For a target of {lower.estimate.low:.3f} or less {lower.name} would be enough, for "
                         f"{lower.flops(requests):.2g} FLOPs.")  # fmt: skip
    return sentences


def _higher_targets(options: Sequence[Option], best: Option, reliably: bool, requests: float) -> list[str]:
    """Return what a higher target would take, and the highest score if it is of yet another option."""

    def reached(option: Option) -> float:
        return option.estimate.low if reliably else option.estimate.mean

    named = [best]
    if better := [option for option in options if reached(option) > reached(best)]:
        named.append(min(better, key=lambda option: option.flops(requests)))
        sentences = [f"A target above {reached(best):.3f} would take {named[1].name}, {named[1].score}, at "
                     f"{named[1].flops(requests):.2g} FLOPs."]  # fmt: skip
    else:
        sentences = [f"No option {'reliably ' * reliably}reaches more than {reached(best):.3f}."]
    top = max(options, key=lambda option: option.estimate.mean)
    if top not in named:
        sentences.append(f"The highest score is that of {top.name}, {top.score}.")
    return sentences


def _more_examples(lines: list[Line], options: Sequence[Option], target: float) -> list[str]:
    """Return what the learning curve of the trained method says about more examples."""
    *_, settings = question(lines)
    if (forecasts := forecast_examples(lines, target)) is None:
        return []
    sizes, curve = forecasts
    method = settings["peft"].get("name", "the method")
    text = f"With the number of steps fixed, the error of {method} falls as n^-{curve.curve.c:.2f} with n examples"
    if curve.curve.c <= 0.005:
        text = f"With the number of steps fixed, the error of {method} does not fall with more examples"
    elif math.isfinite(curve.residual):
        text += (f" (a fit to fewer than {sizes[-1]:,} examples forecasts the error at {sizes[-1]:,} to within "
                 f"{abs(curve.residual):.3f})")  # fmt: skip
    means = {option.name: option.estimate.mean for option in options}
    enough = [n for name, n in settings["sizes"].items() if means.get(name, -math.inf) >= target]
    if enough:
        return [f"{text}; {min(enough):,} examples were enough for the target."]
    if not curve.needed <= 100 * sizes[-1]:
        return [f"{text}: with more examples the target is unreachable."]
    high = f"{curve.needed_high:,.0f}" if curve.needed_high < 1e9 else "unreachable"
    return [f"{text}: the target would take about {curve.needed:,.0f} examples ({curve.needed_low:,.0f} to {high}), of "
            f"which there are {settings['examples']:,}; beyond those this is an extrapolation."]  # fmt: skip


def _draw_curve(path: Path, lines: list[Line]) -> bool:
    """Draw the errors by number of examples, if the method was trained on two or more; return True if so."""
    *_, settings = question(lines)
    if (forecasts := forecast_examples(lines, settings["target"])) is None:
        return False
    sizes, curve = forecasts
    best, by_name = settings["reference_score"], {option.name: option.estimate for option in read_options(lines)}
    estimates = [by_name[name] for name in settings["sizes"] if name in by_name]
    mean, low, high = ([best - getattr(e, key) for e in estimates] for key in ("mean", "high", "low"))
    plot_learning_curve(path, sizes, mean, low, high, curve.curve, best - settings["target"])
    return True
