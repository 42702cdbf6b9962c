"""The values that the keys of an adapter_config.json may have, checked before anything is built from them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class ValueKind(NamedTuple):
    """The values that a key of an adapter_config.json may have."""

    expected: str  # in words, for the error
    accepts: Callable[[Any], bool]
    patterns: bool = False  # the text, the items or the keys are regular expressions
    normalize: Callable[[Any], Any] = lambda value: value


def _is_number(x: Any) -> bool:
    return (type(x) is int and abs(x) < 1 << 63) or (isinstance(x, float) and math.isfinite(x))


def _is_names(x: Any) -> bool:
    return isinstance(x, list | tuple | set | frozenset) and all(isinstance(name, str) for name in x)


def _is_rank(x: Any) -> bool:
    return (type(x) is int and x > 0) or (isinstance(x, list) and all(isinstance(kept, bool) for kept in x))


def is_ids(x: Any) -> bool:
    """Return whether a value is a list of whole numbers of 0 or more."""
    return isinstance(x, list | tuple) and all(type(i) is int and i >= 0 for i in x)


NAMES = ValueKind("a pattern or a list of names", lambda x: isinstance(x, str) or _is_names(x), patterns=True)
NAME_LIST = ValueKind("a list of names", _is_names, patterns=True)
LAYERS = ValueKind("a layer or a list of layers", lambda x: is_ids(x) or is_ids([x]))
IDS = ValueKind("a list of ids", is_ids)
BOOL_OR_NAME = ValueKind("true, false or a name", lambda x: isinstance(x, bool | str))
WHOLE = ValueKind("a whole number of 0 or more", lambda x: type(x) is int and 0 <= x < 1 << 63)
NUMBER = ValueKind("a finite number", _is_number)
NUMBERS = ValueKind("an object of numbers", lambda x: isinstance(x, dict) and all(map(_is_number, x.values())), True)
RANKS = ValueKind("an object of whole numbers of 1 or more",
                  lambda x: isinstance(x, dict) and all(map(_is_rank, x.values())), patterns=True)  # fmt: skip


def kind_like(default: Any) -> ValueKind:
    """Return the kind of values of a key by its default; a whole number is not below it, or not below 1."""
    if isinstance(default, bool):
        return ValueKind("true or false", lambda x: isinstance(x, bool))
    if isinstance(default, int):
        least = min(default, 1)
        return ValueKind(f"a whole number of {least} or more", lambda x: type(x) is int and least <= x < 1 << 63)
    return NUMBER if isinstance(default, float) else ValueKind("text", lambda x: isinstance(x, str))
