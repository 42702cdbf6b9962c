"""Training: config and recipes, the train step, the loop; runs, experiments and the command line around them.

`train` and `load_run` import their modules when called: those take seconds, and need packages (grain, orbax, rich) that
the command line's help and the environments of train/bench do without.
"""

from pathlib import Path
from typing import Any

from .config import Data, Optim, Run
from .optim import make_optimizer
from .recipes import recipes
from .step import State, init_state, make_train_step


def train(run: Run) -> Path:
    """Train to the last step of a run and return its folder; see runs/train.py."""
    from .runs.train import train

    return train(run)


def load_run(folder: str | Path, **options: Any) -> Any:
    """Load a run folder or a Hugging Face model; see runs/load.py for the options."""
    from .runs.load import load_run

    return load_run(folder, **options)


__all__ = [
    "Data",
    "Optim",
    "Run",
    "State",
    "init_state",
    "load_run",
    "make_optimizer",
    "make_train_step",
    "recipes",
    "train",
]
