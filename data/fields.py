"""Checked values of a row's fields: text, JSON lists and objects. Errors name the row (`where`) and the field."""

import difflib
import json
import re
import reprlib
from collections.abc import Iterable
from typing import Any

from .. import InputError
from .errors import RAISE, RowErrors

Record = dict[str, Any]  # one row of a table: column -> value
_SURROGATE = "[\ud800-\udfff]"
_MAX_DEPTH = 64  # levels of nested JSON
_TYPE_NAMES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}


def describe(value: Any) -> str:
    """Return the JSON type of a value for a message, e.g. `a number`, `null`, `an object with ['a']`."""
    if isinstance(value, dict):
        return f"an object with {reprlib.repr(sorted(map(str, value)))}"
    return "an empty list" if value == [] else _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `names`, ignoring case, or an empty string."""
    by_lower = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(str(name).lower(), by_lower, 1)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""


def text_of(row: Record, field: str, where: str, errors: RowErrors = RAISE) -> str:
    """Return the text of a field, as Unicode.

    Raises InputError: the field is missing, is no string, or holds a lone surrogate (JSON allows "\\ud800"), which
    UTF-8 cannot encode. A number and a surrogate can be repaired.
    """
    if field not in row:
        raise InputError(f"{where}: no field {field!r}, only {reprlib.repr(sorted(row))}; rename one, or drop the row")
    return _text(row[field], f"{where}: {field!r}", errors)


def _text(value: Any, place: str, errors: RowErrors) -> str:
    if not isinstance(value, str):
        error = InputError(f"{place} is {describe(value)}; expected text; write it in quotes or drop the row")
        if not isinstance(value, int | float):
            raise error
        errors.repair(error)
        value = json.dumps(value)
    if not value.isascii() and (match := re.search(_SURROGATE, value)):
        problem = f"has the lone surrogate {match.group()!r} at character {match.start()}; expected Unicode text"
        errors.repair(InputError(f"{place} {problem}; write the whole character or drop the row"))
        value = re.sub(_SURROGATE, "\ufffd", value)
    return value


def parse_json(value: Any, place: str, kind: type | tuple[type, ...]) -> Any:
    """Return a list or an object (`kind`), which the row may hold as JSON text. Raises InputError for anything else."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
    if not isinstance(parsed, kind):
        expected = "an object" if kind is dict else "an object or a list" if kind == (dict, list) else "a list"
        raise InputError(f"{place} is {describe(parsed)}; expected {expected}, as JSON or as JSON text")
    return parsed


def plain_json(value: Any, place: str, errors: RowErrors, kind: type | tuple[type, ...]) -> Any:
    """Return a copy of a list or an object (see `parse_json`) that holds JSON types and Unicode text only."""
    return _copy_json(parse_json(value, place, kind), place, errors, 0)


def _copy_json(value: Any, place: str, errors: RowErrors, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InputError(f"{place}: nested deeper than {_MAX_DEPTH} levels; write it flatter")
    if isinstance(value, str):
        return _text(value, place, errors)
    if isinstance(value, dict):
        return {_text(str(k), place, errors): _copy_json(v, place, errors, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_json(v, place, errors, depth + 1) for v in value]
    if value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{place} holds {describe(value)}; expected text, numbers, lists and objects")
    return value
