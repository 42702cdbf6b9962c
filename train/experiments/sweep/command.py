"""`graftax sweep`: many variations of a fine-tune, as few programs, over one copy of the base.

A sweep is a folder of ordinary runs (`trials/000`, ...), `sweep.json` (its settings), and the results: `results.jsonl`
with a line a trial, a table, and pictures. Each trial can be evaluated, merged, exported or continued as any other run.
"""

import dataclasses
from typing import Any, ClassVar

from .... import InputError
from ....peft import Subset
from ...cluster.signals import Stop
from ..base_cache import BaseCache
from ..experiment import Experiment, Repeated
from ..report.sweep import report
from .scheduler import Scheduler
from .trials import Trial, make_trials


@dataclasses.dataclass(frozen=True)
class Sweep(Experiment):
    """Train many variations of a fine-tune on one copy of the base.

    Example: graftax sweep sft --base runs/five --data.task snips --data.root DATA --method lora
    --over optim.lr=1e-3,3e-3,1e-2 --over method.rank=4,8,16 --over seed=0..2 --steps 120

    Every combination of the values is a trial: an ordinary run in OUT/trials/NNN. Trials that differ only in numbers,
    seeds, data, or ranks (of LoRA and its variants) are lanes of one program: a vmap over what trains, on one copy of
    the base. Other trials get programs of their own. Lanes share the base, the compilation and the kernel launches, not
    the FLOPs. A trial that diverges stops alone. Each trial equals its own `graftax finetune`, to rounding. OUT also
    gets results.jsonl, table.md and pictures. RECIPE, --method and all flags of graftax finetune set the shared run.
    """

    NAME: ClassVar[str] = "sweep"
    NOUN: ClassVar[str] = "sweep"

    over: Repeated = ()  # an axis FIELD=VALUE,VALUE,...: any field of a run; a..b are the integers a to b inclusive
    halve: int = 0  # successive halving: at steps/N^2 and steps/N the best 1/N by validation loss go on; 0: all do
    lanes: int = 0  # trials that train at a time; 0: chosen by the memory plan and a short timing
    score: int = 0  # validation rows that each trial answers at its end (the test is left to `graftax eval`)

    def check(self) -> None:
        """Raise InputError for settings that a sweep does not have, and for bad axes."""
        self.check_shared()
        make_trials(self.trial_config, self.over, self.out)

    def check_shared(self) -> None:
        """Raise InputError for settings of the shared run that no sweep has."""
        run = self.config
        if self.halve == 1:
            raise InputError("--halve 1: expected 2 or more (the best 1/N of the trials go on), or 0 for no halving")
        if run.mesh not in ((1, -1, 1), (1, 1, 1)):
            raise InputError("--mesh: a sweep places each lane on one device; drop the flag")
        for name in ("offload", "wandb", "eval_every"):
            if getattr(run, name):
                raise InputError(f"--{name.replace('_', '-')}: not supported by sweeps; drop the flag")
        if run.resume not in ("never", "auto"):
            raise InputError(f"--resume {run.resume}: a sweep continues from its newest steps; give --resume alone")
        if run.method != Subset() and any(text.startswith("method=") for text in self.over):
            raise InputError("--over method=...: each method has fields of its own, so that those of --method would be "
                             "lost; drop --method, and give fields as axes: --over method.rank=4")  # fmt: skip

    def execute(self, cache: BaseCache, stop: Stop) -> None:
        """Train all trials to their ends."""
        self.train_trials(make_trials(self.trial_config, self.over, self.out), cache, stop)

    def train_trials(self, trials: list[Trial], cache: BaseCache, stop: Stop) -> list[Trial]:
        """Train the given trials in the folder of this sweep; return them with all that their runs needed resolved."""
        self.check_folder()
        trials = cache.resolve_trials(trials)
        scheduler = Scheduler(self.out, trials, cache, stop, self.lanes, self.halve, self.score)
        with self.open_folder() as scheduler.guard:
            scheduler.run()
        return trials

    def report(self) -> dict[str, Any]:
        """Write and print the results; return the best trial and the counts."""
        return report(self.out, make_trials(self.trial_config, self.over, self.out))
