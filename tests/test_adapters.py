"""Adapters by the command line: a run's adapter for HF PEFT and vLLM, and a folder of HF PEFT's as a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.data.tokenizers import add_tokens
from graftax.train.cli import main
from graftax.train.runs import adapters, commands, export
from graftax.train.runs.adapters import with_uniform_rank
from graftax.train.runs.export import write_base
from graftax.train.runs.load import load_run
from graftax.train.setup import resolve_method
from safetensors.numpy import load_file
from test_hf_runs import SMALL, adapter, command, hf_base, refused, rows  # noqa: F401
from tiny import close, make_base, make_batch, same, shaken


def test_out_and_in_again(adapter, hf_base, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "peft"
    said = command(capsys, "export", adapter, "--out", out, "--format", "hf-peft")
    assert said["max_difference"] < 1e-5
    assert said["base"] == str(hf_base)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    assert config["base_model_name_or_path"] == str(hf_base)
    before, after = load_run(adapter), load_run(out)
    close(after.trainable, before.trainable, 0)
    asked = ["--prompt", "red 3", "--chat", "--new", "4"]
    assert command(capsys, "generate", out, *asked) == command(capsys, "generate", adapter, *asked)
    merged = tmp_path / "merged"
    command(capsys, "merge", out, "--out", merged)
    assert load_run(merged).run.phase == "pretrain"
    large, _ = add_tokens(before.tokenizer, [f"<|{i}|>" for i in range(9)])  # six more than the base has spare rows
    large.save(out)
    for args in (["generate", out, *asked], ["eval", out], ["export", out, "--out", tmp_path / "x"]):
        line = refused(capsys, *args)
        assert f"{out}: the tokenizer has {before.config.V + 6} tokens, but the base has {before.config.V} rows" in line
    for name in large.files | {large.file: b""}:
        (out / name).unlink()
    base_alone = ["export", hf_base, "--out", tmp_path / "x", "--format", "hf-peft"]
    assert "is a base, not an adapter" in refused(capsys, *base_alone)
    assert "--for vllm needs --format hf-peft" in refused(
        capsys, "export", adapter, "--out", tmp_path / "x", "--for", "vllm"
    )
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}))
    assert "names no base; give one with --base" in refused(capsys, "eval", out)
    assert not (tmp_path / "x").exists()


def test_an_adapter_names_the_base_it_was_tuned_on(hf_base, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The imported model as long as its parameters are those of the base, else the run."""
    base, method, folder = load_run(hf_base), peft.LoRA(rank=2), tmp_path / "changed"
    write_base(folder, base, jax.tree.map(lambda x: 2 * x, base.params), "merged", {})
    got = load_run(folder)
    manifest, trainable = got.manifest | {"base": got.fingerprint}, method.init(jax.random.key(0), got.params)
    run = dataclasses.replace(got.run, phase="finetune", base=str(folder), method=method)
    tuned = dataclasses.replace(got, run=run, manifest=manifest, method=method, trainable=trainable)
    monkeypatch.setattr(commands, "load_run", lambda *_, **__: tuned)
    monkeypatch.setattr(commands, "compare_adapter", lambda *_, **__: {})  # what it computes is not in question here
    said = command(capsys, "export", "x", "--out", tmp_path / "out", "--format", "hf-peft")
    assert said["base"] == str(folder)
    assert export.base_name(dataclasses.replace(tuned, manifest=manifest | {"base": base.fingerprint})) == str(hf_base)
    again = load_run(tmp_path / "out")
    assert same(again.params, tuned.params)
    assert [r["run"] for r in again.lineage] == [*(r["run"] for r in tuned.lineage), str(tmp_path / "out")]
    assert "fingerprint" not in capsys.readouterr().err
    load_run(tmp_path / "out", base=str(hf_base))
    assert "was tuned on a base with fingerprint" in capsys.readouterr().err


def test_the_revision_of_a_base_goes_out_and_in(tmp_path):
    base, method = make_base(), peft.LoRA(rank=2)
    config = dataclasses.replace(base.config, family="qwen2")
    peft.hf.save(tmp_path / "a", config, method, method.init(jax.random.key(0), base.params), "owner/name@v1.0")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("owner/name", "v1.0")
    assert adapters.adapter_base(tmp_path / "a", "") == "owner/name@v1.0"
    assert adapters.adapter_base(tmp_path / "a", "owner/other") == "owner/other"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said | {"revision": 3}))
    with pytest.raises(InputError, match="revision is 3, expected text"):
        adapters.adapter_base(tmp_path / "a", "")


def test_for_vllm_ranks_are_one(adapter, tmp_path, capsys):  # noqa: F811
    command(capsys, "export", adapter, "--out", tmp_path / "v", "--format", "hf-peft", "--for", "vllm")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert {
        x.shape[0] for n, x in load_file(tmp_path / "v" / "adapter_model.safetensors").items() if "lora_A" in n
    } == {8}


@pytest.mark.parametrize("method", [
    peft.LoRA(rank=2, ranks=(("layers/[1:]/attn/q", 5), (".*/[kv]", 1)), alphas=((".*/down", 7.0),)),
    peft.RsLoRA(rank=4), peft.LoRAPlus(rank=2), peft.LoRAFA(rank=3),
], ids=lambda m: type(m).__name__)  # fmt: skip
def test_uniform_ranks_compute_the_same(method):
    base, batch = make_base(), make_batch()
    trainable = shaken(method.init(jax.random.key(0), base.params))
    one, t = with_uniform_rank(method, base.config, base.params, trainable)
    assert len({x["a"].shape[-1] for x in t.values()}) == 1
    logits = lambda m, x: peft.apply(base.model, base.params, m, x, batch["ids"])  # noqa: E731
    a, b = jax.jit(lambda x, y: (logits(method, x), logits(one, y)))(trainable, t)
    close(a, b, 2e-5)


@pytest.mark.parametrize("method", [peft.DoRA(), peft.LoRABias(), peft.PiSSA(), peft.Houlsby(), peft.LoRA(rank=600),
                                    peft.chain(peft.Subset("norms"), peft.LoRA())])  # fmt: skip
def test_vllm_is_told_why_not(method):
    base = make_base()
    trainable = jax.eval_shape(method.init, jax.random.key(0), base.params)
    with pytest.raises(InputError, match=r"--for vllm: .*(merge it|make it smaller)"):
        with_uniform_rank(method, base.config, base.params, trainable)


def test_a_prompt_from_a_text(hf_base, rows, tmp_path, capsys):  # noqa: F811
    out, text = tmp_path / "prompt", "Say the color"
    main(["finetune", "sft", "--base", str(hf_base), "--data", str(rows), "--method", "prompt", "--method.text", text,
          "--method.tokens", "6", "--steps", "2", "--no-tensorboard", "--out", str(out), *SMALL])  # fmt: skip
    capsys.readouterr()
    got = load_run(out)
    ids = got.tokenizer.prompt(text)
    assert list(got.method.ids) == ids
    start = got.method.init(jax.random.key(0), got.params)["embed/table"]["prompt"]
    table = np.asarray(got.params["embed"]["table"], np.float32)
    np.testing.assert_array_equal(start, table[[ids[i % len(ids)] for i in range(6)]])
    chained = resolve_method(peft.chain(peft.LoRA(), peft.Prompt(text=text)), got.tokenizer)
    assert list(chained.methods[1][1].ids) == ids
    assert jnp.isfinite(jax.tree.leaves(got.trainable)[0]).all()
    assert dataclasses.replace(got.method, ids=()).text == text
