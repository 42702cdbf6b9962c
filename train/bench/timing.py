"""Timing of contenders that take turns, so that noise of the machine affects all of them alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)


def time_in_turns(calls: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, list[float]]:
    """Return the seconds of each call in each round. Each round reverses the order; the first is not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name in list(calls) if i % 2 else list(calls)[::-1]:
            start = time.perf_counter()
            calls[name]()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median over rounds of a/b: noise that both contenders of a round meet cancels."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
