"""The trainings of a comparison: what takes part, and the run of each method, learning rate and seed."""

import dataclasses
from typing import NamedTuple

from ... import InputError
from ...peft import Method
from ..config import Run
from .experiment import Experiment
from .sweep.command import Sweep

UNKNOWN_STEPS = 10_000  # of a run that is built before its steps are known: any schedule fits into it


class Entry(NamedTuple):
    """A participant: a method, trained on all examples (0) or on some."""

    method: Method
    examples: int = 0


@dataclasses.dataclass(frozen=True)
class Trainings:
    """The settings of all trainings of a comparison, as its experiment gives them."""

    experiment: Experiment
    factors: tuple[float, ...]  # of the learning rate
    seeds: int
    budget: float  # minutes; 0: --steps says how long
    lanes: int

    def check(self) -> None:
        """Raise InputError for settings that are missing or do not fit together."""
        if not self.factors:
            raise InputError("--factors: no value; give the factors of the learning rate to try")
        if len(set(self.factors)) < len(self.factors):
            raise InputError(f"--factors: duplicate {max(self.factors, key=self.factors.count)}; give each once")
        if bool(self.budget) == bool(self.experiment.config.steps):
            raise InputError("how long is each training? Give either --steps N or --budget MINUTES for everything")
        Sweep(self.experiment.config, (), lanes=self.lanes).check_shared()

    def make_run(self, task: str, entry: Entry, factor: float = 1.0, seed: int = 0, steps: int = 0) -> Run:
        """Return the run of a training; its learning rate is --optim.lr times the method's factor times `factor`."""
        config, method = self.experiment.trial_config, entry.method
        lr = float(f"{config.optim.lr * method.lr_multiplier * factor:.4g}")
        return dataclasses.replace(
            config,
            method=method,
            data=dataclasses.replace(config.data, task=task, examples=entry.examples or config.data.examples),
            optim=dataclasses.replace(config.optim, lr=lr),
            seed=seed,
            steps=steps or config.steps or UNKNOWN_STEPS,
        )
