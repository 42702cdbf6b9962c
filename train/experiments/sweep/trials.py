"""Axes and cells: `--over optim.lr=1e-4,3e-4 --over seed=0..3` is every combination of the two, each a run."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from .... import InputError
from ....bounds import matches_type, type_name
from ...config import Run, method_class
from ...flags import nearest_flag

# What a sweep says for all of its cells.
PER_SWEEP_FIELDS = ("out", "phase", "recipe", "mesh", "resume", "force", "verify", "offload", "wandb", "tensorboard",
          "keep", "log_every", "save_every", "eval_every", "eval_rows", "eval_base_first", "date")  # fmt: skip
MAX_TRIALS = 4096  # cells


def words(text: str) -> tuple[str, ...]:
    """`a,b` as its parts."""
    return tuple(filter(None, text.split(",")))


def ints(text: str) -> tuple[int, ...]:
    """`1,2` as numbers."""
    return tuple(map(int, text.split(",")))


def floats(text: str) -> tuple[float, ...]:
    """`1,2.5` as numbers."""
    return tuple(map(float, text.split(",")))


WANTED: dict[Any, str] = {int: "a whole number is", float: "a number is", ints: "whole numbers, commas between, are",
          floats: "numbers, commas between, are"}  # fmt: skip


def given(args: list[str], kinds: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({flag: value} of those that are there, the other arguments). InputError for a value of another kind."""
    from ...cli import take

    found = {}
    for name, kind in kinds.items():
        text, args = take(args, f"--{name}")
        if text is not None:
            try:
                found[name] = kind(text)
            except ValueError:
                raise InputError(f"--{name} {text}: {WANTED[kind]} wanted") from None
    return found, args


class Trial(NamedTuple):
    """One run of a sweep."""

    number: int
    values: dict[str, str]  # what the axes say of it
    run: Run

    @property
    def name(self) -> str:
        """`lr=0.001 rank=8`."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())


def axis(text: str) -> tuple[str, list[str]]:
    """('optim.lr', ['1e-4', '3e-4']) of `optim.lr=1e-4,3e-4`; a..b are the whole numbers from a to b, b too."""
    name, equals, listed = text.partition("=")
    name, values = name.replace("-", "_"), []  # --optim.weight-decay is a flag, optim.weight_decay a field
    for value in filter(None, listed.split(",")):
        ends = re.fullmatch(r"(\d{1,10})\.\.(\d{1,10})", value)
        few = range(int(ends[1]), int(ends[2]) + 1)[: MAX_TRIALS + 1] if ends else ()
        values += map(str, few) if ends else [value]
    if not equals or not name or not values:
        raise InputError(f"--over {text}: no value; FIELD=VALUE,VALUE,... is wanted, or FIELD=FIRST..LAST")
    if len(set(values)) < len(values):
        raise InputError(f"--over {text}: a value is there twice; give each once")
    return name, values


def trials_of(run: Run, over: Sequence[str], out: Path) -> list[Trial]:
    """Every combination of the axes, as runs below `out`/cells. InputError for an axis that no run has."""
    axes = [axis(text) for text in over]
    names = [name for name, _ in axes]
    if not axes:
        raise InputError("nothing to sweep over: give --over FIELD=VALUE,VALUE,..., for example optim.lr=1e-4,3e-4")
    if len(set(names)) < len(names):
        raise InputError(f"--over {max(names, key=names.count)}: this axis is there twice; put its values into one")
    if (n := math.prod(len(values) for _, values in axes)) > MAX_TRIALS:
        raise InputError(f"--over: {n:,} cells, more than {MAX_TRIALS:,}; leave out values or axes")
    found = []
    for number, values in enumerate(itertools.product(*(values for _, values in axes))):
        chosen = dict(zip(names, values, strict=True))
        made = dataclasses.replace(changed(run, chosen), out=str(out / "cells" / f"{number:03d}"))
        found.append(Trial(number, chosen, made))
    return found


def changed(run: Run, values: dict[str, str]) -> Run:
    """The run with these fields; a method comes before its own fields."""
    for name in sorted(values, key=lambda name: name.count(".")):
        if name.split(".")[0] in PER_SWEEP_FIELDS:
            raise InputError(f"--over {name}: a sweep sets this itself, for all of its cells; take another field")
        run = _set(run, name.split("."), values[name], name)
    return run


def _set(owner: Any, parts: list[str], text: str, name: str) -> Any:
    hints = _hints(type(owner))
    first, *rest = parts
    if first not in hints:
        whose = type(owner).__name__.lower()
        raise InputError(
            f"--over {name}: {whose} has no {first!r}{nearest_flag(name, dotted(owner))}; it has {', '.join(hints)}"
        )
    now = getattr(owner, first)
    if rest:
        if not dataclasses.is_dataclass(now):
            raise InputError(f"--over {name}: {first} has no fields")
        value = _set(now, rest, text, name)
    elif isinstance(owner, Run) and first == "method":
        value = method_class(text)()
    else:
        value = _parsed(text, hints[first], name)
    try:
        return dataclasses.replace(owner, **{first: value})
    except InputError as error:
        raise InputError(f"--over {name}={text}: {error}") from None


def dotted(owner: Any, prefix: str = "") -> Iterator[str]:
    """The names of a dataclass's fields and of theirs, as an axis says them."""
    for field in dataclasses.fields(owner):
        yield prefix + field.name
        if dataclasses.is_dataclass(value := getattr(owner, field.name)):
            yield from dotted(value, f"{prefix}{field.name}.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """{field: its type} of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _parsed(text: str, hint: Any, name: str) -> Any:
    """The value of a field from a flag."""
    kinds = (bool, int, float, str)
    if get_origin(hint) is not Literal and hint not in kinds:
        raise InputError(f"--over {name}: {type_name(hint)} is no axis; only numbers, words and switches are")
    value: Any = text
    try:
        if hint is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif hint in (int, float):
            value = hint(text)
    except (KeyError, ValueError):
        value = None
    if not matches_type(value, hint):
        wanted = f"one of {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else type_name(hint)
        raise InputError(f"--over {name}: {text!r}, wanted {wanted}")
    return value
