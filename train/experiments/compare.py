"""`graftax compare`: methods on tasks, on one ground: the same base, rows, steps, and number of learning rates tried.

Each method tries its rates on seed 0 and keeps the one with the least loss on the task's validation rows; runs of more
seeds at that rate join it; those are scored on the task's test, which nothing was chosen by. All runs are cells of two
sweeps (`search`, `seeds`); all that was found is a line of `results.jsonl`, and the reports have their numbers from it.
"""

import contextlib
import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

from ... import InputError, peft
from ...bounds import Bounds, Checked, Count
from ...peft import Method, Subset, masks
from ..cluster.signals import Stop
from ..config import Run, did_you_mean, method_class, to_json
from ..setup import resolve_method
from .base_cache import BaseCache
from .compare_report import report
from .comparison import Entry, MethodComparison
from .sweep.command import Sweep, check_out, dated, opened, plain
from .sweep.trials import changed, floats, given, words
from .task_evaluator import TaskEvaluator

FILE = "compare.json"
MASKS = {"full": "all"}  # what people call a mask of which nothing is frozen
HELP = """graftax compare --base RUN --task T [--task ...] --methods A,B,... : methods on one ground

Example: graftax compare --base runs/five --data.root DATA --task clinc150 --task snips@intent_accuracy \\
             --methods full,last_2,lora,lora:rank=32,dora,ia3,prompt --seeds 3 --budget 60

  --task T[@METRIC]  a task's name or a file of examples, and which of its scores counts (its first)
  --methods     names of methods or masks, commas between; fields behind colons: lora:rank=4:alpha=8
  --budget      minutes for all of it: how many steps a training has is measured. Or say --steps N
  --factors     learning rates tried, over --optim.lr times the method's own guess (0.333,1,3)
  --seeds N     trainings that are scored (3)
  --lanes N     how many cells train at once; else the plan's memory and a short timing choose
  --eval-rows N test rows that are answered and scored (400), evenly out of all of them
  --out         the folder (runs/compare): report.html, report.md, results.jsonl; search/ and seeds/ are sweeps
  --resume      go on with a comparison that was ended
  Any other flag of graftax finetune: --data.T, --data.batch, --optim.lr (of full fine-tuning), ...

Each method tries the same number of rates on seed 0, and takes the one with the least validation loss; scores are of
the test, means over the seeds. No winner is named that the bootstrap over rows and seeds does not tell apart."""


@dataclasses.dataclass(frozen=True)
class Compare(Checked):
    """What all runs share, and what is compared."""

    run: Run
    tasks: tuple[str, ...]  # each maybe with @METRIC
    methods: tuple[str, ...]  # NAME:field=value:...
    factors: Annotated[tuple[float, ...], Bounds(0, ends="(]")] = (0.333, 1.0, 3.0)
    seeds: Count = 3
    budget: float = 0.0  # minutes; 0: --steps says how long
    lanes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, values in (("task", self.tasks), ("methods", self.methods), ("factors", self.factors)):
            if not values:
                raise InputError(f"nothing to compare: give --{flag} (see `graftax compare --help`)")
            if len(set(values)) < len(values):
                raise InputError(f"--{flag}: {max(values, key=values.count)} is there twice; give each once")
        if len(self.methods) < 2:
            raise InputError(f"--methods {self.methods[0]}: one has nothing to be compared with; give two or more")
        if len(self.tasks) > 1 and (self.run.data.valid or self.run.data.test):
            raise InputError("--data.valid and --data.test are the rows of one task; give one --task")
        if bool(self.budget) == bool(self.run.steps):
            raise InputError("how long does each train? Give --steps N, or --budget MINUTES for all, one of the two")
        Sweep(self.run, (), lanes=self.lanes)  # what a sweep has not is said before anything runs

    def run_of(self, task: str, entry: Entry, factor: float, seed: int = 0, steps: int = 0) -> Run:
        """One training; of 10,000 steps where nothing says how many, so that any schedule fits into it."""
        steps = steps or self.run.steps or 10_000
        method = entry.method
        data = dataclasses.replace(self.run.data, task=task, examples=entry.examples or self.run.data.examples)
        optim = dataclasses.replace(
            self.run.optim, lr=float(f"{self.run.optim.lr * method.lr_multiplier * factor:.4g}")
        )
        return dataclasses.replace(plain(self.run), method=method, data=data, optim=optim, seed=seed, steps=steps)


def method_of(said: str) -> Method:
    """The method of NAME:field=value:..., a name being that of a method or of a mask."""
    name, *fields = said.split(":")
    mask = MASKS.get(name, name)
    if name not in peft.methods and (mask in masks.named or mask.startswith("last_")):
        method: Method = Subset(mask)
    elif name in peft.methods:
        method = method_class(name)()
    else:
        known = [*peft.methods, *masks.named, *MASKS, "last_K"]
        raise InputError(f"--methods {said}: no method or mask {name!r}{did_you_mean(name, known)}; there are "
                         f"{', '.join(sorted(set(known)))}")  # fmt: skip
    values = {f"method.{key}": value for key, _, value in (field.partition("=") for field in fields)}
    run = Run(method=method)
    try:
        return changed(run, values).method
    except InputError as error:
        raise InputError(str(error).replace("--over ", f"--methods {said}: ", 1)) from None


def compare(args: list[str]) -> dict[str, Any]:
    """The command."""
    from ..cli import run_of, take

    if not args or "--help" in args or "-h" in args:
        print(HELP)
        raise SystemExit(0)
    command = shlex.join(["graftax", "compare", *(arg for arg in args if not arg.startswith("--resume"))])
    tasks: list[str] = []
    text, args = take(args, "--task")
    while text is not None:
        tasks.append(text)
        text, args = take(args, "--task")
    kinds: dict[str, Any] = {"methods": words, "factors": floats, "seeds": int, "budget": float, "lanes": int}
    asked, args = given(args, kinds)
    asked.setdefault("methods", ())
    args = args if args and not args[0].startswith("-") else ["trial", *args]
    run = run_of("finetune", args, [f"--{name}" for name in ("task", *kinds)])
    run = dataclasses.replace(run, out="runs/compare") if run.out == "runs/trial" else run
    return execute(Compare(run, tuple(tasks), **asked), command)


def execute(plan: Compare, command: str = "") -> dict[str, Any]:
    """Compare, or go on with it; returns each task's table and where the reports are."""
    plan = dated(plan, FILE)
    out, run, began = Path(plan.run.out), plan.run, time.monotonic()
    entries = {said: Entry(method_of(said)) for said in plan.methods}
    said = {"run": json.loads(to_json(dataclasses.replace(run, out="", resume="never", force=""))),
            **{key: getattr(plan, key) for key in ("factors", "seeds", "budget")},
            "tasks": list(plan.tasks), "methods": list(plan.methods)}  # fmt: skip
    check_out(out, run.resume, json.loads(json.dumps(said)), FILE, "comparison")
    with contextlib.ExitStack() as held:
        stop, ground = held.enter_context(Stop()), BaseCache()
        exams = [TaskEvaluator.read(text, run, ground) for text in plan.tasks]
        if len({exam.name for exam in exams}) < len(exams):
            raise InputError("--task: a task is there twice; one score of it counts, and results.jsonl has all of them")
        tokenizer = ground.base(run).tokenizer
        entries = {name: Entry(resolve_method(entry.method, tokenizer)) for name, entry in entries.items()}
        contest = MethodComparison(plan, entries, exams, ground, stop, FILE)
        contest.check()
        held.enter_context(opened(out, run, said, FILE))
        contest.go(command, began)
    return report(out)
