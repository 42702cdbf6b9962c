"""Recipes: functions that return a Run. A recipe's docstring says what it is for, what it costs, and its results."""

import dataclasses
from collections.abc import Callable

from ..model import presets
from ..peft import Subset
from .config import Data, Optim, Run

recipes: dict[str, Callable[[], Run]] = {}


def recipe(make: Callable[[], Run]) -> Callable[[], Run]:
    """Register a recipe under the name of its function."""

    def named() -> Run:
        return dataclasses.replace(make(), recipe=make.__name__)

    named.__doc__ = make.__doc__
    recipes[make.__name__] = named
    return named


@recipe
def embedded() -> Run:
    """A 1 M-parameter base on the standard library of this Python: code and prose, no files needed."""
    domains = (("code", "embedded:code", 0.7), ("prose", "embedded:prose", 0.3))
    return Run(
        phase="pretrain",
        out="runs/embedded",
        model=presets["demo"],
        data=Data(domains=domains, T=128, batch=16, vocab=2048, held_out=0.02),
        optim=Optim(name="muon", lr=6e-3, schedule="wsd", weight_decay=0.05),
        steps=600,
        eval_every=200,
    )


@recipe
def five_domains() -> Run:
    """A 5 M-parameter base on web, books, encyclopedia, forum (below --data.root) and code: 20 minutes on two cores.

    graftax pretrain five_domains --data.root DATA gave these held-out bits per byte (in brackets zlib's): web 1.73
    (3.04), books 1.89 (3.23), encyclopedia 1.67 (2.50), forum 2.06 (2.74), code 1.62 (2.25).
    """
    weights = {"web": 0.16, "books": 0.2, "encyclopedia": 0.24, "forum": 0.2, "code": 0.2}
    return Run(
        phase="pretrain",
        out="runs/five_domains",
        model=presets["5m"],
        data=Data(domains=tuple((name, f"five:{name}", w) for name, w in weights.items()), T=256, batch=8, vocab=4096),
        optim=Optim(name="muon", lr=5e-3, schedule="wsd", decay=0.3, end=0.02, weight_decay=0.05),
        steps=2000,
        eval_every=500,
        save_every=500,
    )


@recipe
def sft() -> Run:
    """Tune a base (a run, or a Hugging Face model) on your own examples: --base BASE --data FILE.jsonl.

    This is full fine-tuning; --method NAME chooses another method.
    """
    return Run(
        phase="finetune",
        out="runs/sft",
        method=Subset("all"),
        data=Data(T=192, batch=8, held_out=0.1),
        optim=Optim(lr=1e-3),
    )


@recipe
def trial() -> Run:
    """A short fine-tune, of which `compare` and `decide` run many: evaluated on few tokens, scored on 400 rows."""
    return dataclasses.replace(
        sft(), out="runs/trial", eval_rows=400, eval_tokens=4096, eval_base_first=False, tensorboard=False
    )
