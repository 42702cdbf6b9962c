"""Learning curve: the error as a power law of the number of examples, and its extrapolation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_ERROR = 1e-3  # smaller errors count as this in a fit, where their logarithms would dominate


class Curve(NamedTuple):
    """error(n) = b n^-c."""

    b: float
    c: float

    def error(self, n: float) -> float:
        """Return the error expected with n examples."""
        return self.b * n**-self.c

    def examples(self, error: float) -> float:
        """Return how many examples bring the error down to this; infinity if no number does."""
        if error <= 0 or self.c <= 0:
            return math.inf
        power = math.log(self.b / error) / self.c
        return math.exp(power) if power < 100 else math.inf


def fit(sizes: Sequence[float], errors: Sequence[float]) -> Curve:
    """Fit log error to log n by least squares."""
    slope, offset = np.polyfit(np.log(sizes), np.log(np.maximum(errors, LEAST_ERROR)), 1)
    return Curve(float(np.exp(offset)), float(-slope))


class Forecast(NamedTuple):
    """The extrapolation of a learning curve."""

    curve: Curve
    residual: float  # error at the largest size minus its forecast from the smaller ones; NaN for fewer than 3 sizes
    needed: float  # examples to reach the target, with its 95 % interval
    needed_low: float
    needed_high: float


def forecast(sizes: Sequence[int], draws: np.ndarray, means: Sequence[float], target: float) -> Forecast:
    """Return how many examples reach the error `target`, from the measured errors (`means`) at some numbers of them.

    `draws` are errors in draws of the test rows [sizes, draws]. Each draw has its own fit; the interval covers 95 % of
    them, so that it holds the noise of the rows only.
    """
    curve = fit(sizes, means)
    residual = means[-1] - fit(sizes[:-1], means[:-1]).error(sizes[-1]) if len(sizes) > 2 else math.nan
    needed = np.sort([fit(sizes, column).examples(target) for column in draws.T])
    low, high = (float(needed[int(q * (len(needed) - 1))]) for q in (0.025, 0.975))  # no interpolation: may be infinite
    return Forecast(curve, float(residual), curve.examples(target), low, high)
