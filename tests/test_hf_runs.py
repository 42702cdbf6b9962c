"""A Hugging Face folder as a base: tuned, evaluated, asked, merged, exported and imported by the command line."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError
from graftax.data.sft import encode_example
from graftax.data.tokenizers import load_tokenizer, train_tokenizer
from graftax.model import Config, init
from graftax.model.hf import load, save
from graftax.model.sharding import make_mesh
from graftax.model.tree import named
from graftax.peft import LoRA, Subset
from graftax.train.cli import main
from graftax.train.config import Run, from_json
from graftax.train.runs import commands, resume
from graftax.train.runs.equivalence import compare_logits
from graftax.train.runs.export import write_base
from graftax.train.runs.load import load_run
from graftax.train.runs.loaded import LoadedRun
from graftax.train.runs.prepare import prepare
from tiny import same

TOKENIZER = Path(__file__).parent / "golden" / "tokenizers" / "qwen"
SMALL = ["--mesh", "8", "1", "1", "--data.T", "64", "--data.batch", "8", "--eval-rows", "2", "--no-eval-base-first"]


def command(capsys, *args):
    """A command's JSON."""
    main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *args):
    """The one line of a command that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    assert stop.value.code == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("graftax:"))


@pytest.fixture(scope="session")
def hf_base(tmp_path_factory):
    """Qwen2's shape and a byte-level tokenizer; bfloat16, three rows of the table more than tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("hf") / "base", load_tokenizer(TOKENIZER)
    config = Config(V=tokenizer.vocab_size + 3, D=32, L=2, N=4, K=2, H=8, F=48, context=128, qkv_bias=True,
                    family="qwen2", param_dtype="bfloat16")  # fmt: skip
    params = jax.tree.map(lambda x: 3 * x, init(config, jax.random.key(0)))
    save(folder, config, params, eos_token_id=tokenizer.eos)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"{w} {i}", "completion": w.upper()} for i in range(20) for w in ("red", "blue")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def adapter(hf_base, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lora"
    main(["finetune", "sft", "--base", str(hf_base), "--data", str(rows), "--method", "lora", "--steps", "8",
          "--optim.lr", "3e-2", "--no-tensorboard", "--out", str(out), *SMALL])  # fmt: skip
    return out


def test_the_frozen_base_stays_in_half_precision(hf_base, rows, tmp_path):
    run = Run(phase="finetune", base=str(hf_base), method=LoRA(), steps=1, mesh=(8, 1, 1), date="2024-07-26")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, task=str(rows), T=64, held_out=0.2))
    phase = prepare(run, make_mesh((8, 1, 1)), tmp_path)
    assert phase.tokenizer.date == "2024-07-26"
    assert {x.dtype for x in jax.tree.leaves(phase.frozen)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(phase.state.trainable)} == {jnp.dtype("float32")}
    moments = [x.dtype for x in jax.tree.leaves(phase.state.opt_state) if x.ndim]
    assert set(moments) == {jnp.dtype("float32")}
    assert phase.model.config.dtype == "float32"  # on a CPU; on others as the base
    part = dataclasses.replace(run, method=Subset("layers/[1:]/mlp/.*"))
    phase = prepare(part, make_mesh((8, 1, 1)), tmp_path)
    bound = named(phase.method.bind(phase.frozen, phase.state.trainable))
    assert bound["layers/mlp/up"].dtype == jnp.float32  # what trains is not rounded
    wanted = dataclasses.replace(run, dtype="bfloat16", remat="full")
    config = prepare(wanted, make_mesh((8, 1, 1)), tmp_path).model.config
    assert (config.dtype, config.remat) == ("bfloat16", "full")


def test_tuned_asked_and_scored(adapter, hf_base, rows, capsys):
    summary = json.loads((adapter / "summary.json").read_text())
    losses = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert summary["method"] == "lora"
    assert losses[-1]["step"] == 8
    assert from_json(adapter / "config.json").base == str(hf_base)
    assert set(named(dict.fromkeys(p.name for p in adapter.iterdir()))) >= {"tokenizer.json", "config.json"}
    got = command(capsys, "generate", adapter, "--chat", "--prompt", "red 3", "--new", 4)
    assert got["tokens"] <= 4
    assert 0 <= command(capsys, "eval", adapter, "--rows", 2)["scores"]["exact_match"] <= 1
    assert command(capsys, "generate", hf_base, "--prompt", "red", "--new", 3)["tokens"] <= 3
    assert "scores" in command(capsys, "eval", hf_base, "--task", rows, "--rows", 2)
    assert command(capsys, "masks", hf_base, "--where", "norms")["trainable"] == 5 * 32


def logits(folder):
    model, bound, _ = load_run(folder).bound
    return np.asarray(model.apply({"params": bound}, jnp.arange(24)[None]))


def test_a_run_keeps_the_date_of_its_start(adapter, hf_base, monkeypatch):
    """What a chat template writes with strftime_now is the same when the run goes on, or is judged, on another day."""
    run = from_json(adapter / "config.json")
    assert run.date
    assert load_run(adapter).tokenizer.date == run.date
    monkeypatch.setattr(resume, "today", lambda: "2000-01-01")
    later = dataclasses.replace(run, date="", resume="auto")
    assert resume.with_date(later).date == run.date
    assert resume.with_date(dataclasses.replace(later, resume="8")).date == run.date
    assert resume.with_date(dataclasses.replace(later, date="2001-02-03")).date == "2001-02-03"
    assert (
        resume.with_date(dataclasses.replace(later, resume="never")).date == "2000-01-01"
    )  # a run on top decides anew
    assert load_run(hf_base).tokenizer.date == ""
    manifest = load_run(adapter).manifest
    setup = SimpleNamespace(
        run=dataclasses.replace(later, date="2001-02-03"),
        data_digest="other",
        data_sizes={},
        base_fingerprint="",
        tokenizer=SimpleNamespace(digest=manifest["tokenizer"]),
    )
    with pytest.raises(InputError, match=f'the data changed since step 8: date "{run.date}" -> "2001-02-03"'):
        resume.accepted_changes(setup, manifest)


def test_merged_and_exported_are_checked(adapter, hf_base, tmp_path, capsys):
    wide = command(capsys, "export", adapter, "--out", tmp_path / "wide", "--dtype", "float32")
    assert wide["kl_mean"] < 1e-6
    assert wide["kept"] > 0.99
    np.testing.assert_allclose(logits(tmp_path / "wide"), logits(adapter), atol=1e-3)
    kept = command(capsys, "export", adapter, "--out", tmp_path / "hf")
    assert 1e-7 < kept["kl_mean"] < 2e-2  # rounded to the base's bfloat16
    config, params = load(tmp_path / "hf")
    assert config == load(hf_base)[0]
    assert {p.name for p in (tmp_path / "hf").iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    line = refused(capsys, "export", adapter, "--out", tmp_path / "no", "--bound", 1e-9)
    assert "above --bound 1e-09; nothing was written" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "wide"]
    command(capsys, "merge", adapter, "--out", tmp_path / "merged")
    merged = load_run(tmp_path / "merged")
    assert same(merged.params, params)
    assert merged.manifest["merged_from"]["adapter"] == str(adapter)
    assert "above --bound" in refused(capsys, "merge", adapter, "--out", tmp_path / "no", "--bound", 1e-9)
    assert not (tmp_path / "no").exists()
    link = tmp_path / "link"
    (tmp_path / "again").mkdir()
    link.symlink_to(tmp_path / "again")
    command(capsys, "export", tmp_path / "merged", "--out", link)
    said = [json.loads((f / "config.json").read_text()) for f in (hf_base, tmp_path / "again")]
    assert said[0] == said[1]  # also what graftax has no field for, down the whole line
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


def test_an_adapter_that_rounding_would_lose_is_not_merged(adapter, tmp_path, capsys, monkeypatch):
    """Its KL is far below the bound of bfloat16, and so is that of the base alone."""
    got = load_run(adapter)
    for size, out in ((1e-2, "lost"), (0.0, "as_it_begins")):  # without an effect nothing can be lost
        small = jax.tree.map(lambda x, size=size: x * size, got.trainable)
        tuned = dataclasses.replace(got, trainable=small)
        monkeypatch.setattr(commands, "load_run", lambda f, tuned=tuned, **kw: tuned if f == "x" else load_run(f, **kw))
        if size:
            line = refused(capsys, "merge", "x", "--out", tmp_path / out)
            assert "% of the adapter's effect" in line
            assert line.endswith("less than half; nothing was written. --dtype float32 rounds least")
        else:
            assert "kept" not in command(capsys, "merge", "x", "--out", tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["as_it_begins"]


@pytest.mark.parametrize(("merged", "kept"), [(0.9, 0.99), (0.5, 0.75), (0.2, None), (-1.0, None)])
def test_the_share_of_an_effect_that_is_kept(merged, kept, capsys):
    """For small differences the KL is quadratic in them."""
    base, effect = np.random.default_rng(0).normal(size=(2, 1, 4, 30)) * [[[[1]]], [[[1e-3]]]]
    args = (base + effect, base + merged * effect, 1.0, "x", base)
    if kept is None:
        with pytest.raises(InputError, match="less than half"):
            compare_logits(*args)
    else:
        assert compare_logits(*args)["kept"] == pytest.approx(kept, abs=1e-3)
    assert "kept" not in compare_logits(*args, noise=1e-4)


@pytest.mark.full
def test_imported_with_more_tokens(hf_base, rows, tmp_path, capsys):
    tokens = [f"<|new {i}|>" for i in range(5)]
    got = command(capsys, "import", hf_base, "--out", tmp_path / "run", "--add-tokens", *tokens)
    before, after = load_run(hf_base), load_run(tmp_path / "run")
    n = before.tokenizer.vocab_size
    assert got["V"] == after.config.V == n + 5 == after.tokenizer.vocab_size
    assert got["tokens"] == after.manifest["added_tokens"] == {token: n + i for i, token in enumerate(tokens)}
    assert after.tokenizer.encode(tokens[4]) == [n + 4]
    table = [np.asarray(named(x.params)["embed/table"], np.float32) for x in (before, after)]
    assert np.array_equal(table[0][:n], table[1][:n])
    mean = table[0][:n].mean(0)[None]  # of the rows with a token; three of the new ones are spare rows of the base
    np.testing.assert_allclose(table[1][n:], mean.repeat(5, 0), atol=1e-3)
    assert named(after.params)["embed/table"].dtype == jnp.bfloat16
    data = tmp_path / "marked.jsonl"
    data.write_text(rows.read_text().replace("blue", tokens[1]), "utf-8")
    main(["finetune", "sft", "--base", str(tmp_path / "run"), "--data", str(data), "--method", "prompt", "--steps", "1",
          "--no-tensorboard", "--out", str(tmp_path / "tuned"), *SMALL])  # fmt: skip
    said = f"the data contain tokens that were added to the base: {tokens[1]!r} (id {n + 1}). "
    said += "Prompt does not train their embeddings, which keep the values of the mean row; "
    said += f"--method tokens --method.ids {n + 1}"
    assert said in capsys.readouterr().err
    tuned = load_run(tmp_path / "tuned")
    assert (tuned.config.V, tuned.manifest["added_tokens"]) == (n + 5, got["tokens"])
    assert "has 406 tokens" in refused(capsys, "import", hf_base, "--out", tmp_path / "x", "--resize", 100).replace(
        str(n), "406"
    )
    command(capsys, "export", tmp_path / "run", "--out", tmp_path / "hf")
    assert n + 5 == load(tmp_path / "hf")[0].V


def test_an_id_without_a_token_is_never_written(hf_base, rows, tmp_path, capsys):
    """The likeliest ids are rows of the table that no token has."""
    config, params = load(hf_base)
    n, table = config.V - 3, params["embed"]["table"]
    params["embed"]["table"] = table.at[n].set(9).at[n + 1].set(-9)
    save(tmp_path / "base", config, params, like=hf_base)
    assert command(capsys, "generate", tmp_path / "base", "--prompt", "red", "--new", 3)["tokens"] <= 3
    assert "scores" in command(capsys, "eval", tmp_path / "base", "--task", rows, "--rows", 2)


def test_a_native_base_is_exported_with_its_tokenizer(tmp_path, capsys):
    words = [f"{a}{b} " for a in "bcdfghjklm" for b in ("ar", "en", "il", "os")]
    tokenizer = train_tokenizer([" ".join(words)] * 50, tmp_path / "tok", 330)
    config = Config(V=tokenizer.vocab_size, D=32, L=2, N=4, K=2, H=8, F=48, context=64, scan=False)
    params, run = init(config, jax.random.key(0)), Run(phase="pretrain", model=config)
    manifest = {"step": 3, "base": "", "tokenizer": tokenizer.digest}
    got = LoadedRun(tmp_path, run, config, params, Subset("all"), {}, tokenizer, {}, manifest)
    write_base(tmp_path / "run", got, params, "made", {})
    command(capsys, "export", tmp_path / "run", "--out", tmp_path / "hf")
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["model_type"], said["eos_token_id"], said["bos_token_id"]) == ("llama", 2, 1)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "hf" / "chat_template.jinja").exists()
    np.testing.assert_allclose(logits(tmp_path / "hf"), logits(tmp_path / "run"), atol=1e-5)
    again = load_tokenizer(tmp_path / "hf")
    text = "bar  cen\n\tdil \u00e9 12"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "fos"}]
    assert (again.file, again.encode(text)) == ("tokenizer.json", tokenizer.encode(text))
    assert again.decode(again.encode(text)) == text
    assert encode_example(turns, again) == encode_example(turns, tokenizer)
    assert (again.bos, again.eos, again.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)


def test_what_is_wrong_is_one_line(hf_base, adapter, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "base"
    shutil.copytree(hf_base, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"model_type": "mamba"}))
    assert "model_type 'mamba' is not known" in refused(capsys, "generate", folder, "--prompt", "x")
    (folder / "config.json").write_text(json.dumps(tree))
    config, params = load(hf_base)
    shutil.rmtree(folder)
    save(folder, config, jax.tree.map(lambda x: x * 2, params), like=hf_base)
    assert "was tuned on another base" in refused(capsys, "eval", adapter, "--base", folder)
    assert "is a run directory already" in refused(capsys, "import", adapter, "--out", tmp_path / "run")
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    assert "no tokenizer.model and no tokenizer.json" in refused(capsys, "generate", folder, "--prompt", "x")
    args = ["finetune", "sft", "--data", rows, "--out", tmp_path / "run", "--base"]
    assert "no such folder, and as a hub id" in refused(capsys, *args, "no-such-owner/no-such-model")
    assert not (tmp_path / "run").exists()
