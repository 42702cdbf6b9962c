"""`graftax decide`: find the cheapest approach that reaches a target score, among all that need no new code.

The approaches, in order of what they need: no model (the answer of the nearest example); a prompt (with none, random or
the nearest worked examples; a free answer or the most likely of the task's choices); a method trained on 100, 300, 1000
or all examples; a mask; full fine-tuning. The trainings are a comparison, so that validation rows choose their rates.
"""

import dataclasses
import math
import re
import time
from typing import Annotated, Any, ClassVar

from ... import InputError
from ...bounds import Bounds, Count
from ...peft import Subset
from ..cluster.signals import Stop
from ..config import method_to_dict
from ..setup import resolve_method
from .base_cache import BaseCache
from .compare import parse_method
from .comparison import MethodComparison
from .experiment import Experiment, Floats, Ints
from .prompting import Prompting
from .report.decide import report
from .task_evaluator import TaskEvaluator
from .trainings import Entry, Trainings


@dataclasses.dataclass(frozen=True)
class Decide(Experiment):
    """Find the cheapest approach that reaches a target score.

    Example: graftax decide --base runs/five --data.root DATA --task clinc150 --target 'accuracy>=0.8' --budget 30

    Measures prompts, a method (--method, lora) on growing numbers of examples, a mask, and full fine-tuning. Ends with
    one paragraph: the cheapest approach that reaches the target, by the FLOPs of its trainings (all learning rates
    tried) and of the requests, and what would change the answer. OUT/decision.md has the table, OUT/results.jsonl all
    results. All flags of graftax finetune set the shared run: --data.T, --data.batch, --eval-rows (test rows that are
    scored, evenly spaced), --optim.lr (of full fine-tuning), --method.FIELD, --resume, ...
    """

    NAME: ClassVar[str] = "decide"
    NOUN: ClassVar[str] = "decision"
    RECIPE: ClassVar[str] = "trial"
    METHOD: ClassVar[str] = "lora"

    task: str = ""  # a task's name, or a file of examples
    target: str = ""  # the score to reach: 'accuracy>=0.8' (quoted, or the shell takes > for a file)
    mask: str = "last_2"  # what is trained of the base itself
    # numbers of examples that the method is trained on, besides all
    sizes: Annotated[Ints, Bounds(1)] = (100, 300, 1000)
    shots: Count = 8  # worked examples in a prompt; fewer where they do not fit
    requests: Annotated[int, Bounds(0, 10**15)] = 100_000  # requests after deployment, whose FLOPs count too
    # learning rates that each method tries: these times --optim.lr times the method's own factor
    factors: Annotated[Floats, Bounds(0, ends="(]")] = (0.333, 1.0, 3.0)
    seeds: Count = 2  # trainings that are scored
    budget: float = 0.0  # minutes for the trainings, from which their steps follow; or give --steps
    lanes: int = 0  # trials that train at a time; 0: chosen by the memory plan and a short timing

    @property
    def trainings(self) -> Trainings:
        """The settings of the trainings."""
        return Trainings(self, self.factors, self.seeds, self.budget, self.lanes)

    @property
    def goal(self) -> tuple[str, float]:
        """The metric, and the score to reach. Raises InputError for a target of another form."""
        match = re.fullmatch(r"\s*(\w+)\s*>=\s*([0-9.]+(?:e-?\d+)?)\s*", self.target)
        try:
            if match and math.isfinite(score := float(match[2])):
                return match[1], score
        except ValueError:  # 1.2.3
            pass
        raise InputError(f"--target {self.target or 'is missing'}: expected METRIC>=X, as in 'accuracy>=0.8' (quoted, "
                         "or the shell takes > for a file)")  # fmt: skip

    def check(self) -> None:
        """Raise InputError for settings that are missing or do not fit together."""
        if not self.task:
            raise InputError("nothing to decide: give --task (see `graftax decide --help`)")
        _ = self.goal
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise InputError(f"--sizes {','.join(map(str, self.sizes))}: expected different numbers, commas between")
        if self.config.data.examples:
            raise InputError("--data.examples: give --sizes, the numbers of examples to try")
        if self.config.quantize:
            raise InputError("--quantize: full fine-tuning is one of the approaches, and a quantised base cannot be "
                             "trained in full; drop the flag, or use graftax compare")  # fmt: skip
        self.trainings.check()
        parse_method(self.mask)

    def entries(self, examples: int) -> dict[str, Entry]:
        """Return {name: entry} of all trainings, for a task with so many training examples."""
        method = self.config.method
        name = type(method).__name__.lower()
        sizes = {f"{name} on {size:,} examples": Entry(method, size) for size in sorted(self.sizes) if size < examples}
        return {**sizes, f"{name} on all examples": Entry(method), f"mask {self.mask}": Entry(parse_method(self.mask)),
                "full fine-tuning": Entry(Subset("all"))}  # fmt: skip

    def execute(self, cache: BaseCache, stop: Stop) -> None:
        """Measure all options, or those that are left."""
        metric, score = self.goal
        evaluator = TaskEvaluator.read(self.task, self.config, cache, metric)
        tokenizer, examples = cache.base(self.config).tokenizer, len(evaluator.task.train)
        entries = {name: entry._replace(method=resolve_method(entry.method, tokenizer))
                   for name, entry in self.entries(examples).items()}  # fmt: skip
        comparison = MethodComparison(self.trainings, entries, [evaluator], cache, stop)
        comparison.check()
        prompting = Prompting(self.config, self.shots, evaluator, cache, comparison.log, stop)
        with self.open_folder():
            comparison.prepare()
            if not comparison.log.select(kind="question"):
                sizes = {name: entry.examples or examples for name, entry in entries.items() if " on " in name}
                comparison.log.add({
                    "kind": "question", "target": score, "requests": self.requests, "shots": self.shots,
                    "examples": examples, "sizes": sizes, "peft": method_to_dict(self.config.method),
                    "reference_score": evaluator.reference_score(), **prompting.request_cost(),
                })  # fmt: skip
            prompting.run()
            comparison.train(time.monotonic())
            comparison.test()

    def report(self) -> dict[str, Any]:
        """Write and print the report; return the options and the decision."""
        return report(self.out)
