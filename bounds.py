"""Types and bounds of configuration fields, declared beside the fields and checked whenever a dataclass is made.

    class Optim(Checked):
        lr: float = 1e-3                            # no declaration: finite, and 0 or more
        b1: Annotated[float, Bounds(0, 1, "[)")] = 0.9
        groups: tuple[tuple[str, float], ...] = ()  # every number and string inside a tuple is checked too

Strings must be Unicode without NUL. Other values (arrays, None, other dataclasses) are not checked, so that a sweep can
trace a field. `from_fields` makes a dataclass from JSON and checks the types of all fields as well.
"""

import dataclasses
import difflib
import functools
import math
import reprlib
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from . import InputError

LARGEST = 2**31 - 1  # upper bound of an int without another one: indices and sizes are int32 on devices


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The interval of a number, by default [0, infinity).

    Floats are compared as float32, in which devices compute: a number that becomes infinite or an excluded end there is
    out of bounds.
    """

    low: float = 0
    high: float = math.inf
    ends: str = "[]"  # as in mathematics: "(" and ")" exclude an end

    def violation(self, x: float) -> str:
        """Return the bounds in words if x is out of them, else ""."""
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
Drawn = Annotated[int | None, Bounds(0, 2**32 - 1)]  # the seed of a method's random numbers; None: the run's
Share = Annotated[float, Bounds(0, 1)]
Decay = Annotated[float, Bounds(0, 1, "[)")]  # of a moving average; a dropout rate
Positive = Annotated[float, Bounds(0, math.inf, "(]")]
FINITE = Bounds(-math.inf)
Real = Annotated[float, FINITE]


class Checked:
    """A dataclass that raises InputError for a field out of its bounds, naming the flag that sets it."""

    FLAGS: ClassVar[str] = "--"  # prefix of a field's name on the command line

    def __post_init__(self) -> None:
        check(self, self.FLAGS)


def check(owner: Any, flags: str) -> None:
    """Raise InputError for the first field of a dataclass that is out of its bounds."""
    for name, bounds in bounds_of(type(owner)).items():
        for shown, value in _leaves(getattr(owner, name)):
            expected = ""
            if isinstance(value, str):
                expected = "" if is_text(value) else "Unicode text without NUL"
            elif isinstance(value, int | float) and not isinstance(value, bool):
                expected = bounds.violation(value)
            if expected:
                raise InputError(f"{flags}{name.replace('_', '-')} {shown}: wanted {expected}")


@functools.cache
def bounds_of(cls: type) -> dict[str, Bounds]:
    """Return {field: its bounds} of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    metadata = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(cls)}
    return {name: next((m for m in items if isinstance(m, Bounds)), Bounds()) for name, items in metadata.items()}


def is_text(x: str) -> bool:
    """Return whether a string is Unicode without NUL. Bytes of the command line that are not UTF-8 are surrogates."""
    return "\0" not in x and x.encode("utf-8", "ignore").decode() == x


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (value as shown, value) of a field, or of all that a tuple holds, shown with its neighbours."""
    if not isinstance(value, tuple):
        yield ascii(value) if isinstance(value, str) else value, value
        return
    for x in value:
        if isinstance(x, tuple):
            shown = " ".join(map(str, x)).encode("ascii", "backslashreplace").decode()
            yield from ((shown, leaf) for _, leaf in _leaves(x))
        else:
            yield from _leaves(x)


def from_fields(cls: Any, tree: Any, where: str) -> Any:
    """Return cls(**tree), with lists as tuples.

    Raises InputError with `where`, the key, its value and what was expected, for an unknown or missing key, a wrong
    type, and a value out of bounds.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{where}: a {type(tree).__name__}; an object of keys and values is wanted")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise InputError(f"{where}: unknown key {reprlib.repr(key)}{did_you_mean(key, fields) or '; remove it'}")
    for name, field in fields.items():
        if name not in tree and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: has no {name!r}; {type_name(hints[name])} is wanted")
    values = {key: _as_tuples(value) for key, value in tree.items()}
    for key, value in values.items():
        if not matches_type(value, hints[key]):
            raise InputError(f"{where}: {key!r} is {reprlib.repr(tree[key])}; {type_name(hints[key])} is wanted")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def matches_type(value: Any, hint: Any) -> bool:
    """Return whether a value has a field's type. 1 is a float; true is no number; a float is finite."""
    kind, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return any(type(value) is type(literal) and value == literal for literal in args)
    if kind in (Union, UnionType):
        return any(matches_type(value, arg) for arg in args)
    if kind is tuple:
        args = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(args) and all(map(matches_type, value, args))
    if hint is float and type(value) is float:
        return math.isfinite(value)
    if hint in (int, float):
        return type(value) is int and abs(value) < 1 << 63
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """Return a type in words."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(map(repr, args))
    if kind in (Union, UnionType):
        return " or ".join(map(type_name, args))
    if kind is tuple and args[-1] is Ellipsis:
        return f"a list of {type_name(args[0])} each"
    if kind is tuple:
        return f"a list [{', '.join(map(type_name, args))}]"
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint) or f"a {hint.__name__} as an object"


def did_you_mean(name: Any, names: Iterable[Any]) -> str:
    """Return `; did you mean x?` for the name that is spelt most alike, or nothing. Case, dashes and underscores do not
    count."""
    plain = {str(n).lower().replace("-", "_"): n for n in names}
    matches = difflib.get_close_matches(str(name).lower().replace("-", "_"), list(plain), 1)
    return f"; did you mean {plain[matches[0]]}?" if matches else ""


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
