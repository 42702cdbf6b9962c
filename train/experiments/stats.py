"""How far scores can be told apart: bootstrap over test rows, which all methods share, and over seeds.

A method's score is the mean over its seeds on the task's test. A draw of the bootstrap takes rows with replacement,
the same for every method, so that differences are paired; and for every method as many deviations between seeds as it
has seeds (each sqrt(n / (n - 1)) times wider: a mean of n lies too close to them), out of those of all methods whose
mean is at most three quarters of |best| below the best (for scores of 0 or more: that reach a quarter of it), or out of
its own where it is not. Two methods are told apart if they differ by more than
the spread (largest less smallest deviation from what was measured) that 95 % of the draws stay below: Tukey's range
test, by bootstrap, so that it holds for all pairs at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS, FEW = 2000, 200  # of a mean over rows; of a score that must be computed anew for each
LEVEL = 95.0


class Estimate(NamedTuple):
    """Of one method on one task."""

    mean: float
    low: float
    high: float
    behind: float  # the best method's mean less this one's
    behind_low: float
    behind_high: float
    as_good: bool  # not told apart from the best


class ScoreComparison(NamedTuple):
    """Of all methods on one task, the best first."""

    methods: dict[str, Estimate]
    pairs: dict[tuple[str, str], tuple[float, float, float]]  # the first's mean less the second's, and its interval
    apart: float  # means that differ by more are told apart
    spread: float  # standard deviation between seeds, pooled; 0 for one seed


def picks(rows: int, draws: int) -> np.ndarray:
    """Which rows each draw takes [draws, rows]: the same for all that were scored on them."""
    return np.random.default_rng(rows).integers(0, rows, (draws, rows), dtype=np.int32)


def resampled_scores(score: Callable[[Any, Any], dict[str, float]], metric: str, rows: Any, answers: Any) -> dict[str, Any]:
    """What the bootstrap needs of a scored answer sheet: {"marks": a number a row} if the score is their mean, else
    {"draws": the score of each draw of rows}."""
    whole = score(rows, answers)[metric]
    marks = [score([row], [answer]).get(metric) for row, answer in zip(rows, answers, strict=True)]
    if None not in marks and abs(float(np.mean(marks)) - whole) < 1e-9:  # type: ignore[arg-type]
        return {"marks": marks}
    found = [score([rows[i] for i in draw], [answers[i] for i in draw]) for draw in picks(len(rows), FEW)]
    return {"draws": [one.get(metric, whole) for one in found]}  # a draw may have no row that the score is of


def drawn(sheet: dict[str, Any]) -> np.ndarray:
    """The score of each draw of rows [draws]."""
    if "draws" in sheet:
        return np.asarray(sheet["draws"], float)
    marks = np.asarray(sheet["marks"], float)
    return marks[picks(len(marks), DRAWS)].mean(axis=1)


def averaged(sheets: Mapping[str, Sequence[dict[str, Any]]]) -> np.ndarray:
    """The score of each draw, the mean over seeds [methods, draws]. Those with fewer draws say how many: the first
    draws are the same rows for all."""
    each = {name: [drawn(sheet) for sheet in some] for name, some in sheets.items()}
    n = min(len(draws) for some in each.values() for draws in some)
    return np.array([np.mean([draws[:n] for draws in some], axis=0) for some in each.values()])


def _no_surer(low: float, high: float, mean: float, sheets: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """An interval, no narrower than Wilson's where rows are right or wrong: a bootstrap of all right ones has none."""
    marks = sheets[0].get("marks", [0.5])
    if not set(marks) <= {0.0, 1.0}:
        return low, high
    n, z = len(marks), 1.96
    middle, half = mean + z * z / (2 * n), z * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    low, high = min(low, (middle - half) / (1 + z * z / n)), max(high, (middle + half) / (1 + z * z / n))
    return max(low, 0.0), min(high, 1.0)


def compare_scores(sheets: Mapping[str, Sequence[dict[str, Any]]]) -> ScoreComparison:
    """sheets: {method: a sheet a seed, each with its `score` and what `by_row` gives}; as many seeds for each."""
    names = list(sheets)
    if not names:
        return ScoreComparison({}, {}, 0.0, 0.0)
    scores = np.array([[sheet["score"] for sheet in sheets[name]] for name in names])  # [methods, seeds]
    means, n = scores.mean(axis=1), scores.shape[1]
    rows = averaged(sheets)
    off, spread = np.zeros_like(rows), 0.0
    if n > 1:
        # What answers hardly anything right has hardly any spread: it neither hides that of the others nor has theirs.
        able, draw = means >= means.max() - 0.75 * abs(means.max()), np.random.default_rng(0)
        wide = (scores - means[:, None]) * (n / (n - 1)) ** 0.5
        for i in range(len(names)):
            off[i] = draw.choice(wide[able].ravel() if able[i] else wide[i], (rows.shape[1], n)).mean(axis=-1)
        spread = float(scores[able].var(axis=1, ddof=1).mean() ** 0.5)
    draws = rows + off
    spans = np.ptp(draws - means[:, None], axis=0)
    apart = float(np.percentile(spans, LEVEL)) if len(names) > 1 else 0.0
    ends, best = [(100 - LEVEL) / 2, (100 + LEVEL) / 2], int(means.argmax())
    order = [int(i) for i in np.argsort(-means, kind="stable")]
    pairs = {}
    for at, i in enumerate(order):
        for j in order[at + 1 :]:
            low, high = map(float, np.percentile(draws[i] - draws[j], ends))
            pairs[names[i], names[j]] = float(means[i] - means[j]), low, high
    found = {}
    for i in order:
        low, high = map(float, np.percentile(draws[i], ends))
        low, high = _no_surer(low, high, float(means[i]), sheets[names[i]])
        behind = pairs.get((names[best], names[i]), (0.0, 0.0, 0.0))
        found[names[i]] = Estimate(float(means[i]), low, high, behind[0], behind[1], behind[2], behind[0] <= apart)
    return ScoreComparison(found, pairs, apart, spread)
