"""Paths and rules: one language for masks, learning rates, sharding and initialisation.

A path joins the keys of a tree by `/`: `layers/mlp/up`. Rules are `[(regex, value), ...]`. A regex must match the
whole path, and the first match wins. A segment `[a:b]` or `[i]` after `layers` picks layers by index, like a Python
slice: `layers/[-2:]/mlp/.*`. A rule means the same for stacked layers (`layers/mlp/up` with the layer axis first), for
unrolled ones (`layers/3/mlp/up`) and for a slice that a method trains (`layers/mlp/up[4:8]`).
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import InputError
from .pattern import Pattern, compile_pattern

Rules = Sequence[tuple[str, Any]]
_RULE_LAYERS = re.compile(r"(?<=layers/)\[(?:(-?\d{1,9})?:(-?\d{1,9})?|(-?\d{1,9}))\]/")  # of a rule: may be open
_KEY_LAYERS = re.compile(r"\[(\d+):(\d+)\]")  # of a key of a method's tree
_UNROLLED_LAYER = re.compile(r"(?<=layers/)(\d+)/")
_NO_DEFAULT = object()


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf} of nested dicts; anything that is not a dict (an array, a shape, a weight) is a leaf."""
    return flatten_dict(tree, sep="/")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `named`, for trees whose keys contain no `/`."""
    return unflatten_dict(flat, sep="/")


def paths(tree: Any) -> list[tuple[str, Any]]:
    """[(path, leaf)] of any pytree in the order of `jax.tree.leaves`; attributes and indices count as keys."""
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def replace(tree: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the leaves at the paths of `new` replaced. Raises InputError for a path that the tree lacks."""
    flat = named(tree)
    if unknown := next((path for path in new if path not in flat), None):
        raise InputError(f"no parameter at {unknown}{did_you_mean(unknown, flat)}")
    return nested(flat | dict(new))


def did_you_mean(text: str, names: Any) -> str:
    """`; did you mean a, b?` with the names closest to a path or rule, or an empty string."""
    plain = re.sub(r"\\|\.\*|\[.*?\]/?|[()^$]", "", text)
    close = difflib.get_close_matches(plain, list(dict.fromkeys(names)), 3, 0.3)
    return f"; did you mean {', '.join(close)}?" if close else ""


# --- layers ---


def in_layers(path: str) -> bool:
    """Return whether a path lies under `layers`, in the base or in a method's tree."""
    return "layers" in path.split("/")[:-1]


def is_stacked(path: str) -> bool:
    """Return whether the array at a path holds several layers, with the layer axis first."""
    return in_layers(path) and not _UNROLLED_LAYER.search(path)


def name_and_layers(path: str) -> tuple[str, range | None]:
    """(the path without layer indices, the layers it names): `layers/3/mlp/up` and `layers/mlp/up[3:4]` are equal."""
    if cut := _KEY_LAYERS.search(path):
        return path[: cut.start()] + path[cut.end() :], range(int(cut[1]), int(cut[2]))
    if index := _UNROLLED_LAYER.search(path):
        return path[: index.start()] + path[index.end() :], range(int(index[1]), int(index[1]) + 1)
    return path, None


def split_layer_index(key: str) -> tuple[str, tuple[int, int] | None]:
    """Split a key of a method's tree into (path in the base, layers [start, stop) or None for all)."""
    cut = _KEY_LAYERS.search(key)
    return (key[: cut.start()], (int(cut[1]), int(cut[2]))) if cut else (key, None)


def iter_layers(tree: Any) -> Iterator[tuple[str, str, range | None]]:
    """Yield (path, name without layer indices, layers) of each leaf; layers is None outside `layers`."""
    for path, leaf in named(tree).items():
        name, layers = name_and_layers(path)
        if layers is None and in_layers(path):
            layers = range(jax.tree.leaves(leaf)[0].shape[0]) or None  # the leaf may be a weight of several arrays
        yield path, name, layers


# --- rules ---


def match_rules(
    rules: Rules, tree: Any, default: Any = _NO_DEFAULT, what: str = "rule"
) -> dict[str, list[Any]]:  # fmt: skip
    """{path: [value of each layer]} (one value outside `layers`) by the first rule that matches the whole path.

    Raises InputError for a rule, or a part `a` of a rule `a|b`, that matches nothing, for a rule that never decides a
    value and, without a default, for a leaf that no rule covers.
    """
    leaves = list(iter_layers(tree))
    depth = max((layers.stop for _, _, layers in leaves if layers), default=0)
    compiled = [(*_compile_rule(rule, depth, what), value) for rule, value in rules]
    matched, decisive, values = set[int](), set[int](), dict[str, list[Any]]()
    for path, name, layers in leaves:
        values[path] = []
        for layer in layers if layers is not None else [None]:
            matches = [i for i, (regex, picked, _) in enumerate(compiled)
                       if (picked is None or layer in picked) and regex.fullmatch(name)]  # fmt: skip
            if not matches and default is _NO_DEFAULT:
                raise InputError(f"no {what} covers {path}; add one, or a last rule '.*'")
            value = compiled[matches[0]][2] if matches else default
            values[path].append(value)
            matched.update(matches)
            decisive.update(i for i in matches if compiled[i][2] == value)
    names = [name for _, name, _ in leaves]
    for i, (rule, _) in enumerate(rules):
        if i not in matched:
            raise InputError(f"{what} {rule!r} matches no parameter{did_you_mean(rule, names)}")
        if i not in decisive:
            raise InputError(
                f"{what} {rule!r} is never reached: earlier rules match every parameter that it matches; put it first"
            )
        for part in _alternatives(rule):
            regex, _ = _compile_rule(part, depth, what)
            if not any(regex.fullmatch(name) for name in names):
                raise InputError(
                    f"{what} {rule!r}: its alternative {part!r} matches no parameter{did_you_mean(part, names)}"
                )
    return values


def _compile_rule(rule: str, depth: int, what: str) -> tuple[Pattern, range | None]:
    """Compile a rule to (pattern over names without layer indices, the layers it picks or None for all)."""
    layers = None
    if cut := _RULE_LAYERS.search(rule):
        start, stop, index = (int(x) if x else None for x in cut.groups())
        layers = range(depth)[start:stop] if index is None else range(depth)[index : index + 1 or None]
        rule = rule[: cut.start()] + rule[cut.end() :]
    return compile_pattern(rule, what), layers


def _alternatives(rule: str) -> list[str]:
    """The parts of a rule `a|b|c`, if each part is a pattern by itself; else []."""
    parts = rule.split("|")
    return parts if len(parts) > 1 and all(part and not set(part) & set("()[]\\") for part in parts) else []


def one_value_per_array(values: Mapping[str, list[Any]], what: str) -> dict[str, Any]:
    """{path: value} of `match_rules`. Raises InputError where the layers of one stacked array have different values."""
    for path, row in values.items():
        if any(value != row[0] for value in row):
            raise InputError(f"{what} rules differ between the layers of {path}, which is one array; drop the [a:b]")
    return {path: row[0] for path, row in values.items()}


def true_ranges(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """The [start, stop) ranges of True in a list of flags."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))
