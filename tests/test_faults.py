"""Faults in runs (docs/faults.md, Runs and checkpoints): each is injected, and nothing is lost or silently wrong."""

import dataclasses
import gc
import json
import re
import signal
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from faulty import CASES, STEPS, copied, good, last, life, programs, runs, whole  # noqa: F401
from graftax import InputError, peft
from graftax.data import loader
from graftax.model.tree import replace
from graftax.peft import LoRA, Subset
from graftax.train import cli, evaluate, faults, health, loop
from graftax.train.cluster import distributed, signals
from graftax.train.cluster.signals import Stop, Stopped
from graftax.train.config import Data, Optim, Run, from_json
from graftax.train.loop import stream_digest
from graftax.train.optim import lr_schedule
from graftax.train.progress import read_metrics
from graftax.train.runs import prepare as preparation
from graftax.train.runs import record
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.load import load_run
from graftax.train.runs.train import train
from test_faults_input import said

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cut(runs, tmp_path_factory):  # noqa: F811
    """LoRA, crashed in step 21, with checkpoints 12 and 18."""
    run = dataclasses.replace(runs["lora"], out=str(tmp_path_factory.mktemp("cut") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        assert isinstance(life(patch, run, "step@21:fail"), RuntimeError)
    assert CheckpointWriter(Path(run.out) / "checkpoints").steps() == [12, 18]
    return run


def metrics_once(folder):
    steps = [r["step"] for r in read_metrics(Path(folder)) if "loss" in r]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


# --- 20 + resume + 20 is 40 ---


@pytest.mark.full
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("cuts", [("step@8:fail", "step@20:term"), ("step@21:fail", "step@33:term"),
                                  ("step@4:fail", "score@40:fail")], ids=["7,20", "20,33", "3,40"])  # fmt: skip
def test_two_lives_more_equal_one(method, cuts, runs, whole, tmp_path, monkeypatch):  # noqa: F811
    """Pretraining has a mixture and accumulates; full and LoRA are packed; prompts accumulate. A crash loses the steps
    since its checkpoint (of every sixth step, or none), a signal none."""
    run = dataclasses.replace(runs[method], out=str(tmp_path / "run"))
    for fault in cuts:
        ended = life(monkeypatch, run, fault)
        assert type(ended) is (Stopped if "term" in fault else RuntimeError)
        if "term" in fault:
            assert ended.code == 75
            assert good(run.out) == int(fault[5:7])
    assert life(monkeypatch, run) is None
    assert last(run.out) == last(whole(method))
    metrics_once(run.out)
    assert good(run.out) == STEPS


@pytest.mark.full
def test_at_the_boundary_of_an_epoch(runs, whole, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"))
    rows = len(np.unique([r["row"] for r in _rows(run)]))
    assert rows < 8 * STEPS, "more than one epoch"
    at = next(n for n in range(1, STEPS) if 8 * n % rows == 0)
    assert life(monkeypatch, run, f"step@{at}:term").code == 75
    assert life(monkeypatch, run) is None
    assert last(run.out) == last(whole("lora"))


def _rows(run, n=8 * STEPS):
    from graftax.train.inputs import tuning_rows

    got = load_run(run.base)
    rows = tuning_rows(run.data, run.seed, got.tokenizer, got.config.V)[1].train
    return [rows[i] for i in range(n)]


@pytest.mark.full
def test_other_prefetching_other_batches_the_same_rows(cut, whole, tmp_path, monkeypatch):  # noqa: F811
    expected = f"{stream_digest(np.arange(320), np.array([r['row'] for r in _rows(cut)])) % 2**256:064x}"
    assert last(whole("lora"))["rows_digest"] == expected, "every row once, in order"
    monkeypatch.setattr(loader, "PREFETCH", grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    run = copied(cut, tmp_path)
    assert life(monkeypatch, run) is None
    assert last(run.out) == last(whole("lora"))
    run = copied(cut, tmp_path, "wider")  # 18 steps of 8 rows, then 11 of 16
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch=16), steps=29)
    assert life(monkeypatch, run) is None
    found = last(run.out, 29)
    assert (found["rows_digest"], found["next_row"]) == (expected, 320)


@pytest.mark.full
def test_on_another_mesh(cut, whole, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(copied(cut, tmp_path), mesh=(2, 2, 2))
    assert life(monkeypatch, run) is None
    a, b = last(run.out), last(whole("lora"))
    assert a["rows_digest"] == b["rows_digest"]
    losses = [[r["loss"] for r in read_metrics(Path(f)) if "loss" in r][-1] for f in (run.out, whole("lora").parent)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- what changed since ---


@pytest.mark.parametrize(("change", "words"), [
    ({"seed": 5}, ("the data changed since step 18: seed 0 -> 5", "or --force data")),
    ({"data.T": 48}, ("the data changed", "data.T 32 -> 48")),
    ({"data.pack": False}, ("the data changed", "data.pack true -> false")),
    ({"data.held_out": 0.3}, ("the data changed", "data.held_out 0.2 -> 0.3")),
    ({"file": "other contents"}, ("the data changed since step 18: its contents, examples 47 -> ", "target tokens")),
    ({"data.task": "other.jsonl"}, ("the data changed", "data.task", "colours.jsonl", "other.jsonl")),
    ({"method": LoRA(rank=2, alpha=4)}, ("the method changed since step 18: method.alpha", "-> 4", "--force method")),
    ({"method": LoRA(rank=4)}, ("method.rank 2 -> 4",)),
    ({"phase": "pretrain"}, ("holds a finetune run, this is a pretrain", "correct --out")),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")  # fmt: skip
def test_what_changed_is_said_in_words(change, words, cut, runs, tmp_path, monkeypatch):  # noqa: F811
    run = copied(cut, tmp_path)
    there = (Path(run.out) / "config.json").read_bytes()
    text = Path(run.data.task).read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("blue", "light grey"))
    data = {k[5:]: v for k, v in change.items() if k.startswith("data.")}
    if "task" in data or "file" in change:
        data["task"] = str(tmp_path / "other.jsonl")
    if "file" in change:  # the same name
        manifest = Path(run.out) / "checkpoints/18/manifest.json"
        _rewrite(manifest, lambda m: m["config"]["data"].update(task=data["task"]))
    top = {k: v for k, v in change.items() if k in ("seed", "method")}
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, **data), **top)
    if "phase" in change:
        run = dataclasses.replace(runs["pretrain"], out=run.out)
    said(lambda: train(dataclasses.replace(run, resume="auto")), "--resume: ", *words)
    assert (Path(run.out) / "config.json").read_bytes() == there, "nothing was written"
    assert not (Path(run.out) / "lock").exists()


def _rewrite(path, change):
    from graftax.train.runs.manifest import encode_manifest, read_manifest

    manifest = read_manifest(path)
    change(manifest)
    path.write_text(encode_manifest(manifest))


@pytest.mark.parametrize(("change", "words"), [
    ({"optim": {"name": "muon"}}, ("--optim.name adamw -> muon", "give --optim.name adamw again")),
    ({"optim": {"spike": 6.0}}, ("--optim.spike 0.0 -> 6.0", "give --optim.spike 0.0 again")),
    ({"steps": 10}, ("--steps 10", "is at step 18; raise it, or --resume STEP")),
    ({"method": LoRA(rank=4), "force": "method"}, ("trainable",)),
], ids=["optimizer", "spikes", "fewer steps", "accepted rank"])  # fmt: skip
def test_a_refused_resume_changes_no_file(change, words, cut, tmp_path):
    """config.json and metrics.jsonl stay those of the run that is there."""
    run = dataclasses.replace(copied(cut, tmp_path), resume="auto")
    change = change | ({"optim": dataclasses.replace(run.optim, **change["optim"])} if "optim" in change else {})
    files = {p: p.read_bytes() for p in Path(run.out).rglob("*") if p.is_file() and p.name != "lock"}
    said(lambda: train(dataclasses.replace(run, **change)), *words)
    assert {p: p.read_bytes() for p in Path(run.out).rglob("*") if p.is_file() and p.name != "lock"} == files


def test_what_changed_can_be_accepted(cut, tmp_path, monkeypatch, capsys):
    run = dataclasses.replace(copied(cut, tmp_path), seed=5)
    assert life(monkeypatch, run, force="data") is None
    manifest = CheckpointWriter(Path(run.out) / "checkpoints").manifest(STEPS)
    assert manifest["accepted"] == ["the data changed since step 18: seed 0 -> 5"]
    assert "accepted: the data changed" in capsys.readouterr().err
    said(lambda: dataclasses.replace(run, force="dta"), "--force dta; did you mean data?")


@pytest.mark.parametrize(("change", "words"), [
    ("mixture", ("data.domains.0.2 0.7 -> 0.5",)),
    ("tokenizer", ("the tokenizer changed", "data.vocab", "or --force tokenizer")),
    ("a file", ("the data changed", "its contents, tokens of a ", "->")),
])  # fmt: skip
def test_a_changed_corpus(change, words, runs, tmp_path):  # noqa: F811
    run = copied(runs["pretrain"], tmp_path)
    domains = [(name, str(tmp_path / name), weight) for name, _, weight in run.data.domains]
    for (_, source, _), (_, target, _) in zip(run.data.domains, domains, strict=True):
        Path(target).symlink_to(source)
    data = {"mixture": {"domains": tuple((n, s, 0.5) for n, s, _ in run.data.domains)},
            "tokenizer": {"tokenizer": "", "vocab": 380},
            "a file": {}}[change]  # fmt: skip
    if change == "a file":
        file = Path(run.data.domains[0][1]) / "0.txt"
        text = file.read_text()
        file.write_text(text + " and a little more")
    try:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, **data), resume="auto", steps=STEPS + 1)
        said(lambda: train(run), "--resume: ", *words)
    finally:
        if change == "a file":
            file.write_text(text)


# --- where a run goes ---


def test_folders_that_are_no_place_for_a_run(runs, cut, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(cut, resume="never")
    said(lambda: train(run), f"--out {run.out} is not an empty folder", "continue with --resume")
    (tmp_path / "file").write_text("")
    said(lambda: train(dataclasses.replace(run, out=str(tmp_path / "file"))), "is a file; give a folder")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    for resume in ("auto", "7"):
        wrong = dataclasses.replace(run, out=str(tmp_path / "photos"), resume=resume)
        said(lambda wrong=wrong: train(wrong), "--resume", "photos", "correct --out")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    said(lambda: train(dataclasses.replace(run, resume="7")), "--resume 7: there is no checkpoint", "has steps 12, 18")
    said(lambda: dataclasses.replace(run, resume="yes"), "--resume yes: wanted auto, never, or the step")
    said(lambda: train(dataclasses.replace(run, resume="auto", steps=9)), "--steps 9: ", "is at step 18; raise it")


def test_an_earlier_step_and_a_stray_folder(cut, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = copied(cut, tmp_path)
    checkpoints = Path(run.out) / "checkpoints"
    (checkpoints / "30").mkdir()
    (checkpoints / "30" / "notes.txt").write_text("mine")
    (checkpoints / "24.partial").mkdir()
    assert life(monkeypatch, run, resume="12") is None
    assert last(run.out) == last(whole("lora"))
    assert (checkpoints / "18.aside" / "manifest.json").exists()
    assert "step 18 is kept as" in capsys.readouterr().err
    assert (checkpoints / "30.aside" / "notes.txt").read_text() == "mine"
    assert not list(checkpoints.glob("*.partial"))


@pytest.mark.parametrize("where", ["made", "before"])
def test_a_folder_that_cannot_be_written(where, runs, tmp_path, monkeypatch):  # noqa: F811
    out = "/proc/graftax/run" if where == "made" else str(tmp_path / "run")
    if where == "before":
        monkeypatch.setattr(record.tempfile, "TemporaryFile", lambda dir: _readonly(dir, b""))
    said(lambda: train(dataclasses.replace(runs["lora"], out=out)), f"--out {out}: cannot be written", "give a folder")


def _readonly(path, data):
    raise PermissionError(13, "Permission denied", str(path))


# --- signals ---


def test_a_signal_while_it_compiles(cut, tmp_path, monkeypatch):
    run = dataclasses.replace(cut, out=str(tmp_path / "run"))
    for fault in ("compile:term", "compile:int"):
        ended = life(monkeypatch, run, fault)
        assert (type(ended), ended.code) == (Stopped, 75)
        assert good(run.out) is None
        assert not [p for p in Path(run.out).rglob("*") if p.name == "lock" or ".tmp" in p.name or "partial" in p.name]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run = copied(cut, tmp_path)
    assert life(monkeypatch, run, "compile:term").code == 75
    assert good(run.out) == 18


@pytest.mark.parametrize(("fault", "step"), [("save.arrays@24:term", None), ("save.begin@24:int", 24),
                                             ("score@40:term", 40)])  # fmt: skip
def test_a_signal_in_a_save_or_an_evaluation(fault, step, cut, whole, tmp_path, monkeypatch):  # noqa: F811
    run = copied(cut, tmp_path)
    assert life(monkeypatch, run, fault).code == 75
    assert good(run.out) == step or (step is None and good(run.out) >= 24)
    assert life(monkeypatch, run) is None
    assert last(run.out) == last(whole("lora"))
    assert json.loads((Path(run.out) / "summary.json").read_text())["after"]["scores"]


def test_scoring_that_fails_costs_no_step(cut, whole, tmp_path, monkeypatch):  # noqa: F811
    """The checkpoint of the last step, with the loss that ranks it, is on the disk before the first answer."""
    run = copied(cut, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "generate_answers", _raising)
        for _ in range(2):  # and so again in its second life, which has nothing else to do
            ended = life(patch, run)
            assert isinstance(ended, InputError)
            assert str(ended).startswith(
                f"{run.out}: step 40 is done and saved, but scoring it failed (ValueError: no)"
            )
            assert last(run.out) == last(whole("lora"))
    assert CheckpointWriter(Path(run.out) / "checkpoints").best() == 40
    assert life(monkeypatch, run) is None
    assert json.loads((Path(run.out) / "summary.json").read_text())["after"]["scores"]
    metrics_once(run.out)


def _raising(*_):
    raise ValueError("no\nmore")


def test_what_a_signal_ended_leaves_at_once(monkeypatch):
    """Behind a signal the interpreter is not taken down: XLA, left in a compilation, can crash there."""

    def leave(code):
        raise RuntimeError(f"left with {code}")

    def stopped(args):
        raise Stopped

    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr(cli.os, "_exit", leave)
    monkeypatch.setitem(cli.COMMANDS, "lineage", ("", stopped))
    monkeypatch.setattr("sys.argv", ["graftax", "lineage"])
    with pytest.raises(RuntimeError, match="left with 75"):
        cli.main()
    with pytest.raises(Stopped):  # from Python it is an exception as any
        cli.main(["lineage"])


def test_a_signal_where_nothing_can_be_raised(capsys):
    """jax is called back by the garbage collector: an exception there is printed and lost."""
    seen = []

    def collect(phase, info):
        if not seen:
            seen.append(phase)
            signal.raise_signal(signal.SIGTERM)

    def work():
        with Stop():
            gc.collect(0)  # the youngest generation: of all it takes seconds in a large process
            time.sleep(4)
            seen.append("lost")

    before = sys.unraisablehook
    gc.callbacks.append(collect)
    with pytest.raises(Stopped):
        work()
    gc.callbacks.remove(collect)
    assert seen == ["start"]
    assert "Exception ignored" not in capsys.readouterr().err
    assert sys.unraisablehook == before


def test_a_second_signal_ends_at_once(monkeypatch, capsys):
    left = threading.Event()
    monkeypatch.setattr(signals.os, "_exit", lambda code: code == 75 and left.set())
    with Stop() as one:
        one.begin_steps(0)
        assert one.may_step(1)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(500):
            if not one.may_step(1):
                break
            if one.limit is not None:
                break
            left.wait(0.01)
        assert not one.may_step(2)
        assert not left.is_set()
        signal.raise_signal(signal.SIGINT)
        assert left.wait(5)
    err = capsys.readouterr().err
    assert "SIGTERM: this step is finished and saved, exit code 75; again: at once" in err
    assert "graftax: SIGINT again: stopped at once; continue with --resume" in err


def test_all_processes_stop_after_the_same_step(monkeypatch):
    """Three of them, each a step further, as threads; one gets the signal."""
    monkeypatch.setattr(distributed.state, "peers", ("a", "b", "c"))
    barrier, told, stops = threading.Barrier(3), {}, [Stop() for _ in range(3)]

    def share(what, text):
        told[threading.get_ident()] = text
        barrier.wait(5)
        return list(told.values())

    monkeypatch.setattr(distributed, "barrier_gather", share)
    for i, one in enumerate(stops):
        one.begin_steps(0)
        assert one.may_step(4 + i)
    threads = [threading.Thread(target=one._settle, args=(True,)) for one in stops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.limit for one in stops] == [6, 6, 6]
    assert [[one.may_step(5), one.may_step(6), one.may_step(7)] for one in stops] == [[True, True, False]] * 3


# --- numbers ---


def test_one_bad_batch_changes_nothing_and_is_counted(runs, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"), steps=12, log_every=3)
    assert life(monkeypatch, run, "step@5:nan") is None
    rows = [r for r in read_metrics(Path(run.out)) if "loss" in r]
    assert [r["skipped"] for r in rows] == [0, 1, 0, 0]
    rate = lr_schedule(run.optim, 12)  # the skipped step has used none, so later ones are one update behind
    assert [r["lr"] for r in rows] == [pytest.approx(float(rate(i))) for i in (2, 4, 7, 10)]
    assert all(np.isfinite(r["loss"]) for r in rows)
    assert json.loads((Path(run.out) / "summary.json").read_text())["skipped"] == 1


def test_too_many_bad_batches_stop_the_run(runs, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"), max_skipped=4)
    ended = life(monkeypatch, run, "step@20-30:nan")
    assert isinstance(ended, InputError)
    for word in (run.out, "steps 20-23 in a row were left out (4 not finite)", "bad_rows.json", "--optim.lr"):
        assert word in str(ended)
    found = json.loads((Path(run.out) / "bad_rows.json").read_text())["steps"]
    rows = [int(r["row"]) for r in _rows(run)]
    assert found == {str(i): rows[8 * (i - 1) : 8 * i] for i in range(20, 24)}
    assert good(run.out) is not None
    got = load_run(run.out)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got.trainable))
    assert life(monkeypatch, run) is None, "with better rows it goes on"


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_a_base_that_is_not_finite(number, base, monkeypatch):
    spoilt = replace(base.params, {"layers/mlp/up": base.params["layers"]["mlp"]["up"].at[1, 2, 3].set(number)})
    dated, loaded = (dataclasses.make_dataclass("", names) for names in (["date"], ["base", "tokenizer"]))
    monkeypatch.setattr(preparation, "load_run", lambda *args, **kwargs: loaded(spoilt, dated("")))
    run = Run(phase="finetune", base="runs/base", date="2026-11-29")
    said(
        lambda: preparation.load_base(run, None),
        "runs/base: the parameter layers/mlp/up holds NaN or infinity",
        "another",
    )
    monkeypatch.setattr(preparation, "load_run", lambda *args, **kwargs: loaded(base.params, dated("")))
    assert preparation.load_base(run, None) == loaded(base.params, dated("2026-11-29"))


def test_a_state_that_is_not_finite_is_not_saved(runs, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"), max_skipped=0)
    real = loop.Runner.step

    def step(self, i, program):
        real(self, i, program)
        if i == 11:
            trainable = jax.tree.map(lambda x: x * np.inf, self.setup.state.trainable)
            self.setup.state = self.setup.state._replace(trainable=trainable)

    monkeypatch.setattr(loop.Runner, "step", step)
    ended = life(monkeypatch, run)
    for word in (run.out, "at step 12 layers/attn/k/a is not finite", "this step was not saved", "--optim.lr"):
        assert word in str(ended)
    assert good(run.out) == 6


def test_spikes_count_apart(runs, tmp_path):  # noqa: F811
    run = dataclasses.replace(runs["lora"], out=str(tmp_path), max_skipped=3)
    seen = health.Health(run, [{"row": i} for i in range(80)], 0, 0)
    fine, spike = {"ok": True, "loss": 1.0, "grad_norm": 1.0}, {"ok": False, "loss": 9.0, "grad_norm": 9.0}
    broken = {"ok": False, "loss": np.nan, "grad_norm": 1.0}
    seen.update(5, [fine, spike, broken, fine, spike])
    said(lambda: seen.update(7, [spike, broken]), "steps 5-7 in a row", "1 not finite, 2 spikes")
    said(lambda: Optim(spike=float("nan")), "--optim.spike nan")


# --- sizes ---


@pytest.mark.parametrize(("change", "words"), [
    ({"mesh": (3, 1, 1)}, ("mesh 3x1x1", "does not match the 8 device(s)")),
    ({"batch": 12}, ("--data.batch 12 does not divide into 8",)),
    ({"accumulate": 3}, ("--data.batch 8 does not divide into --accumulate 3 parts",)),
    ({"steps": -1}, ("--steps -1: wanted 0 or more",)),
    ({"epochs": float("nan")}, ("--epochs nan: wanted a finite number above 0",)),
    ({"max_skipped": -1}, ("--max-skipped -1: wanted 0 or more",)),
    ({"save_every": -3}, ("--save-every -3: wanted 0 or more",)),
])  # fmt: skip
def test_numbers_that_do_not_fit(change, words, runs, tmp_path):  # noqa: F811
    def go():
        data = dataclasses.replace(runs["lora"].data, batch=change.pop("batch", 8))
        train(dataclasses.replace(runs["lora"], out=str(tmp_path / "run"), data=data, **change))

    said(go, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "field", "value", "wanted"), [
    ("lora", "rank", -1, "1 to 65536"), ("lora", "rank", 0, "1 to 65536"), ("prompt", "tokens", 0, "1 to 65536"),
    ("lora", "alpha", float("nan"), "a finite number"), ("lora", "dropout", 1.0, "0 or more, below 1"),
    ("lora", "ranks", (("layers/attn/q", -1),), "0 to 65536"), ("vera", "seed", -1, "0 to 4294967295"),
    ("adalora", "every", 0, "1 or more"), ("boft", "factors", 33, "1 to 32"), ("oft", "terms", 101, "0 to 100"),
])  # fmt: skip
def test_numbers_that_no_method_has(name, field, value, wanted):
    shown = "layers/attn/q -1" if field == "ranks" else value
    said(lambda: peft.methods[name](**{field: value}), f"{name}: --method.{field} {shown}: wanted {wanted}")


def test_zero_steps_and_fewer_rows_than_a_batch(runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    said(lambda: train(dataclasses.replace(runs["pretrain"], out=str(tmp_path / "run"), steps=0)), "--steps 0")
    rows = [{"prompt": f"red {i}", "completion": "der"} for i in range(4)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(runs["lora"].data, task=str(tmp_path / "few.jsonl"))
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"), data=data, steps=2)
    assert life(monkeypatch, run) is None
    assert "the batch of 8 is larger than the dataset" in capsys.readouterr().err


# --- adapters, masks ---


@pytest.mark.parametrize(("which", "words"), [
    ("equal shapes", ("was tuned on another base than", "give its base with --base")),
    ("other shapes", ("was tuned on another base than", "give its base with --base")),
    ("other rank", ("config.json: method.rank is 4, but step 18 was saved with 2", "restore that value")),
    ("other model", ("config.json: model.rope.theta is 5000.0, but step 40 was saved with 10000.0",)),
    ("other tokenizer", ("tokenizer.model", "damaged; restore it")),
    ("no tokenizer", ("tokenizer.model is missing",)),
])  # fmt: skip
def test_an_adapter_and_what_it_does_not_fit(which, words, cut, runs, tmp_path):  # noqa: F811
    run = copied(cut, tmp_path)
    base = ""
    if which in ("equal shapes", "other shapes"):
        other = dataclasses.replace(runs["pretrain"], out=str(tmp_path / "base"), steps=1, seed=3)
        if which == "other shapes":
            other = dataclasses.replace(other, model=dataclasses.replace(other.model, F=32))
        base = str(train(other))
    path = Path(run.out) / "config.json"
    if which == "other rank":
        path.write_text(path.read_text().replace('"rank": 2', '"rank": 4'))
    if which == "other model":
        base = str(copied(runs["pretrain"], tmp_path, "base").out)
        path = Path(base) / "config.json"
        path.write_text(path.read_text().replace('"theta": 10000.0', '"theta": 5000.0'))
    path = Path(run.out) / "tokenizer.model"
    if which == "other tokenizer":
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    if which == "no tokenizer":
        path.unlink()
    said(lambda: load_run(run.out, base=base), *words)


@pytest.mark.parametrize(("where", "words"), [
    ("layers/mpl/.*", ("matches no parameter; did you mean layers/mlp/",)),
    ("layers/attn/q,layers/mpl/up", ("matches no parameter",)),
    ("layers/attn/q|layers/mpl/up", ("'layers/mpl/up'", "matches no parameter; did you mean layers/mlp/up")),
    ("layers/[9:]/mlp/up", ("matches no parameter",)),
    ("layers/(mlp", ("is not a regular expression",)),
])  # fmt: skip
def test_a_mask_that_is_not_what_was_meant(where, words, runs, tmp_path):  # noqa: F811
    run = dataclasses.replace(runs["full"], out=str(tmp_path / "run"), method=Subset(where))
    said(lambda: train(run), where.split("|")[-1].split(",")[-1], *words)
    assert not (tmp_path / "run").exists()


def test_a_mask_of_everything_and_overlaps(runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = dataclasses.replace(runs["full"], out=str(tmp_path / "run"), method=Subset(".*"), steps=1)
    assert life(monkeypatch, run) is None
    assert "(100.00%)" in capsys.readouterr().err, "the table says how much trains"
    groups = (("layers/mlp/.*", 0.5), ("layers/mlp/up", 2.0))
    run = dataclasses.replace(run, out=str(tmp_path / "groups"), optim=Optim(groups=groups))
    said(lambda: train(run), "rate group 'layers/mlp/up'", "is never reached", "put it first")


# --- the rest ---


def test_a_prefetch_thread_that_fails(runs, tmp_path, monkeypatch):  # noqa: F811
    real = loader.stack

    def stack(rows, calls=[]):  # noqa: B006
        if threading.current_thread() is not threading.main_thread():  # which stacks rows to evaluate
            calls.append(1)
        if len(calls) == 9:
            raise OSError(5, "Input/output error")
        return real(rows)

    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(loader, "stack", stack)
        ended = life(patch, run)
    assert isinstance(ended, InputError)
    assert re.match(r"rows \d+ to \d+ of the stream could not be read \(OSError: .*Input/output error\)", str(ended))
    assert "--resume" in str(ended)
    assert good(run.out) == 6
    assert life(monkeypatch, run) is None


def test_fp32_into_bf16(runs, tmp_path):  # noqa: F811
    run = copied(runs["pretrain"], tmp_path)
    half = dataclasses.replace(run, model=dataclasses.replace(run.model, param_dtype="bfloat16"), resume="auto",
                               steps=STEPS + 2)  # fmt: skip
    said(lambda: train(half), 'model.param_dtype "float32" -> "bfloat16"')
    computed = dataclasses.replace(run.model, dtype="bfloat16")
    train(dataclasses.replace(run, model=computed, resume="auto", steps=STEPS + 2))
    leaves = last(run.out, STEPS + 2)["leaves"]["trainable"]
    assert {x["dtype"] for x in leaves.values()} == {"float32"}, "the masters stay"


def test_metrics_are_cut_at_the_checkpoint(cut, tmp_path, monkeypatch):
    run = copied(cut, tmp_path)
    path = Path(run.out) / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(Path(run.out)) if "loss" in r] == [7, 14]
    with path.open("a") as file:
        file.write('{"step": 19, "loss": 1.0}\n{"step": 21, "lo')
    assert life(monkeypatch, run) is None
    metrics_once(run.out)
    assert 19 not in [r["step"] for r in read_metrics(Path(run.out))]


def test_a_complete_run_without_its_summary(runs, whole, tmp_path, monkeypatch):  # noqa: F811
    whole("lora")
    run = copied(runs["lora"], tmp_path)
    path = Path(run.out) / "summary.json"
    said_before = json.loads(path.read_text())
    path.unlink()
    assert life(monkeypatch, run) is None
    assert json.loads(path.read_text())["after"] == said_before["after"]
    metrics_once(run.out)


def test_the_variable_says_what_it_wants(monkeypatch):
    assert faults.at("step", 3) == ""
    monkeypatch.setenv(faults.VARIABLE, "step@3-5:nan,save.end:kill")
    assert [faults.at("step", i) for i in (2, 3, 5, 6)] == ["", "nan", "nan", ""]
    for wrong in ("stop:nan", "step:explode", "step@x:nan", "kill"):
        monkeypatch.setenv(faults.VARIABLE, wrong)
        said(lambda: faults.at("step", 3), f"GRAFTAX_FAULT={wrong}: wanted POINT[@STEP[-STEP]]:ACTION")


OLD_NAMES = {
    "resume": True,
    "accept": "data",
    "score_base": False,
    "max_bad": 3,
    "data": {"bad": "replace", "bad_cap": 0.5},
}


def test_a_config_with_the_names_of_before(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OLD_NAMES))
    data = Data(bad_rows="repair", max_bad_rows=0.5)
    assert from_json(path) == Run(resume="auto", force="data", eval_base_first=False, max_skipped=3, data=data)
    path.write_text('{"version": 99}')
    said(lambda: from_json(path), f"{path}: version 99, this graftax reads 1 to 2")


def test_a_run_with_the_names_of_before_goes_on(cut, whole, tmp_path, monkeypatch):  # noqa: F811
    run = copied(cut, tmp_path)

    def rename(config):
        for new, old in (("force", "accept"), ("eval_base_first", "score_base"), ("max_skipped", "max_bad")):
            config[old] = config.pop(new)
        data = config["data"]
        data["bad"], data["bad_cap"] = data.pop("bad_rows"), data.pop("max_bad_rows")
        del config["version"]

    for step in (12, 18):
        _rewrite(Path(run.out) / f"checkpoints/{step}/manifest.json", lambda m: rename(m["config"]))
    config = json.loads((Path(run.out) / "config.json").read_text())
    rename(config)
    (Path(run.out) / "config.json").write_text(json.dumps(config))
    load_run(run.out)
    assert life(monkeypatch, run) is None
    assert last(run.out) == last(whole("lora"))
