"""What runs make of each other: the chain a base or an adapter came by; the same run laid out in another way."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from graftax import peft
from graftax.model.sharding import make_mesh
from graftax.peft import DoRA, LoRA, Prompt, Subset
from graftax.train.cli import main
from graftax.train.config import Run, to_json
from graftax.train.progress import read_metrics
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.equivalence import run_logits
from graftax.train.runs.files import LINEAGE
from graftax.train.runs.lineage import read_lineage
from graftax.train.runs.load import load_run
from graftax.train.runs.prepare import prepare
from graftax.train.runs.train import train
from test_train import adapter, base, examples, kill_at, pretraining, texts, tuning  # noqa: F401
from tiny import CASES, shaken


def lineage(folder, capsys):
    """The chain that the command prints."""
    capsys.readouterr()
    main(["lineage", str(folder), "--json"])
    return json.loads(capsys.readouterr().out)["chain"]


def test_a_chain_of_phases(adapter, base, examples, tmp_path, capsys):  # noqa: F811
    main(["merge", str(adapter), "--out", str(tmp_path / "merged")])
    again = train(tuning(tmp_path / "merged", examples, Subset("norms"), out=str(tmp_path / "again")))
    chain = lineage(again, capsys)
    assert [(r["phase"], r["method"]) for r in chain] == [
        ("pretrain", "subset"), ("finetune", "lora"), ("merge", "subset"), ("finetune", "subset"),
    ]  # fmt: skip
    assert [r["today"] for r in chain] == ["unchanged"] * 4
    assert [r["step"] for r in chain] == [6] * 4
    manifest = CheckpointWriter(adapter / "checkpoints").manifest(6)
    assert (chain[1]["base"], chain[1]["data"]) == (manifest["base"], manifest["data"])
    assert chain[3]["base"] == load_run(tmp_path / "merged").fingerprint
    assert len({r["tokenizer"] for r in chain}) == 1
    assert all(r["versions"]["jax"] == jax.__version__ for r in chain)


def test_a_chain_says_what_became_of_its_runs_and_survives_them(adapter, tmp_path, capsys):  # noqa: F811
    main(["export", str(adapter), "--out", str(tmp_path / "hf")])
    chain = read_lineage(tmp_path / "hf")
    assert [r["phase"] for r in chain] == ["pretrain", "finetune"]
    chain[0]["run"], chain[1]["values"] = str(tmp_path / "gone"), "0" * 64
    (tmp_path / "hf" / LINEAGE).write_text(json.dumps(chain))
    assert [r["today"] for r in lineage(tmp_path / "hf", capsys)] == ["not here", "changed since"]
    assert [r["phase"] for r in load_run(tmp_path / "hf").lineage] == ["pretrain", "finetune", "import"]
    with pytest.raises(SystemExit):
        main(["lineage", str(tmp_path / "nowhere")])
    assert "nowhere does not exist; give the folder" in capsys.readouterr().err


@pytest.mark.full
def test_positions_split_and_state_on_the_host_change_nothing(base, pretraining, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(pretraining, mesh=(1, 2, 1, 4), offload=True, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        state = prepare(run, mesh, tmp_path).state
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.trainable)} == {"device"}
    again = train(dataclasses.replace(run, resume="auto"))
    curves = [[r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in (again, base)]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


def written(below, method, out):
    """A run of a method over the run `below`, as training would leave it, without the training."""
    loaded = load_run(below)
    run = Run(phase="finetune", base=str(below), method=method, out=str(out), data=loaded.run.data)
    trainable = jax.jit(lambda params: shaken(method.init(jax.random.key(1), params), 0.02))(loaded.base)
    loaded.tokenizer.save(out)
    (out / "config.json").write_text(to_json(run))
    meta = {"phase": "finetune", "config": json.loads(to_json(run)), "base": loaded.fingerprint,
            "lineage": loaded.lineage, "tokenizer": loaded.tokenizer.digest}  # fmt: skip
    with CheckpointWriter(out / "checkpoints") as checkpoints:
        checkpoints.save(1, {"trainable": trainable}, meta)
    return out


PAIRS = {
    "lora-lora": (LoRA(rank=2), LoRA(rank=2)),
    "range-prompt": (CASES["layer_range"], Prompt(tokens=3)),
    "vera-dora": (CASES["vera"], DoRA(rank=2)),
    "chain-range": (CASES["norms_and_lora"], Subset("layers/[1:]/mlp/.*")),
}


@pytest.mark.full
@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_on_a_run_that_must_be_computed(pair, base, tmp_path):  # noqa: F811
    """A run can use any other run as its base: it loads, on any mesh, computes and merges."""
    lower, upper = PAIRS[pair]
    below = written(base, lower, tmp_path / "below")
    top, bottom = load_run(written(below, upper, tmp_path / "above")), load_run(below)
    ids = np.arange(12)[None] % top.config.V

    @jax.jit
    def expected(params, below, above):
        folded = peft.merge(lower, params, below)
        return peft.apply(top.model, folded, upper, above, ids)

    logits = run_logits(top, ids)
    np.testing.assert_allclose(logits, expected(bottom.params, bottom.trainable, top.trainable), rtol=1e-4, atol=1e-4)
    if pair == "lora-lora":
        mark, mesh = top.fingerprint, make_mesh((2, 2, 2))
        with jax.set_mesh(mesh):  # other devices round the base otherwise
            assert load_run(tmp_path / "above", mesh, layers="unrolled").fingerprint == mark
        main(["merge", str(tmp_path / "above"), "--out", str(tmp_path / "merged")])
        assert [r["phase"] for r in load_run(tmp_path / "merged").lineage] == ["pretrain", *["finetune"] * 2, "merge"]
