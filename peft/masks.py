"""Named masks, and masks from rules: which parameters, and which layers of a stacked one."""

import re
from typing import Any

import numpy as np

from ..model import tree
from ..model.pattern import BadPattern
from ..model.tree import Rules

Where = str | Rules

# name -> rules. A new mask is one line here. `last_K` for any K is understood besides.
named: dict[str, Rules] = {
    "all": [(".*", True)],
    "norms": [(".*norm/(scale|bias)", True)],
    "biases": [(".*bias", True)],
    "attention": [("layers/attn/.*", True)],
    "mlp": [("layers/mlp/.*", True)],
    "linear": [("layers/(attn/(qkv|[qkvo])|mlp/(gate|up|down))", True)],
    "embeddings": [("embed/.*", True)],
    "head": [("(head/matrix|final_norm/.*)", True)],
    "last_1": [("layers/[-1:]/.*", True)],
    "last_2": [("layers/[-2:]/.*", True)],
}


def rules(where: Where) -> Rules:
    """The rules of a mask's name, of one rule, of several with commas between, or the rules themselves."""
    if not isinstance(where, str):
        return where
    if len(parts := re.split(r",\s*(?![^{]*})", where)) > 1:
        return [rule for part in parts for rule in rules(part)]
    if last := re.fullmatch(r"last_(\d+)", where):
        return [(f"layers/[-{last[1]}:]/.*", True)]
    return named.get(where) or [(where, True)]


def select(where: Where, params: Any) -> dict[str, list[tuple[int, int]]]:
    """{path: the [start, stop) layer ranges picked} of every parameter that the mask picks.

    A parameter outside a stack has the range (0, 1). Raises InputError for a rule that matches nothing, with the names
    of masks if it looks like a name.
    """
    try:
        values = tree.match(rules(where), params, default=False)
    except tree.InputError as error:
        if isinstance(error, BadPattern) or not isinstance(where, str) or "/" in where or where in named:
            raise
        close = tree.nearest(where, named)
        raise tree.InputError(f"{error}{close} (masks by name: {', '.join(named)}, last_K)") from None
    return {path: runs for path, row in values.items() if (runs := tree.runs([bool(v) for v in row]))}


def mask(where: Where, params: Any) -> Any:
    """The pytree of bool of a mask, for Optax; a stacked array picked in part has a bool array [L, 1, ...]."""
    flat: dict[str, Any] = {}
    for path, row in tree.match(rules(where), params, default=False).items():
        leaf = tree.named(params)[path]
        same = len(set(map(bool, row))) == 1
        flat[path] = bool(row[0]) if same else np.array(row, bool).reshape(-1, *[1] * (leaf.ndim - 1))
    return tree.nested(flat)
