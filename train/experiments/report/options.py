"""Options of a decision: each approach with its score and its costs, and the rule that picks the cheapest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..learning_curve import Forecast, forecast
from ..results_log import Line, select
from ..stats import Estimate, bootstrap_scores, compare_scores
from .comparison import tested_methods

RULE = ("An option reaches the target if its score does, and reliably if the lower end of its 95 % interval does. Of "
        "the options that reach it reliably (if there are none, of those that reach it) the one with the fewest FLOPs "
        "is chosen: those of its trainings, with all learning rates tried, and those of the requests.")  # fmt: skip


class Option(NamedTuple):
    """One approach to a task: its score and its costs."""

    name: str
    estimate: Estimate
    examples: int
    train_flops: float
    train_seconds: float
    request_flops: float
    request_seconds: float
    prompt_tokens: float
    bytes: int  # stored beside the base where it is deployed

    def flops(self, requests: float) -> float:
        """Return the FLOPs of its trainings and of a number of requests."""
        return self.train_flops + requests * self.request_flops

    @property
    def score(self) -> str:
        """The score with its interval: `0.812 (0.790 to 0.833)`."""
        e = self.estimate
        return f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})"


def question(lines: list[Line]) -> tuple[str, dict[str, Any], Line]:
    """Return (task, its entry in the `setup` line, the `question` line)."""
    (task, about), *_ = select(lines, kind="setup")[0]["tasks"].items()
    return task, about, select(lines, kind="question")[0]


def read_options(lines: list[Line]) -> list[Option]:
    """Return all options that were measured, in the order in which they were tried."""
    task, about, settings = question(lines)
    untrained = select(lines, kind="option")
    estimates = compare_scores({line["name"]: [line] for line in untrained}).methods
    options = [Option(line["name"], estimates[line["name"]], line["examples"], line["prepare_flops"],
                      line["prepare_seconds"], line["request_flops"], line["request_seconds"], line["prompt_tokens"],
                      line["bytes"]) for line in untrained]  # fmt: skip
    predictions, _ = tested_methods(lines, task)
    estimates = compare_scores(predictions).methods
    costs = {line["method"]: line for line in select(lines, kind="cost")}
    for name, seeds in predictions.items():
        cost = costs[name]
        steps = seeds[0]["steps"] * len(select(lines, kind="search", task=task, method=name))
        options.append(Option(
            name, estimates[name], seeds[0].get("examples", 0) or settings["examples"], cost["flops"] * steps,
            cost["seconds"] * steps,
            settings["request_flops"] * (1 + cost["virtual_tokens"] / settings["request_tokens"]),
            min(line["seconds"] for line in seeds) / about["rows"], settings["prompt_tokens"] + cost["virtual_tokens"],
            cost["artifact_bytes"],
        ))  # fmt: skip
    return options


def cheapest(options: Sequence[Option], target: float, requests: float) -> tuple[Option | None, bool]:
    """Return (the option that RULE picks, True if it reaches the target reliably); None if nothing reaches it."""
    for reaches, reliably in (
        (lambda o: o.estimate.low >= target, True),
        (lambda o: o.estimate.mean >= target, False),
    ):
        if able := [option for option in options if reaches(option)]:
            return min(able, key=lambda option: (option.flops(requests), option.bytes)), reliably
    return None, False


def forecast_examples(lines: list[Line], target: float) -> tuple[list[int], Forecast] | None:
    """Return (numbers of examples, forecast of their learning curve); None for fewer than two numbers."""
    task, _, settings = question(lines)
    predictions, _ = tested_methods(lines, task)
    by_size = {name: predictions[name] for name in settings["sizes"] if name in predictions}
    if len(by_size) < 2:
        return None
    sizes, best = [settings["sizes"][name] for name in by_size], settings["reference_score"]
    means = [best - float(np.mean([line["score"] for line in seeds])) for seeds in by_size.values()]
    return sizes, forecast(sizes, best - bootstrap_scores(by_size), means, best - target)
