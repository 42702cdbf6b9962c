"""Confidence intervals of scores, by a bootstrap over test rows, which all methods share, and over training seeds.

The score of a method is its mean over seeds on the test rows of a task. A draw of the bootstrap resamples

- the rows, with replacement: the same rows for all methods, so that differences are paired;
- for each method as many deviations between seeds as it has seeds. Deviations from the mean of n seeds are too small by
  sqrt((n - 1) / n), and are scaled up by the inverse. They are pooled over all methods near the best: those whose mean
  is at most 0.75 |best| below the best. A method further off uses its own deviations.

Two methods differ significantly if their means differ by more than the range (largest less smallest deviation of a draw
from the measured means) that 95 % of the draws stay below: Tukey's range test by bootstrap, for all pairs at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 2000  # of a score that is a mean over rows
RESCORED_DRAWS = 200  # of a score that has to be computed anew for each draw
LEVEL = 95.0  # percent

# The scored predictions of one seed: {"score": float, and "row_correct" or "resampled_scores" of `resampled_scores`}.
Predictions = Mapping[str, Any]


class Estimate(NamedTuple):
    """The score of one method on one task, with 95 % intervals."""

    mean: float
    low: float
    high: float
    gap_to_best: float  # the mean of the best method less this one's
    gap_low: float
    gap_high: float
    as_good: bool  # not significantly different from the best


class ScoreComparison(NamedTuple):
    """The scores of all methods on one task, the best first."""

    methods: dict[str, Estimate]
    pairs: dict[tuple[str, str], tuple[float, float, float]]  # mean of the first less that of the second, low, high
    significant_gap: float  # a larger difference of means is significant
    seed_deviation: float  # standard deviation between seeds, pooled; 0 for one seed


def resampled_rows(rows: int, draws: int) -> np.ndarray:
    """Return the row indices of each draw [draws, rows]: the same for all methods with as many rows."""
    return np.random.default_rng(rows).integers(0, rows, (draws, rows), dtype=np.int32)


def resampled_scores(
    score: Callable[[Any, Any], dict[str, float]], metric: str, rows: Any, answers: Any
) -> dict[str, Any]:
    """Return what the bootstrap needs of scored answers.

    {"row_correct": the score of each row, 1 or 0 for a right or wrong one} if the score is their mean; otherwise
    {"resampled_scores": the score of each draw of rows}.
    """
    total = score(rows, answers)[metric]
    by_row = [score([row], [answer]).get(metric) for row, answer in zip(rows, answers, strict=True)]
    if None not in by_row and abs(float(np.mean(by_row)) - total) < 1e-9:  # type: ignore[arg-type]
        return {"row_correct": by_row}
    draws = [score([rows[i] for i in draw], [answers[i] for i in draw])
             for draw in resampled_rows(len(rows), RESCORED_DRAWS)]  # fmt: skip
    return {"resampled_scores": [scores.get(metric, total) for scores in draws]}  # a draw may lack rows of the metric


def bootstrap_scores(predictions: Mapping[str, Sequence[Predictions]]) -> np.ndarray:
    """Return the score of each draw of rows, averaged over seeds [methods, draws].

    The method with the fewest draws sets their number: the first draws are the same rows for all.
    """

    def draws_of(seed: Predictions) -> np.ndarray:
        if "resampled_scores" in seed:
            return np.asarray(seed["resampled_scores"], float)
        by_row = np.asarray(seed["row_correct"], float)
        return by_row[resampled_rows(len(by_row), DRAWS)].mean(axis=1)

    by_method = [[draws_of(seed) for seed in seeds] for seeds in predictions.values()]
    n = min(len(draws) for seeds in by_method for draws in seeds)
    return np.array([np.mean([draws[:n] for draws in seeds], axis=0) for seeds in by_method])


def compare_scores(predictions: Mapping[str, Sequence[Predictions]]) -> ScoreComparison:
    """Compare methods on one task; `predictions` has as many seeds for each method."""
    names = list(predictions)
    if not names:
        return ScoreComparison({}, {}, 0.0, 0.0)
    scores = np.array([[seed["score"] for seed in predictions[name]] for name in names])  # [methods, seeds]
    means = scores.mean(axis=1)
    by_rows = bootstrap_scores(predictions)
    by_seeds, seed_deviation = _seed_deviations(scores, by_rows.shape[1])
    draws = by_rows + by_seeds
    ranges = np.ptp(draws - means[:, None], axis=0)
    significant_gap = float(np.percentile(ranges, LEVEL)) if len(names) > 1 else 0.0
    ends, order = [(100 - LEVEL) / 2, (100 + LEVEL) / 2], [int(i) for i in np.argsort(-means, kind="stable")]
    pairs = {}
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            low, high = map(float, np.percentile(draws[i] - draws[j], ends))
            pairs[names[i], names[j]] = float(means[i] - means[j]), low, high
    best, methods = names[int(means.argmax())], {}
    for i in order:
        low, high = map(float, np.percentile(draws[i], ends))
        low, high = _at_least_wilson(low, high, float(means[i]), predictions[names[i]])
        gap = pairs.get((best, names[i]), (0.0, 0.0, 0.0))
        methods[names[i]] = Estimate(float(means[i]), low, high, *gap, as_good=gap[0] <= significant_gap)
    return ScoreComparison(methods, pairs, significant_gap, seed_deviation)


def _seed_deviations(scores: np.ndarray, draws: int) -> tuple[np.ndarray, float]:
    """Return (mean deviation between seeds of each draw [methods, draws], pooled standard deviation of seeds)."""
    (methods, n), means = scores.shape, scores.mean(axis=1)
    deviations = np.zeros((methods, draws))
    if n == 1:
        return deviations, 0.0
    # A method that answers hardly anything right hardly varies: it is not pooled with those near the best.
    near_best, rng = means >= means.max() - 0.75 * abs(means.max()), np.random.default_rng(0)
    scaled = (scores - means[:, None]) * (n / (n - 1)) ** 0.5
    for i in range(methods):
        pool = scaled[near_best].ravel() if near_best[i] else scaled[i]
        deviations[i] = rng.choice(pool, (draws, n)).mean(axis=-1)
    return deviations, float(scores[near_best].var(axis=1, ddof=1).mean() ** 0.5)


def _at_least_wilson(low: float, high: float, mean: float, seeds: Sequence[Predictions]) -> tuple[float, float]:
    """Return an interval no narrower than Wilson's if rows are right or wrong: a bootstrap of all right has width 0.

    `mean` is over seeds, so that mean * rows need not be an integer, as scipy's `binomtest` demands.
    """
    by_row = seeds[0].get("row_correct", [0.5])
    if not set(by_row) <= {0.0, 1.0}:
        return low, high
    n, z = len(by_row), 1.96
    middle, half = mean + z * z / (2 * n), z * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    low, high = min(low, (middle - half) / (1 + z * z / n)), max(high, (middle + half) / (1 + z * z / n))
    return max(low, 0.0), min(high, 1.0)
