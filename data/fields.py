"""Checked values of the fields of rows."""

import difflib
import json
import re
import reprlib
from collections.abc import Iterable
from typing import Any

from .. import InputError
from .errors import RAISE, RowErrors

_SURROGATE = "[\ud800-\udfff]"
_DEPTH = 64  # of nested JSON


def text_of(row: dict, field: str, where: str, bad: RowErrors = RAISE) -> str:
    """The text of a field. InputError: it is not there, no text, or holds a lone surrogate (JSON allows "\\ud800"),
    which no UTF-8 can carry.
    """
    if field not in row:
        raise InputError(f"{where}: no field {field!r}, only {reprlib.repr(sorted(row))}; rename one, or drop the row")
    text = row[field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        error = InputError(f"{where}: {field!r} is {kind}; text is wanted, write it in quotes or drop the row")
        if not isinstance(text, (int, float)):
            raise error
        bad.repair(error)
        text = json.dumps(text)
    if not text.isascii() and (found := re.search(_SURROGATE, text)):
        said = f"lone surrogate {found.group()!r} at character {found.start()}"
        bad.repair(InputError(f"{where}: {said}; Unicode text is wanted, write the whole character or drop the row"))
        text = re.sub(_SURROGATE, "\ufffd", text)
    return text


def json_of(value: Any, place: str, bad: RowErrors, kind: Any) -> Any:
    """A copy of a list or object as JSON has it, which may be written as text; its text is Unicode."""
    return _plain(parsed(value, place, kind), place, bad, 0)


def parsed(value: Any, place: str, kind: Any) -> Any:
    """A list or an object, which may be written as JSON text."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = value
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "an object or a list" if kind == (dict, list) else "a list"
        raise InputError(f"{place} is {kind_of(found)}; {wanted} is wanted, maybe as JSON text")
    return found


def _plain(value: Any, place: str, bad: RowErrors, depth: int) -> Any:
    if depth > _DEPTH:
        raise InputError(f"{place}: nested deeper than {_DEPTH} levels; write it flatter")
    if isinstance(value, str):
        return text_of({"": value}, "", place, bad)
    if isinstance(value, dict):
        return {_plain(str(k), place, bad, depth): _plain(v, place, bad, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, place, bad, depth + 1) for v in value]
    if value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{place} holds a {type(value).__name__}; text, numbers, lists and objects are wanted")
    return value


def kind_of(value: Any) -> str:
    """What a value is that is not what it should be, for a message."""
    if isinstance(value, dict):
        return f"an object with {reprlib.repr(sorted(map(str, value)))}"
    return "empty" if value == [] else "null" if value is None else f"a {type(value).__name__}"


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean x?` or nothing; upper and lower case are the same."""
    lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(str(name).lower(), lower, 1)
    return f"; did you mean {lower[found[0]]!r}?" if found else ""
