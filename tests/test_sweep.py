"""A sweep: trials as lanes of one program equal their own runs, die alone, stop and go on; which cannot be one."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faulty import programs, runs  # noqa: F401
from graftax import InputError, peft
from graftax.peft import LoRA, Subset
from graftax.train.cli import main
from graftax.train.cluster.signals import Stopped
from graftax.train.config import Optim, from_json
from graftax.train.experiments.base_cache import BaseCache
from graftax.train.experiments.report.sweep import over_seeds
from graftax.train.experiments.step_costs import chunk_size
from graftax.train.experiments.sweep import scheduler
from graftax.train.experiments.sweep.command import Sweep
from graftax.train.experiments.sweep.lanes import LaneStack
from graftax.train.experiments.sweep.programs import group_trials
from graftax.train.experiments.sweep.trials import make_trials, parse_axis, trial_folder, with_fields
from graftax.train.faults import VARIABLE
from graftax.train.progress import read_metrics
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.train import train
from test_faults_input import said
from tiny import CASES, close, evaluator, make_base, make_batch, shaken

OVER = ("optim.lr=1e-3,2e-3,4e-3,8e-3", "method.rank=2,4", "seed=0..1")


@pytest.fixture
def run(runs, tmp_path):  # noqa: F811
    """A short LoRA of the tiny base."""
    out = str(tmp_path / "sweep")
    short = dataclasses.replace(runs["lora"], mesh=(1, -1, 1), steps=12, save_every=4, log_every=3, out=out)
    return dataclasses.replace(short, optim=Optim(lr=2e-3), keep=2)


def leaves(folder, step):
    """The digests of a checkpoint's arrays."""
    return CheckpointWriter(Path(folder) / "checkpoints").manifest(step)["leaves"]


def curve(folder):
    """[(step, loss, norm of the gradient, size of the update)] as it was logged."""
    return [(r["step"], r["loss"], r["grad_norm"], r["update_rms"]) for r in read_metrics(Path(folder)) if "loss" in r]


@pytest.mark.full
def test_16_lanes_are_their_own_runs(run, tmp_path):
    """On 8 devices, two lanes each. What is compared has each rate, both ranks and both seeds."""
    run = dataclasses.replace(run, method=LoRA(rank=2, dropout=0.1))  # each lane drops out by its own seed
    found = Sweep(run, OVER, lanes=16).run()
    assert (found["trials"], found["done"]) == (16, 16)
    for number in (0, 7, 10, 13):
        trial = Path(run.out) / f"trials/{number:03d}"
        alone = dataclasses.replace(from_json(trial / "config.json"), out=str(tmp_path / f"alone{number}"))
        train(dataclasses.replace(alone, mesh=(8, 1, 1)))
        np.testing.assert_allclose(curve(trial), curve(alone.out), rtol=1e-5)
        a, b = (json.loads((Path(folder) / "summary.json").read_text()) for folder in (trial, alone.out))
        for key in ("valid_loss", "held_out_loss"):
            assert a["after"][key] == pytest.approx(b["after"][key], rel=1e-5)
        shapes = [{k: x["shape"] for k, x in leaves(folder, 12)["trainable"].items()} for folder in (trial, alone.out)]
        assert shapes[0] == shapes[1], "what was filled up is cut off again"
    rows = [json.loads(line) for line in (Path(run.out) / "results.jsonl").read_text().splitlines()]
    assert [row["trial"] for row in rows] == list(range(16))
    assert rows[5] | {"optim.lr": "2e-3", "method.rank": "2", "seed": "1", "status": "done"} == rows[5]
    assert found["best"]["valid_loss"] == min(row["valid_loss"] for row in rows)
    assert all((Path(run.out) / name).exists() for name in ("table.md", "curves.png", "heat.png"))


def test_rows_are_checked_before_anything_is_written(run, tmp_path):
    """Validation rows as training rows; a score, or halving, of no row is refused."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "word " * 60}]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = dataclasses.replace(run.data, valid=str(tmp_path / "valid.jsonl"))
    none, over = dataclasses.replace(run.data, held_out=0), ("optim.lr=1e-3,2e-3",)
    cases = (
        (bad, {}, "valid.jsonl:2: "),
        (none, {"score": 2}, "--score 2: the task"),
        (none, {"halve": 2}, "--halve: the"),
    )
    for data, plan, words in cases:
        said(lambda data=data, plan=plan: Sweep(dataclasses.replace(run, data=data), over, **plan).run(), words)
        assert not Path(run.out).exists()


def test_a_lane_that_diverges_stops_alone(run, tmp_path, capsys):
    """The others are bit for bit what they are without it; it saves nothing more."""
    for name, rate in (("well", "3e-3"), ("ill", "1e38")):
        one = dataclasses.replace(run, max_skipped=4, out=str(tmp_path / name))
        Sweep(one, (f"optim.lr=1e-3,{rate},2e-3",), lanes=3).run()
    for trial in ("000", "002"):
        assert leaves(tmp_path / "ill/trials" / trial, 12) == leaves(tmp_path / "well/trials" / trial, 12)
    assert "trial 1 (lr=1e38) diverged" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "ill/results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["done", "diverged", "done"]
    assert (tmp_path / "ill/trials/001/bad_rows.json").exists()
    assert not CheckpointWriter(tmp_path / "ill/trials/001/checkpoints").steps() or max(
        CheckpointWriter(tmp_path / "ill/trials/001/checkpoints").steps()) < 12  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("fault", ["save.manifest@8:fail", "step@7:term"])
def test_a_sweep_goes_on_bit_for_bit(fault, run, tmp_path, monkeypatch):
    """Ended in the second chunk's save, or by a signal; three trials in chunks of two: one lane is filled up."""
    over, whole = ("optim.lr=1e-3,2e-3,4e-3",), dataclasses.replace(run, out=str(tmp_path / "whole"))
    Sweep(whole, over, lanes=2).run()
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, fault)
        with pytest.raises((InputError, Stopped)):
            Sweep(run, over, lanes=2).run()
    assert not (Path(run.out) / "trials/002").exists()
    again = dataclasses.replace(run, resume="auto")
    Sweep(again, over, lanes=2).run()
    for trial in ("000", "001", "002"):
        folders = [Path(out) / "trials" / trial for out in (whole.out, run.out)]
        assert leaves(folders[0], 12) == leaves(folders[1], 12)
        steps = [[r["step"] for r in read_metrics(f) if "loss" in r] for f in folders]
        assert steps[0][-1] == steps[1][-1] == 12
        assert len(set(steps[1])) == len(steps[1])
    before = (Path(run.out) / "results.jsonl").read_text()
    Sweep(again, over, lanes=2).run()
    assert (Path(run.out) / "results.jsonl").read_text() == before, "nothing was left to do"
    said(lambda: Sweep(again, ("optim.lr=1e-3,2e-3",)).run(), "--resume: over.0", "put that back")
    said(lambda: Sweep(again, (*over, "seed=0")).run(), "--resume: over.1", "put that back")
    for name in ("000", "002"):  # killed behind the last saves: what summary.json said is found again
        path = Path(run.out) / "trials" / name / "summary.json"
        told = json.loads(path.read_text())
        path.unlink()
        Sweep(again, over, lanes=2).run()
        now = json.loads(path.read_text())
        assert {k: now[k] for k in now if k != "lanes"} == {k: told[k] for k in now if k != "lanes"}


@pytest.mark.full
def test_halving_keeps_the_best(run):
    found = Sweep(dataclasses.replace(run, save_every=0), ("optim.lr=1e-5,1e-4,1e-3,2e-2",), halve=2, lanes=4).run()
    assert (found["done"], found["stopped"]) == (1, 3)
    rows = [json.loads(line) for line in (Path(run.out) / "results.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [3, 3, 6, 12], "larger rates fall faster here"
    assert leaves(Path(run.out) / "trials/002", 6), "what stopped can be gone on with"


@pytest.mark.full
def test_halving_by_loss_alone(run, tmp_path):
    """What is not finite is the worst, also before it has diverged; rungs may be one."""
    over = ("optim.lr=1e38,3e-3,1e37,1e-4,1e36,1e-5",)
    Sweep(dataclasses.replace(run, steps=4, save_every=0), over, halve=3, lanes=6).run()
    rows = [json.loads(line) for line in (Path(run.out) / "results.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows if "steps" in row and row["status"] == "done"] == [4]
    assert rows[1]["status"] == "done"
    assert {rows[i]["status"] for i in (0, 2, 4)} <= {"diverged"}
    none = dataclasses.replace(run, data=dataclasses.replace(run.data, T=8), out=str(tmp_path / "none"))
    said(lambda: Sweep(dataclasses.replace(none), over, halve=3).run(), "T=8; raise T")


@pytest.mark.full
def test_a_state_that_is_not_finite_ends_its_lane_alone(run):
    over = ("optim.lr=1e-3,3e38,2e-3",)
    Sweep(dataclasses.replace(run, optim=dataclasses.replace(run.optim, clip=0.0), save_every=2), over, lanes=3).run()
    rows = [json.loads(line) for line in (Path(run.out) / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["done", "diverged", "done"]


def test_a_signal_in_a_later_chunk(run, monkeypatch):
    """It ends after the step under way, though an earlier chunk took more; and while nothing steps, at once."""
    real, seen = LaneStack.train_step, []

    def train_step(self, batch):
        seen.append(len(seen))
        if len(seen) == 15:  # the third step of the second chunk
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(LaneStack, "train_step", train_step)
    with pytest.raises(Stopped):
        Sweep(dataclasses.replace(run, save_every=0), ("optim.lr=1e-3,2e-3,3e-3",), lanes=1).run()
    assert len(seen) == 15
    assert CheckpointWriter(Path(run.out) / "trials/001/checkpoints").steps() == [3]


@pytest.mark.full
def test_a_signal_while_lanes_are_evaluated(run, tmp_path, monkeypatch):
    """At once: all lanes are saved, none is evaluated any more; a resumed sweep does that."""
    real, over = scheduler.evaluate_losses, ("optim.lr=1e-3,2e-3,4e-3",)
    asked = []

    def losses(phase):
        asked.append(phase)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(phase)

    run = dataclasses.replace(run, save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "evaluate_losses", losses)
        with pytest.raises(Stopped):
            Sweep(run, over, lanes=2).run()
    assert len(asked) == 1
    trial = [Path(run.out) / "trials" / name for name in ("000", "001", "002")]
    assert [CheckpointWriter(folder / "checkpoints").steps() for folder in trial] == [[12], [12], []]
    assert not (trial[0] / "summary.json").exists()
    assert Sweep(dataclasses.replace(run, resume="auto"), over, lanes=2).run()["done"] == 3
    assert all("after" in json.loads((folder / "summary.json").read_text()) for folder in trial)


def test_which_trials_are_one_program(run, tmp_path):
    def parts(*over, method="lora"):
        start = dataclasses.replace(run, method=peft.methods[method]())
        cache = BaseCache()
        groups, reasons = group_trials(cache.resolve_trials(make_trials(start, over, tmp_path)), cache.model)
        return [[trial.number for trial in program.trials] for program in groups], reasons, groups

    numbers = ("optim.lr=1e-3,2e-3", "optim.weight_decay=0,0.1", "optim.clip=0,1", "method.dropout=0,0.1")
    assert parts(*numbers, "method.alpha=8,16", "method.rank=2,3")[0] == [list(range(64))]
    one, _, (group,) = parts("optim.clip=0,1", "method.rank=2,4")
    assert one == [[0, 1, 2, 3]]
    assert (group.value("optim.clip", 0), group.value("optim.clip", 2)) == (np.inf, 1.0)
    assert [group.value("method.alpha", i) for i in (0, 1)] == [32.0, 16.0], "twice the columns, each half as much"
    warmups = [[0, 2], [1, 3]], {"optim.warmup": "the program depends on it"}
    assert parts("seed=0..1", "optim.warmup=2,4")[:2] == warmups
    assert parts("method.rank=2,4", method="pissa")[:2] == ([[0], [1]], {"method.rank": "another program"})
    assert parts("optim.name=muon", "method.rank=2,24")[0] == [[0], [1]], "its steps are scaled by an array's shape"
    assert parts("method.alpha=4,8", method="pissa")[0] == [[0], [1]], "each leaves another base"
    assert parts("seed=0..1", method="pissa")[0] == [[0, 1]]
    three, why, _ = parts("method=lora,dora", "optim.lr=1e-3,2e-3", "accumulate=1,2")
    assert three == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert why == {"method": "another program", "accumulate": "another program"}
    assert parts("method.tokens=2,3", method="prompt")[0] == [[0], [1]]
    assert parts("method.where=linear,mlp")[0] == [[0], [1]]
    assert [chunk_size(16, 6, 1), chunk_size(3, 16, 8), chunk_size(20, 16, 8), chunk_size(5, 1, 1)] == [6, 3, 16, 1]


@pytest.mark.full
@pytest.mark.parametrize("method", [m for m in CASES.values() if isinstance(m, LoRA)], ids=lambda m: type(m).__name__)
def test_a_padded_rank_computes_what_its_own_does(method):
    """Logits; and gradients, which are zero where it is filled up, so that no optimizer of it moves."""
    small = dataclasses.replace(method, rank=2, ranks=(), alphas=())
    big = dataclasses.replace(small, rank=5)
    if (padded := small.pad_to_rank(big)) is None:
        return
    base, batch = make_base(), make_batch()
    own = shaken(small.init(jax.random.key(1), base.params))
    like = jax.eval_shape(big.init, jax.random.key(1), base.params)
    wide = jax.tree.map(lambda x, w: jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, w.shape, strict=True)]), own, like)
    both = (evaluator(base.model, m)(base.params, t, batch) for m, t in ((padded, wide), (small, own)))
    close(*both)

    def loss(method, trainable):
        return evaluator(base.model, method)(base.params, trainable, batch)[1].sum()

    grads, mine = jax.grad(lambda t: loss(padded, t))(wide), jax.grad(lambda t: loss(small, t))(own)
    cut = jax.tree.map(lambda g, x: g[tuple(map(slice, x.shape))], grads, own)
    close(cut, mine, 1e-4)
    rest = jax.tree.map(lambda g, x: g.at[tuple(map(slice, x.shape))].set(0.0), grads, own)
    assert all(not np.any(x) for x in jax.tree.leaves(rest))


@pytest.mark.parametrize(("over", "words"), [
    ((), ("nothing to sweep over", "--over FIELD=VALUE")),
    (("optim.lrr=1",), ("optim has no 'lrr'; did you mean lr?",)),
    (("optimizer.lr=1",), ("run has no 'optimizer'", "did you mean optim.lr?")),
    (("optim.lr=",), ("--over optim.lr=: no value",)),
    (("optim.lr",), ("no value; expected FIELD=VALUE,VALUE",)),
    (("seed=5..2",), ("no value",)),
    (("optim.lr=fast",), ("'fast', expected a finite number",)),
    (("optim.lr=-1",), ("--over optim.lr=-1", "wanted a finite number of 0 or more")),
    (("method.rank=0,4",), ("lora: --method.rank 0: wanted 1 to 65536",)),
    (("optim.lr=1e-3,1e-3",), ("duplicate value",)),
    (("seed=0", "seed=1"), ("duplicate axis",)),
    (("method=lora,dorra",), ("unknown method 'dorra'; did you mean dora?",)),
    (("method=lora,prompt", "method.rank=2"), ("prompt has no 'rank'",)),
    (("out=a,b",), ("the same for all trials",)),
    (("method.ranks=3",), ("cannot be an axis; only numbers, words and switches can",)),
    (("optim.schedule=cosine,line",), ("'line', expected one of constant, linear, cosine, wsd",)),
    (("seed=0..99", "eval_rows=0..99"), ("10,000 trials, more than 4,096",)),
])  # fmt: skip
def test_axes_that_are_none(over, words, run, tmp_path):
    run = dataclasses.replace(run, method=Subset() if "method=" in str(over) else LoRA())
    said(lambda: Sweep(run, over).run(), *words)
    assert not Path(run.out).exists()


@pytest.mark.parametrize(("change", "over", "words"), [
    ({"method": LoRA(where="nonsense")}, ("method.rank=2,4",), ("nonsense",)),
    ({"quantize": "int8", "method": Subset()}, ("optim.lr=1e-3,2e-3",), ("cannot train; narrow where=",)),
    ({"method": LoRA(rank=2)}, ("method=lora,dora",), ("those of --method would be lost", "--over method.rank=4")),
    ({"eval_every": 2}, ("seed=0..1",), ("--eval-every: not supported by sweeps",)),
    ({"resume": "7"}, ("seed=0..1",), ("--resume 7", "give --resume alone")),
    ({"base": ""}, ("seed=0..1",), ("the runs start from a base",)),
])  # fmt: skip
def test_runs_that_no_sweep_has(change, over, words, run):
    said(lambda: Sweep(dataclasses.replace(run, **change), over).run(), *words)
    assert not Path(run.out).exists(), "nothing is written"


def test_steps_may_be_an_axis(run):
    found = Sweep(dataclasses.replace(run, save_every=0), ("steps=2,3",)).run()
    assert found["done"] == 2
    assert "| 3 |" in (Path(run.out) / "table.md").read_text()


def test_axes():
    assert parse_axis("seed=0..3,7") == ("seed", ["0", "1", "2", "3", "7"])
    assert parse_axis("optim.weight-decay=0.1") == ("optim.weight_decay", ["0.1"])
    start = dataclasses.replace(from_dict(), method=LoRA())
    made = with_fields(start, {"method.rank": "4", "method": "dora", "data.pack": "false", "optim.name": "muon"})
    assert (type(made.method).__name__, made.method.rank, made.data.pack, made.optim.name) == ("DoRA", 4, False, "muon")


def test_a_folder_of_an_earlier_version_keeps_its_names(tmp_path):
    assert trial_folder(tmp_path, 3) == tmp_path / "trials/003"
    (tmp_path / "cells").mkdir()
    assert trial_folder(tmp_path, 3) == tmp_path / "cells/003"


def from_dict():
    """A run of the recipe."""
    from graftax.train.recipes import recipes

    return recipes["sft"]()


def test_folders_and_flags(run, tmp_path, capsys):
    (Path(run.out)).mkdir()
    (Path(run.out) / "x").write_text("")
    said(lambda: Sweep(run, ("seed=0",)).run(), "is not an empty folder; take another, or go on with --resume")
    resumed = dataclasses.replace(run, resume="auto")
    said(lambda: Sweep(resumed, ("seed=0",)).run(), "holds no sweep (it has x)")
    said(lambda: Sweep(run, ("seed=0",), halve=1).run(), "--halve 1", "expected 2 or more")
    said(lambda: Sweep(dataclasses.replace(run, mesh=(2, 4, 1)), ("seed=0",)).run(), "--mesh: a sweep places each lane")
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "sft", "--base", run.base, "--over", "optim.lr=1", "--lanes", "many"])
    assert ended.value.code == 2
    assert "Error parsing --lanes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "Example: graftax sweep sft" in capsys.readouterr().out


def test_a_sweep_keeps_its_date(run, tmp_path, monkeypatch):
    monkeypatch.setattr("graftax.train.experiments.experiment.today", lambda: "2000-01-01")
    plan = Sweep(dataclasses.replace(run, out=str(tmp_path)), ("seed=0,1",))
    assert plan.with_date().config.date == "2000-01-01"
    (tmp_path / "sweep.json").write_text('{"run": {"date": "1999-12-31"}}')
    again = dataclasses.replace(plan, config=dataclasses.replace(plan.config, resume="auto"))
    assert again.with_date().config.date == "1999-12-31"


def test_what_a_picture_shows():
    rows = [{"lr": "1", "seed": "0", "loss": 2.0}, {"lr": "1", "seed": "1", "loss": 4.0}, {"lr": "2", "seed": "0"}]
    assert over_seeds(rows, "lr", [], "loss").reset_index().to_dict("records") == [
        {"series": "", "lr": 1.0, "mean": 3.0, "min": 2.0, "max": 4.0}
    ]
