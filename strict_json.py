"""JSON objects without duplicate keys. Python's parser would silently keep the last value of a duplicate."""

import json
from pathlib import Path
from typing import Any

from . import InputError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises InputError if it is unreadable, no object, or has a duplicate key."""
    try:
        tree = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys)
        json.dumps(tree, ensure_ascii=False).encode()  # "\ud800" is valid JSON, but not Unicode text
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds {'null' if tree is None else f'a {type(tree).__name__}'}; an object is wanted")
    return tree


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of `json`: return the object. Raises ValueError for a duplicate key."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return dict(pairs)
