"""Dataclasses from JSON: every key known, every value of the type that its field has, or one line that says why not."""

import dataclasses
import difflib
import math
import reprlib
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .. import InputError

_NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}


def from_fields(cls: Any, tree: Any, where: str) -> Any:
    """cls(**tree) with lists as tuples. InputError names `where`, the key, what it holds and what is wanted."""
    if not isinstance(tree, dict):
        raise InputError(f"{where}: a {type(tree).__name__}; an object of keys and values is wanted")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise InputError(f"{where}: unknown key {reprlib.repr(key)}{did_you_mean(key, fields) or '; remove it'}")
    for name, f in fields.items():
        if name not in tree and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: has no {name!r}; {type_name(get_type_hints(cls)[name])} is wanted")
    hints, values = get_type_hints(cls), {key: _tuples(value) for key, value in tree.items()}
    for key, value in values.items():
        if not matches_type(value, hints[key]):
            raise InputError(f"{where}: {key!r} is {reprlib.repr(tree[key])}; {type_name(hints[key])} is wanted")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a value has a field's type; 1 is a float, but true is no number, and NaN none that is wanted."""
    kind, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if kind in (Union, UnionType):
        return any(matches_type(value, one) for one in args)
    if kind is tuple:
        args = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(args) and all(map(matches_type, value, args))
    if hint is float and type(value) is float:
        return math.isfinite(value)
    if hint in (int, float):
        return type(value) is int and abs(value) < 1 << 63
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A type in words."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(repr(one) for one in args)
    if kind in (Union, UnionType):
        return " or ".join(map(type_name, args))
    if kind is tuple:
        return (
            f"a list of {type_name(args[0])} each"
            if args[-1] is Ellipsis
            else f"a list [{', '.join(map(type_name, args))}]"
        )
    return _NAMES.get(hint) or f"a {hint.__name__} as an object"


def did_you_mean(name: Any, names: Any) -> str:
    """`; did you mean x?` or nothing, whatever the case, dashes and underscores."""
    plain = {str(one).lower().replace("-", "_"): one for one in names}
    found = difflib.get_close_matches(str(name).lower().replace("-", "_"), list(plain), 1)
    return f"; did you mean {plain[found[0]]}?" if found else ""


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
