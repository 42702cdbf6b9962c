"""A learning curve: error = b n^-c over the number of examples, fitted to logs, and what it says beyond them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..progress import save_figure

LEAST = 1e-3  # an error below it is taken for it: its log would rule the fit


class Curve(NamedTuple):
    """error(n) = b n^-c."""

    b: float
    c: float

    def error(self, n: float) -> float:
        """The error expected with n examples."""
        return self.b * n**-self.c

    def examples(self, error: float) -> float:
        """How many examples bring the error down to this; infinity if none do."""
        if error <= 0 or self.c <= 0:
            return math.inf
        power = math.log(self.b / error) / self.c
        return math.exp(power) if power < 100 else math.inf


def fit(sizes: Sequence[float], errors: Sequence[float]) -> Curve:
    """Least squares of log error on log n."""
    slope, offset = np.polyfit(np.log(sizes), np.log(np.maximum(errors, LEAST)), 1)
    return Curve(float(np.exp(offset)), float(-slope))


class Outlook(NamedTuple):
    """What a curve says of more examples."""

    curve: Curve
    missed: float  # error at the largest size less what the smaller ones foretold of it; NaN for fewer than 3 sizes
    needed: float  # examples for the target
    needed_low: float
    needed_high: float


def outlook(sizes: Sequence[int], draws: np.ndarray, means: Sequence[float], wanted: float) -> Outlook:
    """draws: errors of each size in draws of the test's rows [sizes, draws], `means`: as measured; wanted: an error.

    The interval of what is needed is of 95 % of the draws, each with a fit of its own: of the rows' noise alone.
    """
    curve = fit(sizes, means)
    missed = means[-1] - fit(sizes[:-1], means[:-1]).error(sizes[-1]) if len(sizes) > 2 else math.nan
    needed = [fit(sizes, column).examples(wanted) for column in draws.T]
    low, high = (float(np.sort(needed)[int(q * (len(needed) - 1))]) for q in (0.025, 0.975))  # infinity has no mean
    return Outlook(curve, float(missed), curve.examples(wanted), low, high)


def draw(path: Path, sizes: Sequence[int], errors: Sequence[Sequence[float]], curve: Curve, wanted: float) -> None:
    """A picture of errors (mean, low, high; of each size), the curve, and the error that is wanted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    mean, low, high = errors
    ax.fill_between(sizes, low, high, alpha=0.2)
    ax.plot(sizes, mean, "o")
    beyond = np.geomspace(sizes[0], 10 * sizes[-1], 50)
    ax.plot(beyond, [curve.error(n) for n in beyond], "--", label=f"{curve.b:.2g} n^-{curve.c:.2f}")
    if wanted > 0:
        ax.axhline(wanted, color="0.5", linewidth=1, label="target")
    ax.set(xscale="log", yscale="log", xlabel="examples", ylabel="error")
    ax.legend()
    ax.grid(alpha=0.3)
    save_figure(figure, path, 110)
