"""JSON files that must hold one object."""

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
    """An `object_pairs_hook` that raises ValueError for a duplicate key; json itself keeps the last value silently."""
    keys = [key for key, _ in pairs]
    if duplicate := next((k for k in keys if keys.count(k) > 1), None) if len(set(keys)) < len(keys) else None:
        raise ValueError(f"duplicate key {duplicate!r}")
    return dict(pairs)
