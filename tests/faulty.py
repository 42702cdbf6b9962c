"""Tiny runs that faults are injected into: 40 steps, a base on a mixture of two domains, and tunings of it."""

import dataclasses
import json
import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
from graftax.data.tokenizers import train_tokenizer
from graftax.model.sharding import make_mesh
from graftax.peft import LoRA, Prompt, Subset
from graftax.train.config import Data, Optim, Run, to_json
from graftax.train.faults import VARIABLE
from graftax.train.runs import train as run_module
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.train import train
from tiny import CONFIG

STEPS = 40
CASES = ["pretrain", "full", "lora", "prompt"]


@pytest.fixture(scope="session", autouse=True)
def programs():
    """The step of a run is compiled once for all of its lives."""
    real, kept = run_module.compile_step, {}
    same = {"out": "", "resume": "never", "force": "", "save_every": 0, "keep": 1, "max_skipped": 0, "verify": "full"}

    def compile_(setup):
        key = to_json(dataclasses.replace(setup.run, **same)) + setup.base_fingerprint
        if key not in kept:
            kept[key] = real(setup)
        return kept[key]

    run_module.compile_step = compile_
    yield kept
    run_module.compile_step = real


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{case: Run}; `full`, `lora` and `prompt` stand on what `pretrain` made, which has run."""
    folder = tmp_path_factory.mktemp("faults")
    topics = [text[:3000] for _, text in sorted(pydoc_data.topics.topics.items())[:24]]
    for name, part in (("a", topics[:12]), ("b", topics[12:])):
        (folder / name).mkdir()
        for i, text in enumerate(part):
            (folder / name / f"{i}.txt").write_text(text, "utf-8")
    train_tokenizer(topics, folder / "tokenizer.model", 400)
    rows = [{"prompt": f"{word} {i}", "completion": word[::-1]} for i in range(30) for word in ("red", "blue")]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    domains = (("a", str(folder / "a"), 0.7), ("b", str(folder / "b"), 0.3))
    data = Data(domains=domains, T=32, batch=16, held_out=0.2, tokenizer=str(folder / "tokenizer.model"), cache="")
    model = dataclasses.replace(CONFIG, V=400, context=64)
    pretrain = Run(steps=STEPS, mesh=(8, 1, 1), log_every=7, save_every=6, eval_tokens=256, tensorboard=False,
                   optim=Optim(lr=1e-2), model=model, data=data, accumulate=2, out=str(folder / "pretrain"),
                   )  # fmt: skip
    data = dataclasses.replace(data, domains=(), tokenizer="", batch=8, task=str(folder / "colours.jsonl"))
    tune = dataclasses.replace(pretrain, phase="finetune", base=pretrain.out, data=data, model=None)
    tune = dataclasses.replace(tune, accumulate=1, eval_base_first=False, eval_rows=2)
    wide = dataclasses.replace(tune, accumulate=2, data=dataclasses.replace(data, batch=16, pack=False))
    made = {"pretrain": pretrain, "full": dataclasses.replace(tune, method=Subset("all"), keep=9),
            "lora": dataclasses.replace(tune, method=LoRA(rank=2)),
            "prompt": dataclasses.replace(wide, method=Prompt(tokens=3))}  # fmt: skip
    train(pretrain)
    return {name: dataclasses.replace(run, out=str(folder / name)) for name, run in made.items()}


@pytest.fixture(scope="session")
def whole(runs):
    """case -> the folder of its unbroken run."""

    def folder(case):
        run = runs[case]
        return train(dataclasses.replace(run, resume="auto")) and CheckpointWriter(Path(run.out) / "checkpoints").folder

    return folder


def last(folder, step=STEPS):
    """What the checkpoint of a run's last step holds, by digests."""
    folder = Path(folder)
    folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    manifest = CheckpointWriter(folder).manifest(step)
    return {key: manifest[key] for key in ("leaves", "rows_digest", "next_row")}


def good(folder):
    """The step of the newest checkpoint that loads with equal digests."""
    checkpoints = CheckpointWriter(Path(folder) / "checkpoints")
    return max((s for s in checkpoints.steps() if not checkpoints.damage(s)), default=None)


def life(monkeypatch, run, fault="", **changes):
    """A life of a run, up to its end or its fault: what ended it."""
    run = dataclasses.replace(run, **{"resume": "auto", **changes})
    with monkeypatch.context() as patch:
        if fault:
            patch.setenv(VARIABLE, fault)
        try:
            train(run)
        except (Exception, SystemExit) as error:
            return error
    return None


def copied(run, folder, name="copy"):
    """The run, with a copy of all it has written elsewhere."""
    shutil.copytree(run.out, folder / name)
    return dataclasses.replace(run, out=str(folder / name))


__all__ = ["CASES", "STEPS", "copied", "good", "last", "life", "make_mesh", "programs", "runs", "whole"]
