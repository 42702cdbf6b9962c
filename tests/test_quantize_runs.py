"""Bases quantised while they are read, and runs over them: tuned, resumed, evaluated, merged."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError
from graftax.data.tokenizers import train_tokenizer
from graftax.model import Config, hf, init
from graftax.model.quantize import NF4, Quantized, quantize
from graftax.model.sharding import make_mesh
from graftax.model.tree import named
from graftax.peft import LoRA, Subset
from graftax.train.cli import main
from graftax.train.config import Run, from_json
from graftax.train.progress import read_metrics
from graftax.train.runs import load
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.export import write_base
from graftax.train.runs.load import load_run
from graftax.train.runs.manifest import fingerprint
from graftax.train.runs.report import nbytes
from graftax.train.runs.train import train
from test_train import base, examples, kill_at, pretraining, texts, tuning  # noqa: F401
from tiny import close, same

KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory, examples):  # noqa: F811
    """Llama's shape in bfloat16, large enough that its layers are most of it."""
    folder = tmp_path_factory.mktemp("hf") / "base"
    config = Config(V=320, D=64, L=4, N=4, K=2, H=16, F=128, context=64, family="llama", param_dtype="bfloat16")
    hf.save(folder, config, init(config, jax.random.key(0)))
    train_tokenizer(examples.read_text().splitlines(), folder / "tokenizer.model", 300)
    return folder


@pytest.fixture(scope="module")
def tuned(base, examples, tmp_path_factory):  # noqa: F811
    """A run over an nf4 base."""
    out = str(tmp_path_factory.mktemp("runs") / "nf4")
    return train(tuning(base, examples, LoRA(rank=2), quantize="nf4", out=out))


@pytest.mark.full
@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=["one", "mesh"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_is_quantising_after_reading(kind, mesh, base, hf_base):  # noqa: F811
    """Bit for bit, of a Hugging Face folder and of a run, in both layouts; known by the fingerprint of what it was."""
    mesh = mesh and make_mesh(mesh)
    for folder in (base, hf_base):
        for layers in ("stacked", "unrolled"):
            before = load_run(folder, layers=layers)
            got = load_run(folder, mesh, layers=layers, quantize=kind)
            assert same(got.base, quantize(before.merged, kind)), (folder, layers)
            assert got.fingerprint == fingerprint(before.merged) == before.fingerprint
    w = got.params["layers"]["0"]["mlp"]["up"]
    assert (w.dtype, w.shape) == (jnp.bfloat16, (64, 128))
    if mesh is not None:
        assert tuple(jax.tree.leaves(w)[0].sharding.spec) == ("fsdp", "tensor")


@pytest.mark.parametrize("which", ["run", "hugging_face"])
def test_one_parameter_at_a_time_is_whole(which, base, hf_base, monkeypatch, tmp_path):  # noqa: F811
    """While a base is read the arrays alive are what is quantised so far and one parameter as it was."""

    def now():
        """Bytes of all buffers; several arrays may share one."""
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if len(x.devices()) == 1}.values())

    folder, peak = hf_base, []
    if which == "run":
        folder, got = tmp_path / "base", load_run(base)
        config = dataclasses.replace(got.config, L=8, D=64, F=128)
        write_base(folder, dataclasses.replace(got, config=config), init(config, jax.random.key(0)), "wider", {})
        del got
    after = nbytes(load_run(folder, quantize="nf4").params)
    whole = load_run(folder).merged
    before, largest = nbytes(whole), max(x.nbytes for x in jax.tree.leaves(whole))
    del whole
    start, real = now(), load.quantize_parameter
    monkeypatch.setattr(load, "quantize_parameter", lambda *a, **k: (peak.append(now() - start), real(*a, **k))[1])
    load_run(folder, quantize="nf4")
    assert len(peak) > 8
    assert max(peak) <= after + largest + 1024 < before


def test_a_run_over_nf4(base, tuned, examples):  # noqa: F811
    """What it wrote down, and that evaluating it again gives the last loss of training."""
    run, manifest = from_json(tuned / "config.json"), CheckpointWriter(tuned / "checkpoints").manifest(6)
    assert run.quantize == "nf4"
    assert manifest["base"] == fingerprint(load_run(base).merged)
    summary = json.loads((tuned / "summary.json").read_text())
    plain = load_run(base)
    assert summary["base_bytes"] == nbytes(quantize(plain.merged, "nf4")) < 0.7 * nbytes(plain.merged)
    assert summary["base"] == sum(x.size for x in jax.tree.leaves(plain.merged))
    got = load_run(tuned)
    assert isinstance(got.params["layers"]["mlp"]["up"], NF4)
    last = [row for row in read_metrics(tuned) if "held_out_loss" in row][-1]
    found = runs_loss(got, run)
    assert abs(found - last["held_out_loss"]) <= 1e-5 * found
    assert abs(found - runs_loss(dataclasses.replace(got, params=plain.merged), run)) > 1e-4, "it is the nf4 base"


def runs_loss(got, run):
    from graftax.train.evaluate import held_out_losses, mean_loss

    return mean_loss(held_out_losses(*got.bound, got.held_out, run.data.batch, run.eval_tokens))


def test_9_killed_and_resumed_equals_unbroken(base, examples, tuned, tmp_path, monkeypatch):  # noqa: F811
    run = tuning(base, examples, LoRA(rank=2), quantize="nf4", out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with contextlib.suppress(KeyboardInterrupt):
            train(run)
    train(dataclasses.replace(run, resume="auto"))
    a, b = (CheckpointWriter(folder / "checkpoints").manifest(6) for folder in (tuned, tmp_path / "cut"))
    assert a["leaves"] == b["leaves"]


def test_merging_folds_what_was_trained_against(tuned, tmp_path, capsys):
    """A plain base in the dtype of its base: the dequantised matrices and the update."""
    main(["merge", str(tuned), "--out", str(tmp_path / "merged"), "--json"])
    merged, got = load_run(tmp_path / "merged"), load_run(tuned)
    assert not any(isinstance(w, Quantized) for w in named(merged.params).values())
    close(merged.merged, got.merged)
    again = load_run(tuned, quantize="int8")  # a tuned run as a quantised base
    assert same(again.base, quantize(got.merged, "int8"))
    assert again.fingerprint == got.fingerprint, "what it is computed from, before it was quantised again"


@pytest.mark.full
def test_tuning_a_hugging_face_base_over_nf4(hf_base, examples, tmp_path):  # noqa: F811
    run = tuning(hf_base, examples, LoRA(rank=2), quantize="nf4", out=str(tmp_path / "run"), layers="unrolled")
    out = train(run)
    got, loss = load_run(out), [row["loss"] for row in read_metrics(out) if "loss" in row]
    assert isinstance(got.params["layers"]["3"]["attn"]["q"], NF4)
    assert np.isfinite(loss).all()
    assert {x.dtype for x in jax.tree.leaves(got.merged)} == {jnp.dtype("bfloat16")}


def test_what_cannot_train_is_named(base, examples, tmp_path):  # noqa: F811
    run = tuning(base, examples, Subset("all"), quantize="nf4", out=str(tmp_path / "run"))
    with pytest.raises(InputError, match="subset: layers/attn/k is NF4 and cannot train; narrow where='all'"):
        train(run)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--quantize int8: applies to a frozen base, which pretraining lacks"):
        Run(quantize="int8")
