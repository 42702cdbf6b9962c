"""`graftax compare`: methods on tasks under equal conditions: base, rows, steps, and number of learning rates tried.

Each method tries its learning rates on seed 0 and keeps the one with the least validation loss. Runs of more seeds at
that rate join it, and are scored on the task's test rows, by which nothing was chosen. All runs are trials of two
sweeps (`search`, `seeds`); every result is a line of `results.jsonl`, from which the reports are made.
"""

import dataclasses
import time
from typing import Annotated, Any, ClassVar

import tyro

from ... import InputError, peft
from ...bounds import Bounds, Count
from ...peft import Method, Subset, masks
from ..cluster.signals import Stop
from ..config import Run, did_you_mean, method_class
from ..setup import resolve_method
from .base_cache import BaseCache
from .comparison import MethodComparison
from .experiment import Experiment, Floats, Repeated, Words
from .report.compare import report
from .sweep.trials import with_fields
from .task_evaluator import TaskEvaluator
from .trainings import Entry, Trainings

MASK_NAMES = {"full": "all"}  # other names of masks


@dataclasses.dataclass(frozen=True)
class Compare(Experiment):
    """Compare methods on tasks, with confidence intervals.

    Example: graftax compare --base runs/five --data.root DATA --task clinc150 --task snips@intent_accuracy
    --methods full,last_2,lora,lora:rank=32,dora,ia3,prompt --seeds 3 --budget 60

    Each method tries the same number of learning rates on seed 0, and keeps the one with the least validation loss;
    scores are means over the seeds on the test. A winner is reported only if its lead is significant (simultaneous 95 %
    intervals, bootstrap over rows and seeds). OUT gets report.html, report.md and results.jsonl; OUT/search and
    OUT/seeds are sweeps. All flags of graftax finetune set the shared run: --data.T, --data.batch, --eval-rows (test
    rows that are scored, evenly spaced), --optim.lr (of full fine-tuning), --resume, ...
    """

    NAME: ClassVar[str] = "compare"
    NOUN: ClassVar[str] = "comparison"
    RECIPE: ClassVar[str] = "trial"

    # TASK or TASK@METRIC: a task's name or a file of examples, and which of its scores counts (its first)
    tasks: Annotated[Repeated, tyro.conf.arg(name="task")] = ()
    methods: Words = ()  # names of methods or masks, fields after colons: full,lora:rank=4:alpha=8
    # learning rates that each method tries: these times --optim.lr times the method's own factor
    factors: Annotated[Floats, Bounds(0, ends="(]")] = (0.333, 1.0, 3.0)
    seeds: Count = 3  # trainings that are scored
    budget: float = 0.0  # minutes for everything, from which the steps of a training follow; or give --steps
    lanes: int = 0  # trials that train at a time; 0: chosen by the memory plan and a short timing

    @property
    def trainings(self) -> Trainings:
        """The settings of the trainings."""
        return Trainings(self, self.factors, self.seeds, self.budget, self.lanes)

    def check(self) -> None:
        """Raise InputError for settings that are missing or do not fit together."""
        for flag, values in (("task", self.tasks), ("methods", self.methods)):
            if not values:
                raise InputError(f"nothing to compare: give --{flag} (see `graftax compare --help`)")
            if len(set(values)) < len(values):
                raise InputError(f"--{flag}: duplicate {max(values, key=values.count)}; give each once")
        if len(self.methods) < 2:
            raise InputError(f"--methods {self.methods[0]}: only one method; give two or more to compare")
        if len(self.tasks) > 1 and (self.config.data.valid or self.config.data.test):
            raise InputError("--data.valid and --data.test are the rows of one task; give one --task")
        self.trainings.check()
        for text in self.methods:
            parse_method(text)

    def execute(self, cache: BaseCache, stop: Stop) -> None:
        """Compare the methods, or go on with it."""
        start = time.monotonic()
        evaluators = [TaskEvaluator.read(text, self.config, cache) for text in self.tasks]
        if len({evaluator.name for evaluator in evaluators}) < len(evaluators):
            raise InputError("--task: duplicate task; only one of its scores counts, and results.jsonl has all of them")
        tokenizer = cache.base(self.config).tokenizer
        entries = {text: Entry(resolve_method(parse_method(text), tokenizer)) for text in self.methods}
        comparison = MethodComparison(self.trainings, entries, evaluators, cache, stop)
        comparison.check()
        with self.open_folder():
            comparison.prepare()
            comparison.train(start)
            comparison.test()

    def report(self) -> dict[str, Any]:
        """Write and print the report; return the results of each task."""
        return report(self.out)


def parse_method(text: str) -> Method:
    """Return the method of NAME:field=value:...; NAME is a method or a mask. Raises InputError for unknown names."""
    name, *fields = text.split(":")
    mask = MASK_NAMES.get(name, name)
    if name in peft.methods:
        method: Method = method_class(name)()
    elif mask in masks.named or mask.startswith("last_"):
        method = Subset(mask)
    else:
        known = sorted({*peft.methods, *masks.named, *MASK_NAMES, "last_K"})
        raise InputError(
            f"--methods {text}: no method or mask {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    values = {f"method.{field}": value for field, _, value in (part.partition("=") for part in fields)}
    try:
        return with_fields(Run(method=method), values).method
    except InputError as error:
        raise InputError(str(error).replace("--over ", f"--methods {text}: ", 1)) from None
