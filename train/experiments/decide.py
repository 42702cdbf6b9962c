"""`graftax decide`: every way to a task's target that needs no new code, measured on one ground, the cheapest named.

In order of what they need: no model (the nearest example's answer), a prompt (with none, some, or the nearest worked
examples; answers free, or the likeliest of the task's choices), a trained method on 100, 300, 1000, all examples, a
mask, all parameters. The trained ones are a comparison (contest.py), so rates are chosen on validation rows there too.
"""

import contextlib
import dataclasses
import json
import math
import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

from ... import InputError
from ...bounds import Bounds, Checked, Count
from ...peft import Subset
from ..cluster.signals import Stop
from ..config import Run, method_to_dict, to_json
from ..setup import resolve_method
from .base_cache import BaseCache
from .compare import Compare, method_of
from .comparison import Entry, MethodComparison
from .decision_report import report
from .prompting import Prompting
from .sweep.command import check_out, dated, opened
from .sweep.trials import floats, given, ints
from .task_evaluator import TaskEvaluator

FILE = "decide.json"
HELP = """graftax decide --base RUN --task T --target METRIC>=X: the cheapest way to a target, all ways measured

Example: graftax decide --base runs/five --data.root DATA --task clinc150 --target 'accuracy>=0.8' --budget 30

  --task T      a task's name, or a file of examples
  --target      which of the task's scores is wanted, and how high: 'accuracy>=0.8'
  --method M    what is trained beside the base (lora), with its --method.fields
  --mask W      what is trained of the base itself (last_2)
  --sizes       how many examples it gets, commas between (100,300,1000), and all of them
  --shots N     worked examples in a prompt (8), fewer where they do not fit
  --requests N  how many will be answered once it is deployed (100000): what they cost counts as the training does
  --budget      minutes for the trainings: how many steps each has is measured. Or say --steps N
  --factors, --seeds, --lanes, --eval-rows, --out (runs/decide), --resume: as in graftax compare --help
  Any other flag of graftax finetune: --data.T, --data.batch, --optim.lr (of full fine-tuning), ...

Ends with one paragraph: the cheapest that reaches the target, by FLOPs of its trainings (all rates tried) and of the
requests, and what would change the answer. OUT/decision.md has the table, OUT/results.jsonl all that was found."""


@dataclasses.dataclass(frozen=True)
class Decide(Checked):
    """What is wanted, and what is tried."""

    run: Run  # its method is the one that is trained on growing parts of the examples
    task: str
    target: str  # METRIC>=X
    mask: str = "last_2"
    sizes: Annotated[tuple[int, ...], Bounds(1)] = (100, 300, 1000)
    shots: Count = 8
    requests: Annotated[int, Bounds(0, 10**15)] = 100_000
    factors: Annotated[tuple[float, ...], Bounds(0, ends="(]")] = (0.333, 1.0, 3.0)
    seeds: Count = 2
    budget: float = 0.0
    lanes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task:
            raise InputError("nothing to decide: give --task (see `graftax decide --help`)")
        self._parts()
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise InputError(f"--sizes {','.join(map(str, self.sizes))}: different numbers are wanted")
        if self.run.data.examples:
            raise InputError("--data.examples: give --sizes, the numbers of examples that are tried")
        if self.run.quantize:
            raise InputError("--quantize: full fine-tuning is one of the ways, and nothing trains all of a quantised "
                             "base; drop the flag, or take graftax compare")  # fmt: skip
        self.comparison()

    @property
    def metric(self) -> str:
        """Which score."""
        return self._parts()[1]

    @property
    def wanted(self) -> float:
        """How high."""
        return float(self._parts()[2])

    def _parts(self) -> Any:
        found = re.fullmatch(r"\s*(\w+)\s*>=\s*([0-9.]+(?:e-?\d+)?)\s*", self.target)
        try:
            if not math.isfinite(float(found[2] if found else "")):
                raise ValueError
        except ValueError:
            said = "wanted METRIC>=X, as in 'accuracy>=0.8' (quoted, or the shell takes > for a file)"
            raise InputError(f"--target {self.target or 'is missing'}: {said}") from None
        return found

    def comparison(self) -> Compare:
        """What shares out the trainings."""
        names = tuple(self.entries(10**9))
        return Compare(self.run, (self.task,), names, self.factors, self.seeds, self.budget, self.lanes)

    def entries(self, n: int) -> dict[str, Entry]:
        """{name: what is trained}, of n examples."""
        method = self.run.method
        name = type(method).__name__.lower()
        sizes = {f"{name} on {size:,} examples": Entry(method, size) for size in sorted(self.sizes) if size < n}
        return {**sizes, f"{name} on all examples": Entry(method), f"mask {self.mask}": Entry(method_of(self.mask)),
                "full fine-tuning": Entry(Subset("all"))}  # fmt: skip


def decide(args: list[str]) -> dict[str, Any]:
    """The command."""
    from ..cli import run_of

    if not args or "--help" in args or "-h" in args:
        print(HELP)
        raise SystemExit(0)
    command = shlex.join(["graftax", "decide", *(arg for arg in args if not arg.startswith("--resume"))])
    kinds: dict[str, Any] = {"task": str, "target": str, "mask": str, "sizes": ints, "shots": int, "requests": int,
                             "factors": floats, "seeds": int, "budget": float, "lanes": int}  # fmt: skip
    asked, args = given(args, kinds)
    for name in ("task", "target"):
        asked.setdefault(name, "")
    args = args if args and not args[0].startswith("-") else ["trial", *args]
    named = args[0].endswith(".json") or any(arg.split("=")[0] == "--method" for arg in args)
    run = run_of("finetune", args if named else [*args, "--method", "lora"], [f"--{name}" for name in kinds])
    run = dataclasses.replace(run, out="runs/decide") if run.out == "runs/trial" else run
    return execute(Decide(run, **asked), command)


def execute(plan: Decide, command: str = "") -> dict[str, Any]:
    """Measure, or go on; returns the table and the decision."""
    plan = dated(plan, FILE)
    out, run = Path(plan.run.out), plan.run
    keys = ("task", "target", "mask", "sizes", "shots", "requests", "factors", "seeds", "budget")
    said = {"run": json.loads(to_json(dataclasses.replace(run, out="", resume="never", force=""))),
            **{key: getattr(plan, key) for key in keys}}  # fmt: skip
    check_out(out, run.resume, json.loads(json.dumps(said)), FILE, "decision")
    with contextlib.ExitStack() as held:
        stop, ground = held.enter_context(Stop()), BaseCache()
        exam = TaskEvaluator.read(plan.task, run, ground, plan.metric)
        tokenizer, n = ground.base(run).tokenizer, len(exam.task.train)
        entries = {name: Entry(resolve_method(entry.method, tokenizer), entry.examples)
                   for name, entry in plan.entries(n).items()}  # fmt: skip
        contest = MethodComparison(plan.comparison(), entries, [exam], ground, stop, FILE)
        contest.check()
        prompting = Prompting(plan, exam, ground, contest.ledger, stop)
        held.enter_context(opened(out, run, said, FILE))
        contest.prepare(command)
        if not contest.ledger.find(kind="asked"):
            sizes = {name: entry.examples or n for name, entry in entries.items() if " on " in name}
            contest.ledger.add({
                "kind": "asked", "target": plan.wanted, "requests": plan.requests, "shots": plan.shots, "examples": n,
                "sizes": sizes, "peft": method_to_dict(run.method), "gold": exam.gold(), **prompting.request(),
            })  # fmt: skip
        prompting.go()
        contest.train(contest.steps(time.monotonic()))
        contest.test()
    return report(out)
