"""Paths and rules: the one language for masks, learning rates, sharding and initialisation.

A path joins the keys of a tree by `/`: `layers/mlp/up`. Rules are `[(regex, value), ...]`: the regex must match the
whole path, the first match wins. A segment `[a:b]` or `[i]` after `layers` picks layers by index, as a Python slice
does: `layers/[-2:]/mlp/.*`. Rules mean the same for stacked layers (`layers/mlp/up` with the layer axis first), for
unrolled ones (`layers/3/mlp/up`) and for a slice that a method trains (`layers/mlp/up[4:8]`).
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from .. import InputError
from .pattern import Pattern, compile_pattern

Rules = Sequence[tuple[str, Any]]
_RANGE = re.compile(r"(?<=layers/)\[(?:(-?\d{1,9})?:(-?\d{1,9})?|(-?\d{1,9}))\]/")
_CUT = re.compile(r"\[(\d+):(\d+)\]")
_NONE = object()


def named(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{path: leaf} of nested dicts; anything that is not a dict (an array, a shape, a weight) is a leaf."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    items: dict[str, Any] = {}
    for key in tree:
        items |= named(tree[key], f"{prefix}/{key}" if prefix else str(key))
    return items


def paths(tree: Any) -> list[tuple[str, Any]]:
    """[(path, leaf)] of any pytree in the order of `jax.tree.leaves`: attributes and indices are keys too."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [("/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path), leaf)
            for path, leaf in found]  # fmt: skip


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `named` for trees whose keys have no `/`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def replace(tree: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the leaves at the given paths replaced."""
    flat = named(tree)
    unknown = [path for path in new if path not in flat]
    if unknown:
        raise InputError(f"no parameter at {unknown[0]}{did_you_mean(unknown[0], flat)}")
    return nested(flat | dict(new))


def did_you_mean(text: str, names: Any) -> str:
    """`; did you mean a, b?` with the closest names, or nothing."""
    plain = re.sub(r"\\|\.\*|\[.*?\]/?|[()^$]", "", text)
    close = difflib.get_close_matches(plain, list(dict.fromkeys(names)), 3, 0.3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def name_and_layers(path: str) -> tuple[str, range | None]:
    """(path without layer indices, the layers it names): `layers/3/mlp/up` and `layers/mlp/up[3:4]` are the same."""
    if cut := _CUT.search(path):
        return path[: cut.start()] + path[cut.end() :], range(int(cut[1]), int(cut[2]))
    if one := re.search(r"(?<=layers/)(\d+)/", path):
        return path[: one.start()] + path[one.end() :], range(int(one[1]), int(one[1]) + 1)
    return path, None


def in_layers(path: str) -> bool:
    """Whether a path lies under `layers`, in the base or in a method's tree."""
    return "layers" in path.split("/")[:-1]


def is_stacked(path: str) -> bool:
    """Whether the array at a path holds several layers, the layer axis first."""
    return in_layers(path) and not re.search(r"layers/\d+/", path)


def split_layer_index(key: str) -> tuple[str, tuple[int, int] | None]:
    """A key of a method's tree as (path in the base, layers [start, stop) or None for all)."""
    cut = _CUT.search(key)
    return (key[: cut.start()], (int(cut[1]), int(cut[2]))) if cut else (key, None)


def iter_layers(tree: Any) -> Iterator[tuple[str, str, range | None]]:
    """(path, canonical name, layers) of each leaf; layers is None outside `layers`."""
    for path, leaf in named(tree).items():
        name, layers = name_and_layers(path)
        depth = jax.tree.leaves(leaf)[0].shape[0] if layers is None and in_layers(path) else 0  # of a weight too
        yield path, name, range(depth) if depth else layers


def _compiled(rule: str, depth: int, what: str) -> tuple[Pattern, range | None]:
    """A rule as (regex over canonical names, the layers it picks)."""
    layers, found = None, _RANGE.search(rule)
    if found:
        start, stop, one = (int(x) if x else None for x in found.groups())
        layers = range(depth)[start:stop] if one is None else range(depth)[one : one + 1 or None]
        rule = rule[: found.start()] + rule[found.end() :]
    return compile_pattern(rule, what), layers


def match_rules(rules: Rules, tree: Any, default: Any = _NONE, what: str = "rule") -> dict[str, list[Any]]:
    """{path: [value of each layer]} (one value outside `layers`) by the first rule that matches the whole path.

    Raises InputError for a rule that matches nothing and, without a default, for a leaf that no rule covers.
    """
    leaves = list(iter_layers(tree))
    depth = max((layers.stop for _, _, layers in leaves if layers), default=0)
    compiled = [(*_compiled(rule, depth, what), value) for rule, value in rules]
    hits, used, values = [0] * len(compiled), [False] * len(compiled), {}
    for path, name, layers in leaves:
        row: list[Any] = []
        for layer in layers if layers is not None else [None]:
            matching = (i for i, (regex, only, _) in enumerate(compiled)
                        if (only is None or layer in only) and regex.fullmatch(name))  # fmt: skip
            found = list(matching)
            for i in found:
                hits[i] += 1
                used[i] |= compiled[i][2] == compiled[found[0]][2]
            if not found and default is _NONE:
                raise InputError(f"no {what} covers {path}; add one, or a last rule '.*'")
            row.append(compiled[found[0]][2] if found else default)
        values[path] = row
    names = [name for _, name, _ in leaves]
    for (rule, _), count, has_effect in zip(rules, hits, used, strict=True):
        if not count:
            raise InputError(f"{what} {rule!r} matches no parameter{did_you_mean(rule, names)}")
        if not has_effect:
            raise InputError(f"{what} {rule!r} is never reached: rules before it match all that it does; put it first")
        for part in _alternatives(rule):
            regex, _ = _compiled(part, depth, what)
            if not any(regex.fullmatch(name) for name in names):
                raise InputError(f"{what} {rule!r}: its part {part!r} matches no parameter{did_you_mean(part, names)}")
    return values


def _alternatives(rule: str) -> list[str]:
    """The parts of `a|b|c`, for a rule that is that and whose parts can stand alone; else []."""
    parts = rule.split("|")
    return parts if len(parts) > 1 and all(part and not set(part) & set("()[]\\") for part in parts) else []


def one_value_per_array(values: Mapping[str, list[Any]], what: str) -> dict[str, Any]:
    """{path: value} of a match whose rules may not differ between the layers of one stacked array."""
    for path, row in values.items():
        if any(value != row[0] for value in row):
            raise InputError(f"{what} rules differ between the layers of {path}, which is one array; drop the [a:b]")
    return {path: row[0] for path, row in values.items()}


def true_ranges(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """The [start, stop) ranges of True in a list of flags."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))
