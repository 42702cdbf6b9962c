"""Bounds of the numbers that a dataclass takes, declared beside its fields and checked whenever one is made.

    class Optim(Checked):
        lr: float = 1e-3                          # without a declaration: finite, and 0 or more
        b1: Annotated[float, Bounds(0, 1, "[)")] = 0.9
        groups: tuple[tuple[str, float], ...] = ()  # every number and text inside a tuple is checked too

Text must be Unicode without NUL. Anything else (arrays, None, other dataclasses) is left alone.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, get_type_hints

import numpy as np

from . import InputError

LARGEST = 2**31 - 1  # of an int without another upper bound: indices and sizes are int32 on devices


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The interval of a number, by default [0, infinity). Floats are compared as float32, which devices compute in: a
    number that becomes infinity or an excluded end there is out of bounds."""

    low: float = 0
    high: float = math.inf
    ends: str = "[]"  # as in mathematics: "(" and ")" leave an end out

    def refuses(self, x: float) -> str:
        """What is wanted in place of x, or "" if x is within."""
        high = LARGEST if isinstance(x, int) and math.isinf(self.high) else self.high
        value = x
        if isinstance(x, float):
            with np.errstate(over="ignore"):
                value = float(np.float32(x))
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < high if self.ends[1] == ")" else value <= high
        if above and below and abs(value) < math.inf:
            return ""
        start = "" if self.low == -math.inf else f"above {self.low}" if self.ends[0] == "(" else f"{self.low} or more"
        if math.isinf(high):
            return f"a finite number {'of ' * start[:1].isdigit()}{start}".strip()
        if high == LARGEST and value < high:
            return start
        if self.ends == "[]":
            return f"{self.low} to {high}"
        return f"{start}, below {high}" if self.ends[1] == ")" else f"{start}, at most {high}"


Count = Annotated[int, Bounds(1)]
Size = Annotated[int, Bounds(1, 65_536)]  # an axis that a method adds: a rank, virtual tokens
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # jax and numpy drop or refuse what is beyond 32 bits
Drawn = Annotated[int | None, Bounds(0, 2**32 - 1)]  # the seed of what a method draws; None: the run's
Share = Annotated[float, Bounds(0, 1)]
Decay = Annotated[float, Bounds(0, 1, "[)")]  # of a moving average; a rate of dropout
Positive = Annotated[float, Bounds(0, math.inf, "(]")]
FINITE = Bounds(-math.inf)
Real = Annotated[float, FINITE]


class Checked:
    """A dataclass that raises InputError for a field out of its bounds, naming the flag that sets it."""

    FLAGS: ClassVar[str] = "--"  # what stands before a field's name on the command line

    def __post_init__(self) -> None:
        check(self, self.FLAGS)


def check(owner: Any, flags: str) -> None:
    """Raise InputError for the first field of a dataclass that is out of its bounds."""
    for name, bounds in bounds_of(type(owner)).items():
        for shown, x in _leaves(getattr(owner, name)):
            if wanted := _refused(x, bounds):
                raise InputError(f"{flags}{name.replace('_', '-')} {shown}: wanted {wanted}")


@functools.cache
def bounds_of(cls: type) -> dict[str, Bounds]:
    """{field: its bounds} of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    declared = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(cls)}
    return {name: next((m for m in some if isinstance(m, Bounds)), Bounds()) for name, some in declared.items()}


def is_text(x: str) -> bool:
    """Whether a string is Unicode without NUL: bytes that are not UTF-8 come from the command line as surrogates."""
    return "\0" not in x and x.encode("utf-8", "ignore").decode() == x


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(as it is shown, value) of a field, or of everything inside a tuple, shown with what is beside it."""
    if not isinstance(value, tuple):
        yield ascii(value) if isinstance(value, str) else value, value
        return
    for x in value:
        if isinstance(x, tuple):
            yield from ((" ".join(map(str, x)).encode("ascii", "backslashreplace").decode(), y) for _, y in _leaves(x))
        else:
            yield from _leaves(x)


def _refused(x: Any, bounds: Bounds) -> str:
    if isinstance(x, str):
        return "" if is_text(x) else "Unicode text without NUL"
    return bounds.refuses(x) if isinstance(x, int | float) and not isinstance(x, bool) else ""
