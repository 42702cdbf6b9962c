"""Axes and trials: `--over optim.lr=1e-4,3e-4 --over seed=0..3` makes one trial for each combination of values."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from .... import InputError
from ....bounds import matches_type, type_name
from ...config import Run, method_class
from ...flags import nearest_flag

# Fields of a run that are the same for all trials of a sweep, so that they cannot be axes.
PER_SWEEP_FIELDS = (
    "out", "phase", "recipe", "mesh", "resume", "force", "verify", "offload", "wandb", "tensorboard", "keep",
    "log_every", "save_every", "eval_every", "eval_rows", "eval_base_first", "date",
)  # fmt: skip
MAX_TRIALS = 4096


class Trial(NamedTuple):
    """One run of a sweep, and what its folder says of its progress."""

    number: int
    values: dict[str, str]  # {axis: value as text}
    run: Run

    @property
    def name(self) -> str:
        """The values of the axes: `lr=0.001 rank=8`."""
        return " ".join(f"{axis.rpartition('.')[2]}={value}" for axis, value in self.values.items())

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.run.out)

    @property
    def diverged(self) -> bool:
        """True if the run ended because its loss or its parameters were not finite."""
        return (self.folder / "bad_rows.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary.json; {} if there is none yet."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    @property
    def finished_steps(self) -> float:
        """The last step that is trained, saved and evaluated; infinity if the trial diverged."""
        return math.inf if self.diverged else self.summary.get("steps", 0)


def trial_folder(out: Path, number: int) -> Path:
    """Return the run directory of a trial: OUT/trials/NNN, or OUT/cells/NNN in a sweep of an earlier version."""
    return out / ("cells" if (out / "cells").is_dir() else "trials") / f"{number:03d}"


def span(trials: list[Trial]) -> str:
    """Return `trials 0-3` or `trial 4`."""
    first, last = trials[0].number, trials[-1].number
    return f"trials {first}-{last}" if last > first else f"trial {first}"


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Return ("optim.lr", ["1e-4", "3e-4"]) for `optim.lr=1e-4,3e-4`; a..b stands for the integers a to b inclusive.

    Raises InputError for an axis without values, or with a value given twice.
    """
    name, equals, listed = text.partition("=")
    name, values = name.replace("-", "_"), []  # --optim.weight-decay is a flag, optim.weight_decay a field
    for value in filter(None, listed.split(",")):
        ends = re.fullmatch(r"(\d{1,10})\.\.(\d{1,10})", value)
        values += map(str, range(int(ends[1]), int(ends[2]) + 1)[: MAX_TRIALS + 1]) if ends else [value]
    if not equals or not name or not values:
        raise InputError(f"--over {text}: no value; expected FIELD=VALUE,VALUE,... or FIELD=FIRST..LAST")
    if len(set(values)) < len(values):
        raise InputError(f"--over {text}: duplicate value; give each value once")
    return name, values


def make_trials(run: Run, over: Sequence[str], out: Path) -> list[Trial]:
    """Return a trial for every combination of the axes. Raises InputError for an axis that is no field of a run."""
    axes = [parse_axis(text) for text in over]
    names = [name for name, _ in axes]
    if not axes:
        raise InputError("nothing to sweep over: give --over FIELD=VALUE,VALUE,..., for example optim.lr=1e-4,3e-4")
    if len(set(names)) < len(names):
        raise InputError(f"--over {max(names, key=names.count)}: duplicate axis; put all of its values into one --over")
    if (n := math.prod(len(values) for _, values in axes)) > MAX_TRIALS:
        raise InputError(f"--over: {n:,} trials, more than {MAX_TRIALS:,}; leave out values or axes")
    trials = []
    for number, combination in enumerate(itertools.product(*(values for _, values in axes))):
        values = dict(zip(names, combination, strict=True))
        trial_run = dataclasses.replace(with_fields(run, values), out=str(trial_folder(out, number)))
        trials.append(Trial(number, values, trial_run))
    return trials


def with_fields(run: Run, values: dict[str, str]) -> Run:
    """Return the run with dotted fields set from text; `method` is set before the fields of the method."""
    for name in sorted(values, key=lambda name: name.count(".")):
        if name.split(".")[0] in PER_SWEEP_FIELDS:
            raise InputError(f"--over {name}: this field is the same for all trials of a sweep; take another field")
        run = _with_field(run, name.split("."), values[name], name)
    return run


def _with_field(owner: Any, path: list[str], text: str, axis: str) -> Any:
    hints = _field_types(type(owner))
    field, *rest = path
    if field not in hints:
        kind = type(owner).__name__.lower()
        near = nearest_flag(axis, _field_paths(owner))
        raise InputError(f"--over {axis}: {kind} has no {field!r}{near}; it has {', '.join(hints)}")
    current = getattr(owner, field)
    if rest:
        if not dataclasses.is_dataclass(current):
            raise InputError(f"--over {axis}: {field} has no fields")
        value = _with_field(current, rest, text, axis)
    elif isinstance(owner, Run) and field == "method":
        value = method_class(text)()
    else:
        value = _parse_value(text, hints[field], axis)
    try:
        return dataclasses.replace(owner, **{field: value})
    except InputError as error:
        raise InputError(f"--over {axis}={text}: {error}") from None


def _field_paths(owner: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields of nested dataclasses."""
    for field in dataclasses.fields(owner):
        yield prefix + field.name
        if dataclasses.is_dataclass(value := getattr(owner, field.name)):
            yield from _field_paths(value, f"{prefix}{field.name}.")


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _parse_value(text: str, hint: Any, axis: str) -> Any:
    """Return the value of a field of type `hint`. Raises InputError for other text, and for types of no axis."""
    if get_origin(hint) is not Literal and hint not in (bool, int, float, str):
        raise InputError(f"--over {axis}: {type_name(hint)} cannot be an axis; only numbers, words and switches can")
    value: Any = text
    try:
        if hint is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif hint in (int, float):
            value = hint(text)
    except (KeyError, ValueError):
        value = None
    if not matches_type(value, hint):
        choices = f"one of {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else type_name(hint)
        raise InputError(f"--over {axis}: {text!r}, expected {choices}")
    return value
