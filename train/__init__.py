"""Runs: config and recipes, the train step, the loop, checkpoints, evaluation, the command line."""

import importlib
from typing import TYPE_CHECKING, Any

from .config import Data, Optim, Run
from .recipes import recipes  # at once: read later, the name would be the module's

if TYPE_CHECKING:
    from .loop import train
    from .optim import make_optimizer
    from .runs.load import load_run
    from .step import State, init_state, make_train_step

# Read when asked for: graftax.train.bench runs where grain, orbax and rich are not installed.
_FROM = {"train": "loop", "make_optimizer": "optim", "load_run": "runs", "State": "step", "init_state": "step",
         "make_train_step": "step"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)


__all__ = [
    "Data", "Optim", "Run", "State", "init_state", "load_run", "make_optimizer", "make_train_step", "recipes", "train",
]  # fmt: skip
