"""Programs: groups of trials whose runs differ only in data, seeds and numbers, so that one compiled step serves all.

There is no list of the fields that may differ within a program. Each swept number is traced as an array; if that fails,
because it decides a shape or a branch in Python, trials that differ in it get programs of their own.
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
from ...progress import console
from ...setup import BATCH_DTYPES, initial_layout
from ...step import make_train_step
from .trials import Trial

# Fields of a run that its program does not depend on: rows, and what happens between steps.
NOT_IN_PROGRAM = ("out", "seed", "epochs", "eval_tokens", "max_skipped")
OFF_VALUES = {"optim.clip": math.inf}  # the array value of a field whose 0 means off

Step = Callable[..., Any]
LoadBase = Callable[[Run], tuple[Transformer, Any]]


@dataclasses.dataclass
class Program:
    """Trials that train as lanes of one compiled step.

    `run` has the largest arrays (ranks). Trial i is `methods[i]`, its arrays padded to those sizes, with the value
    `numbers[field][i]` of each traced field.
    """

    run: Run
    trials: list[Trial]
    methods: list[Method]
    numbers: dict[str, list[float]]

    def value(self, field: str, i: int) -> float:
        """Return the value of a traced field in trial i, as the array that the step gets."""
        value = self.numbers[field][i]
        return OFF_VALUES[field] if field in OFF_VALUES and not value else value


def with_arrays(tree: Any, values: dict[str, Any]) -> Any:
    """Return a copy of nested dataclasses with dotted fields set, without validation: values may be traced arrays."""
    tree = copy.copy(tree)
    for name, value in values.items():
        field, _, rest = name.partition(".")
        object.__setattr__(tree, field, with_arrays(getattr(tree, field), {rest: value}) if rest else value)
    return tree


def lane_step(model: Transformer, run: Run) -> Step:
    """Return step(state, frozen, batch, numbers) -> (state, metrics): a train step with some fields of `run` as arrays.

    `jax.vmap` over state, batch and numbers trains many lanes on one frozen base.
    """

    def step(state: Any, frozen: Any, batch: Any, numbers: dict[str, Any]) -> Any:
        lane = with_arrays(run, numbers)
        tx = make_optimizer(lane.optim, state.trainable, run.steps, lane.method)
        train_step = make_train_step(
            model, lane.method, tx, accumulate=run.accumulate, chunk=run.chunk, spike=lane.optim.spike
        )
        return train_step(state, frozen, batch)

    return step


def batch_shapes(run: Run) -> dict[str, Any]:
    """Return the shapes [batch, T] of one lane's batch."""
    return {name: jax.ShapeDtypeStruct((run.data.batch, run.data.T), dtype) for name, dtype in BATCH_DTYPES.items()}


def group_trials(trials: list[Trial], load_base: LoadBase) -> tuple[list[Program], dict[str, str]]:
    """Return the programs, and {field: reason} for each field whose values are in different programs.

    Args:
        trials: the trials of a sweep, with the same base in each program.
        load_base: run -> (model, parameters of its base).
    """
    reasons: dict[str, str] = {}
    by_program: dict[str, list[Trial]] = {}
    for trial in trials:
        by_program.setdefault(_program_key(trial.run), []).append(trial)
    for name in {key for t in trials for key in t.values if len({_field(other.run, key) for other in trials}) > 1}:
        if len({json.dumps(json.loads(key).get(name)) for key in by_program}) > 1:
            reasons[name] = "another program"
    programs = [program for some in by_program.values() for program in _split(some, *load_base(some[0].run), reasons)]
    return programs, reasons


def _program_key(run: Run) -> str:
    """Return all fields that a program depends on, except numbers of the method and the optimizer, as JSON."""
    fields = flatten(json.loads(to_json(run)))
    rows = {name for name in fields if name.startswith("data.")} - {"data.T", "data.batch"}
    kept = {k: v for k, v in fields.items() if k not in rows | set(NOT_IN_PROGRAM) and not _is_number(run, k)}
    kept |= {"method": type(run.method).__name__.lower(), "spike_filter": bool(run.optim.spike)}
    return json.dumps(kept, sort_keys=True)


def _field(run: Run, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _is_number(run: Run, name: str) -> bool:
    """Return True for a field of the method or the optimizer that is a number."""
    owner_name, _, field = name.partition(".")
    owner = {"method": run.method, "optim": run.optim}.get(owner_name)
    return owner is not None and type(getattr(owner, field, None)) in (int, float)


def _split(trials: list[Trial], model: Transformer, params: Any, reasons: dict[str, str]) -> list[Program]:
    """Split trials with one program key by the numbers that must be the same within a program."""
    run, methods, padded_field = trials[0].run, [trial.run.method for trial in trials], ""
    initial_layout(run, jax.eval_shape(lambda: params))  # raises InputError as a single run would
    for field in dataclasses.fields(run.method):  # type: ignore[arg-type]
        name, values = field.name, [getattr(method, field.name) for method in methods]
        if type(values[0]) is int and len(set(values)) > 1:
            largest = [dataclasses.replace(method, **{name: max(values)}) for method in methods]  # type: ignore[type-var]
            padded = [m if m == big else m.pad_to_rank(big) for m, big in zip(methods, largest, strict=True)]
            if None in padded or run.optim.name == "muon":  # Muon scales its updates by the shape of an array
                return _split_by(f"method.{name}", "another program", trials, model, params, reasons)
            methods, padded_field = [m for m in padded if m is not None], f"method.{name}"
    run = dataclasses.replace(run, method=methods[0])
    rows = [flatten({"method": method_to_dict(method), "optim": dataclasses.asdict(trial.run.optim)})
            for method, trial in zip(methods, trials, strict=True)]  # fmt: skip
    varied = [name for name in rows[0] if len({json.dumps(row[name]) for row in rows}) > 1]
    for name in varied:
        if not _can_trace(run, methods, model, params, name):
            swept = len({_field(trial.run, name) for trial in trials}) > 1  # otherwise padding changed it
            return _split_by(
                name if swept else padded_field, "the program depends on it", trials, model, params, reasons
            )
    return [Program(run, trials, methods, {name: [float(row[name]) for row in rows] for name in varied})]


def _split_by(
    name: str, reason: str, trials: list[Trial], model: Any, params: Any, reasons: dict[str, str]
) -> list[Program]:
    reasons[name] = reason
    by_value: dict[Any, list[Trial]] = {}
    for trial in trials:
        by_value.setdefault(_field(trial.run, name), []).append(trial)
    return [program for some in by_value.values() for program in _split(some, model, params, reasons)]


def _can_trace(run: Run, methods: list[Method], model: Transformer, params: Any, name: str) -> bool:
    """Return True if the step accepts a field as an array, and the frozen base is the same for all of its values."""
    if not _is_number(run, name) or type(_field(run, name)) is not float:
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
    except Exception:  # any error of jax, optax or the method about an array where it needs a Python number
        return False
    return True


def print_programs(programs: list[Program], reasons: dict[str, str], n: int) -> None:
    """Print the programs, and why there is more than one."""
    console.print(f"{n} trials in {len(programs)} program{'s' * (len(programs) > 1)}: each program trains its trials "
                  "as lanes of one step. Lanes share the base, the compilation and the kernel launches, not the FLOPs; "
                  "they help when a single run leaves the device idle", soft_wrap=True)  # fmt: skip
    for name, reason in sorted(reasons.items()):
        console.print(f"trials that differ in {name} are in different programs: {reason}", soft_wrap=True)
    for i, program in enumerate(programs):
        numbers, method = ", ".join(program.numbers) or "data only", type(program.run.method).__name__.lower()
        few = ", ".join(str(trial.number) for trial in program.trials[:8]) + ", ..." * (len(program.trials) > 8)
        lanes = f"{len(program.trials)} lane{'s' * (len(program.trials) > 1)}"
        console.print(f"program {i + 1}: {lanes} of {method} (trials {few}); lanes differ in: {numbers}; "
                      f"{program.run.steps} steps", soft_wrap=True)  # fmt: skip
