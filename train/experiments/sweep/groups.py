"""Which cells of a sweep are lanes of one program: those whose runs differ in data, seeds and numbers alone.

Whether a number can be an array is not listed anywhere: the step is traced with it as one, and where that fails (it
decides a shape, or a branch in Python) cells that differ in it are programs of their own.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .... import InputError
from ....model import Transformer
from ....peft import Method
from ...config import Run, flatten, method_to_dict, to_json
from ...optim import make_optimizer
from ...setup import BATCH_DTYPES, initial_layout
from ...step import make_train_step
from .trials import Trial

# Fields of a run that its program does not depend on: rows, and what is done between the steps.
FREE = ("out", "seed", "epochs", "eval_tokens", "max_skipped")
OFF = {"optim.clip": math.inf}  # what stands for 0, which means off, in an array


@dataclasses.dataclass
class Group:
    """Cells that are lanes of one program. `run` is of the largest arrays; cell i is `methods[i]` over arrays like
    those, with its value of each of the `numbers`."""

    run: Run
    cells: list[Trial]
    methods: list[Method]
    numbers: dict[str, list[float]]

    def value(self, name: str, i: int) -> float:
        """What lane i has as this number."""
        return OFF[name] if name in OFF and not self.numbers[name][i] else self.numbers[name][i]


def assigned(tree: Any, numbers: dict[str, Any]) -> Any:
    """A dataclass with dotted fields set, unchecked: they may be arrays that a program is given."""
    tree = copy.copy(tree)
    for name, value in numbers.items():
        first, _, rest = name.partition(".")
        object.__setattr__(tree, first, assigned(getattr(tree, first), {rest: value}) if rest else value)
    return tree


def lane_step(model: Transformer, run: Run) -> Callable[..., Any]:
    """step(state, frozen, batch, numbers) -> (state, metrics): the one train step, with some of a run's numbers as
    arrays. `jax.vmap` of it over state, batch and numbers trains many on one frozen base."""

    def step(state: Any, frozen: Any, batch: Any, numbers: dict[str, Any]) -> Any:
        """A step of one lane."""
        mine = assigned(run, numbers)
        tx = make_optimizer(mine.optim, state.trainable, run.steps, mine.method)
        one = make_train_step(
            model, mine.method, tx, accumulate=run.accumulate, chunk=run.chunk, spike=mine.optim.spike
        )
        return one(state, frozen, batch)

    return step


def batch_shapes(run: Run) -> dict[str, Any]:
    """The shapes of one lane's batch."""
    return {name: jax.ShapeDtypeStruct((run.data.batch, run.data.T), dtype) for name, dtype in BATCH_DTYPES.items()}


def groups(cells: list[Trial], ground: Callable[[Run], tuple[Transformer, Any]]) -> tuple[list[Group], dict[str, str]]:
    """(the groups of cells, {field: why cells that differ in it are apart}). ground(run) -> (model, parameters)."""
    apart: dict[str, str] = {}
    found: dict[str, list[Trial]] = {}
    for cell in cells:
        found.setdefault(_coarse(cell.run), []).append(cell)
    for name in {key for cell in cells for key in cell.values if len({_get(c.run, key) for c in cells}) > 1}:
        if len({json.dumps(json.loads(key).get(name)) for key in found}) > 1:
            apart[name] = "another program"
    return [group for same in found.values() for group in _split(same, *ground(same[0].run), apart)], apart


def _coarse(run: Run) -> str:
    """All that makes a program, numbers of method and optimizer aside."""
    tree = flatten(json.loads(to_json(run)))
    rows = {k for k in tree if k.startswith("data.")} - {"data.T", "data.batch"}
    kept = {k: v for k, v in tree.items() if k not in rows | set(FREE) and not _number(run, k)}
    more = {"method": type(run.method).__name__.lower(), "remembers": bool(run.optim.spike)}
    return json.dumps(kept | more, sort_keys=True)


def _get(run: Run, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _number(run: Run, name: str) -> bool:
    """Whether a field of the method or the optimizer is a number."""
    first, _, rest = name.partition(".")
    owner = {"method": run.method, "optim": run.optim}.get(first)
    return owner is not None and type(getattr(owner, rest, None)) in (int, float)


def _split(cells: list[Trial], model: Transformer, params: Any, apart: dict[str, str]) -> list[Group]:
    """Cells of one kind, by the numbers that must be the same in a program."""
    run, methods, grown = cells[0].run, [cell.run.method for cell in cells], ""
    initial_layout(run, jax.eval_shape(lambda: params))  # a mistake in it is said as a run says it
    for field in dataclasses.fields(run.method):  # type: ignore[arg-type]
        name, values = field.name, [getattr(method, field.name) for method in methods]
        if type(values[0]) is int and len(set(values)) > 1:
            largest = [dataclasses.replace(method, **{name: max(values)}) for method in methods]  # type: ignore[type-var]
            padded = [m if m == big else m.pad_to_rank(big) for m, big in zip(methods, largest, strict=True)]
            if None in padded or run.optim.name == "muon":  # whose steps are scaled by an array's shape
                return _by(f"method.{name}", "another program", cells, model, params, apart)
            methods, grown = [m for m in padded if m is not None], f"method.{name}"
    run = dataclasses.replace(run, method=methods[0])
    rows = [flatten({"method": method_to_dict(m), "optim": dataclasses.asdict(cell.run.optim)})
            for m, cell in zip(methods, cells, strict=True)]  # fmt: skip
    varied = [k for k in rows[0] if len({json.dumps(row[k]) for row in rows}) > 1]
    for name in varied:
        if not _traces(run, methods, model, params, name):
            own = len({_get(cell.run, name) for cell in cells}) > 1  # else it differs by what ranks were filled up to
            return _by(name if own else grown, "the program depends on it", cells, model, params, apart)
    return [Group(run, cells, methods, {name: [float(row[name]) for row in rows] for name in varied})]


def _by(name: str, why: str, cells: list[Trial], model: Any, params: Any, apart: dict[str, str]) -> list[Group]:
    apart[name] = why
    parts: dict[Any, list[Trial]] = {}
    for cell in cells:
        parts.setdefault(_get(cell.run, name), []).append(cell)
    return [group for part in parts.values() for group in _split(part, model, params, apart)]


def _traces(run: Run, methods: list[Method], model: Transformer, params: Any, name: str) -> bool:
    """Whether the step can be given a number as an array, and leaves the base as it is whatever its value."""
    if not _number(run, name) or type(_get(run, name)) is not float or _get(run, name) is None:
        return False
    if type(run.method).frozen_params is not Method.frozen_params:
        first, *others = [jax.tree.leaves(m.frozen_params(params)) for m in dict.fromkeys(methods)]
        if any(a is not b for other in others for a, b in zip(first, other, strict=True)):
            return False
    shapes = jax.eval_shape(lambda: params)
    try:
        frozen, state = initial_layout(run, shapes).shapes
        step, number = lane_step(model, run), {name: jax.ShapeDtypeStruct((), jnp.float32)}
        jax.eval_shape(step, state, frozen, batch_shapes(run), number)
    except InputError:
        raise
    except Exception:  # whatever jax, optax or a method says of a number that is no number
        return False
    return True
