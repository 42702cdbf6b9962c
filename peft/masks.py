"""Masks by name and by rule: which parameters, and which layers of a stacked one."""

import re
from typing import Any

import numpy as np

from ..model import tree
from ..model.pattern import BadPattern
from ..model.tree import Rules

Where = str | Rules

# name -> rules. A new mask is one line here. `last_K`, for any K, is understood too.
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


# Module names of Hugging Face models -> ours, suggested in the error about a rule that matches nothing.
hugging_face = {
    **{f"{name}_proj": f"layers/attn/{name}" for name in "qkvo"},
    **{f"{name}_proj": f"layers/mlp/{name}" for name in ("gate", "up", "down")},
    "qkv_proj": "layers/attn/qkv", "c_attn": "layers/attn/qkv", "gate_up_proj": "layers/mlp/(gate|up)",
    "c_fc": "layers/mlp/up", "self_attn": "attention", "attn": "attention", "all-linear": "linear",
    "embed_tokens": "embed/table", "wte": "embed/table", "wpe": "embed/positions", "lm_head": "head/matrix",
    "input_layernorm": "norms", "layernorm": "norms", "norm": "norms", "bias": "biases",
}  # fmt: skip


def rules(where: Where) -> Rules:
    """Return the rules of a mask's name, of one rule, or of several separated by commas; rules are left as given."""
    if not isinstance(where, str):
        return where
    if len(parts := re.split(r",\s*(?![^{]*})", where)) > 1:
        return [rule for part in parts for rule in rules(part)]
    if last := re.fullmatch(r"last_(\d+)", where):
        return [(f"layers/[-{last[1]}:]/.*", True)]
    return named.get(where) or [(where, True)]


def select(where: Where, params: Any) -> dict[str, list[tuple[int, int]]]:
    """Return {path: the [start, stop) layer ranges picked} of every parameter that the mask picks.

    A parameter outside a stack has the range (0, 1). Raises InputError for a rule that matches nothing, with the names
    of masks if it looks like a name.
    """
    try:
        values = tree.match_rules(rules(where), params, default=False)
    except tree.InputError as error:
        if isinstance(error, BadPattern) or not isinstance(where, str) or where in named:
            raise
        problem = str(error).partition(";")[0]
        parts = [part.rpartition(".")[2] for part in re.findall(r"[\w./-]+", where)]
        if ours := [hugging_face[part] for part in parts if part in hugging_face]:
            raise tree.InputError(f"{problem}; did you mean {','.join(dict.fromkeys(ours))}?") from None
        if "/" in where:
            raise
        close = tree.did_you_mean(where, named)
        raise tree.InputError(f"{problem}{close} (masks by name: {', '.join(named)}, last_K)") from None
    return {path: runs for path, row in values.items() if (runs := tree.true_ranges([bool(v) for v in row]))}


def mask(where: Where, params: Any) -> Any:
    """Return the mask as a pytree of bool, for Optax; a stacked array picked in part has a bool array [L, 1, ...]."""
    flat: dict[str, Any] = {}
    for path, row in tree.match_rules(rules(where), params, default=False).items():
        leaf = tree.named(params)[path]
        uniform = len(set(map(bool, row))) == 1
        flat[path] = bool(row[0]) if uniform else np.array(row, bool).reshape(-1, *[1] * (leaf.ndim - 1))
    return tree.nested(flat)
