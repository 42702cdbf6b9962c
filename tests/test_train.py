"""Whole runs on a tiny base: resume, checkpoints, the command line and its errors."""

import contextlib
import dataclasses
import json
import math
import pydoc_data.topics

import jax
import numpy as np
import pytest
from graftax import InputError
from graftax.data.columns import chat_of
from graftax.data.sft import encode_example
from graftax.model.tree import named
from graftax.peft import LoRA, Prompt, Subset
from graftax.train.cli import main
from graftax.train.commands import Eval
from graftax.train.config import Data, Optim, Run, from_json, to_json
from graftax.train.evaluate import choose_answers, held_out_losses, row_losses, within_tokens
from graftax.train.flags import take_json
from graftax.train.inputs import load_task
from graftax.train.optim import lr_schedule
from graftax.train.runs import train as run_module
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.load import load_run
from graftax.train.runs.manifest import encode_manifest, fingerprint
from graftax.train.runs.train import train
from tiny import CONFIG, close

MODEL = dataclasses.replace(CONFIG, V=400, context=64)


def quick(**changes):
    run = Run(
        steps=6, mesh=(8, 1, 1), log_every=2, save_every=2, eval_tokens=512, tensorboard=False, optim=Optim(lr=1e-2)
    )
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, (name, text) in enumerate(sorted(pydoc_data.topics.topics.items())[:24]):
        (folder / f"{i}-{name}.txt").write_text(text[:4000], "utf-8")
    return folder


@pytest.fixture(scope="session")
def pretraining(texts):
    data = Data(domains=(("docs", str(texts), 1.0),), T=32, batch=8, vocab=400, held_out=0.2, cache="")
    return quick(phase="pretrain", model=MODEL, data=data)


@pytest.fixture(scope="session")
def base(pretraining, tmp_path_factory):
    return train(dataclasses.replace(pretraining, out=str(tmp_path_factory.mktemp("runs") / "base")))


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"prompt": f"{word} {i}", "completion": word[::-1]} for i in range(30) for word in ("red", "blue")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def tuning(base, examples, method, **changes):
    data = Data(task=str(examples), T=32, batch=8, held_out=0.2)
    return quick(
        phase="finetune", base=str(base), method=method, data=data, eval_base_first=False, eval_rows=4, **changes
    )


@pytest.fixture(scope="session")
def adapter(base, examples, tmp_path_factory):
    return train(tuning(base, examples, LoRA(rank=2), out=str(tmp_path_factory.mktemp("runs") / "lora")))


def test_a_run_directory_holds_what_is_promised(base):
    names = {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "tokenizer.model",
        "held_out.npz",
        "loss.png",
        "checkpoints",
    }
    assert names <= {p.name for p in base.iterdir()}
    run = from_json(base / "config.json")
    assert json.loads(to_json(run)) == json.loads((base / "config.json").read_text())
    losses = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == [2, 4, 6]
    manifest = CheckpointWriter(base / "checkpoints").manifest(6)
    assert set(manifest) >= {"leaves", "tokenizer", "data", "base", "versions", "next_row", "rows_digest"}
    assert manifest["next_row"] == 48
    assert manifest["score"] > 0
    assert CheckpointWriter(base / "checkpoints").manifest(4)["score"] is None, "step 4 was not evaluated"


def kill_at(monkeypatch, step):
    """Let the run die at the beginning of a step, with the save before it complete."""
    real, save = run_module.compile_step, CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda self, *args: (save(self, *args), self.wait()))

    def compiled(setup):
        go, cost = real(setup)

        def dying(state, frozen, batch):
            if int(state.step) == step:
                raise KeyboardInterrupt
            return go(state, frozen, batch)

        return dying, cost

    monkeypatch.setattr(run_module, "compile_step", compiled)


@pytest.mark.parametrize(
    "method", [None, Subset("all"), LoRA(rank=2), Prompt(tokens=3)], ids=["pretrain", "full", "lora", "prompt"]
)
def test_9_killed_and_resumed_equals_unbroken(method, pretraining, base, examples, tmp_path, monkeypatch, adapter):
    if method is None:
        run, whole = pretraining, base
    else:
        run = tuning(base, examples, method)
        whole = adapter if isinstance(method, LoRA) else train(dataclasses.replace(run, out=str(tmp_path / "whole")))
    run = dataclasses.replace(run, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with contextlib.suppress(KeyboardInterrupt):
            train(run)
    assert CheckpointWriter(tmp_path / "cut/checkpoints").steps()[-1] == 4
    train(dataclasses.replace(run, resume="auto"))
    a, b = (CheckpointWriter(folder / "checkpoints").manifest(6) for folder in (whole, tmp_path / "cut"))
    assert a["leaves"] == b["leaves"]
    assert (a["rows_digest"], a["next_row"]) == (b["rows_digest"], b["next_row"])


def test_resume_refuses_other_data(pretraining, base):
    other = dataclasses.replace(pretraining, out=str(base), resume="auto", seed=5)
    with pytest.raises(InputError, match="--resume: the data changed since step 6"):
        train(other)


def test_resume_of_a_complete_run_changes_nothing(pretraining, base):
    summary = (base / "summary.json").read_text()
    train(dataclasses.replace(pretraining, out=str(base), resume="auto"))
    assert (base / "summary.json").read_text() == summary


def test_checkpoints_keep_the_newest_and_the_best(tmp_path):
    checkpoints = CheckpointWriter(tmp_path, keep=1)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
        checkpoints.save(step, {"trainable": {"w": jax.numpy.ones(2) * step}}, {}, score)
    checkpoints.close()
    assert checkpoints.steps() == [2, 4]
    assert checkpoints.best() == 2


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    checkpoints = CheckpointWriter(tmp_path)
    tree = {"layers/mlp/up": jax.numpy.arange(64.0)}
    checkpoints.save(1, {"trainable": tree}, {})
    checkpoints.wait()
    path = tmp_path / "1/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["leaves"]["trainable"]["layers/mlp/up"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest.json: not what was written"):
        checkpoints.restore(1, "trainable", tree)
    path.write_text(encode_manifest(manifest))
    with pytest.raises(InputError, match=r"layers/mlp/up is not what was saved"):
        checkpoints.restore(1, "trainable", tree)
    with pytest.raises(InputError, match=r"has an unexpected layers/mlp/up"):
        checkpoints.restore(1, "trainable", {})
    with pytest.raises(InputError, match=r"float32\[64\], expected float32\[32\]"):
        checkpoints.restore(1, "trainable", {"layers/mlp/up": jax.numpy.arange(32.0)})
    checkpoints.close()


def test_a_fine_tune_stores_its_trainable_tree_alone(adapter, base):
    leaves = CheckpointWriter(adapter / "checkpoints").manifest(6)["leaves"]["trainable"]
    assert all(path.endswith(("/a", "/b")) for path in leaves)
    got = load_run(adapter)
    assert fingerprint(got.params) == fingerprint(load_run(base).params) == got.manifest["base"]


@pytest.mark.parametrize(
    ("args", "asked", "rest"),
    [
        ("r --chat --json", True, "r --chat"),
        ("--json r --prompt x", True, "r --prompt x"),
        ("r --prompt --json", False, "r --prompt=--json"),
        ("r --prompt=--json --chat", False, "r --prompt=--json --chat"),
        ("r --prompt --json --json", True, "r --prompt=--json"),
        ("sft --resume --json --data.no-pack --json", True, "sft --resume --data.no-pack"),
        ("sft --method.share --json", True, "sft --method.share"),
        ("sft --over --json optim.lr=1", False, "sft --over=--json optim.lr=1"),
    ],
)
def test_json_is_a_switch_but_behind_a_flag_that_takes_a_value(args, asked, rest):
    assert take_json(args.split()) == (asked, rest.split())


def test_merge_gives_a_base_that_computes_the_same(adapter, tmp_path):
    main(["merge", str(adapter), "--out", str(tmp_path / "merged")])
    merged, tuned = load_run(tmp_path / "merged"), load_run(adapter)
    close(named(merged.params), named(tuned.merged))
    assert fingerprint(merged.params) == fingerprint(tuned.merged)


def test_an_adapter_is_refused_on_another_base(pretraining, adapter, tmp_path, capsys):
    other = train(dataclasses.replace(pretraining, out=str(tmp_path / "other"), seed=1, steps=2))
    assert "was tuned on another base" in failing(["eval", str(adapter), "--base", str(other)], capsys)


def test_a_file_is_scored_whole(adapter, base, examples, tmp_path, capsys):
    """All rows of it, the same ones for a run and its base; --rows are even; what was trained on is said."""
    rows = {}
    for folder in (adapter, base):
        main(["eval", str(folder), "--task", str(examples), "--json"])
        said = capsys.readouterr()
        rows[folder] = json.loads(said.out)["rows"]
        assert ("rows have a prompt that the run was trained on" in said.err) == (folder == adapter)
    assert set(rows.values()) == {60}
    got = load_run(adapter)
    data = dataclasses.replace(got.run.data, test=str(examples), task=str(tmp_path / "gone.jsonl"))
    moved = dataclasses.replace(got, run=dataclasses.replace(got.run, data=data))
    assert len(Eval(str(adapter)).judged_by(moved).test) == 60, "the rows of a run's --data.test"
    assert "it is not known whether these are among them" in capsys.readouterr().err
    main(["eval", str(adapter), "--task", str(examples), "--rows", "5"])
    assert "5 of 60 rows: " in capsys.readouterr().err
    assert "--rows -1: wanted 0 or more" in failing(["eval", str(adapter), "--rows", "-1"], capsys)


def test_a_run_on_all_rows(base, examples, tmp_path, capsys):
    """--data.held-out 0: nothing chooses and nothing judges, which is said once and breaks nothing."""
    run = tuning(base, examples, LoRA(rank=2), out=str(tmp_path / "all"))
    run = dataclasses.replace(
        run, steps=4, eval_every=2, eval_base_first=True, data=dataclasses.replace(run.data, held_out=0)
    )
    summary = json.loads((train(run) / "summary.json").read_text())
    assert set(summary["after"]) == {"held_out_loss", "held_out"}
    assert (
        capsys.readouterr().err.count("60 rows: 60 train, 0 choose (validation), 0 judge (test); nothing chooses") == 1
    )
    assert CheckpointWriter(tmp_path / "all/checkpoints").best() is None
    main(["eval", run.out, "--json"])
    said = capsys.readouterr()
    assert set(json.loads(said.out)) == {"held_out"}
    assert "no row was kept back to judge by; give --task FILE" in said.err
    for flag in ("valid", "test"):
        named = dataclasses.replace(run.data, task="snips", **{flag: str(examples)})
        with pytest.raises(InputError, match=rf"--data\.{flag}: task 'snips' has its own validation and test rows"):
            load_task(named)


def test_losses_of_few_rows_are_of_rows_all_over():
    rows = [{"ids": np.zeros(8), "n": n} for n in range(10)]
    assert [row["n"] for row in within_tokens(rows, 40)] == [0, 2, 4, 6, 8]
    assert within_tokens(rows, 0) == rows
    assert within_tokens(rows, 1) == rows[:1]


def test_commands(adapter, base, capsys):
    main(["eval", str(adapter), "--rows", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"held_out", "scores", "rows"}
    main(["generate", str(base), "--prompt", "The", "--new", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] <= 4
    main(["methods", "--preset", "tiny", "--json"])
    assert {"lora", "prompt", "prefix", "houlsby", "subset"} <= set(json.loads(capsys.readouterr().out))
    main(["masks", str(base), "--where", "layers/[1:]/mlp/.*", "--json"])
    assert json.loads(capsys.readouterr().out)["trainable"] == 3 * 32 * 48


def test_swapping_a_mask_is_one_flag(base, examples, tmp_path, capsys):
    flags = ["--mesh", "8", "1", "1", "--data.T", "32", "--steps", "2", "--no-eval-base-first", "--eval-rows", "2"]
    main(["finetune", "sft", "--base", str(base), "--data", str(examples), "--out", str(tmp_path / "a"),
          "--method.where", "layers/[1:]/mlp/.*", *flags, "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert json.loads(said.out)["trainable"] == 3 * 32 * 48
    assert "layers/[1:]/mlp/.*" in said.err, "the table names the rule"


def test_bits_per_byte_are_nats_over_ln2_and_bytes(base):
    got = load_run(base)
    args = got.bound
    domain = got.held_out["docs"]
    nats = float(row_losses(*args, domain.rows, 8).sum())
    found = held_out_losses(*args, got.held_out, 8)["docs"]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / domain.n_bytes)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_choosing_takes_the_likeliest_answer(base):
    got = load_run(base)
    rows, choices = [{"prompt": "The", "completion": "a"}, {"prompt": "x = ", "completion": "b"}], ["a", "bc", "The"]
    chosen = choose_answers(*got.bound, got.tokenizer, rows, choices, batch=6)
    for row, choice in zip(rows, chosen, strict=True):
        totals = {}
        for c in choices:
            ids, weights = encode_example(chat_of(row | {"completion": c}, "here"), got.tokenizer)
            logits = got.model.apply({"params": got.params}, jax.numpy.array([ids[:-1]]))[0]
            picked = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
            totals[c] = float((picked * np.array(weights[1:])).sum())
        assert choice == max(totals, key=totals.get)


def failing(args, capsys):
    """The one line of a command that must exit 2."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("graftax: ")]
    assert len(lines) == 1
    assert said.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in said.err
    return lines[0]


def test_bad_input_is_one_line_and_writes_nothing(base, examples, texts, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("")
    long = [json.dumps({"prompt": f"{i} " * 300, "completion": "b"}) + "\n" for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(long))
    (tmp_path / "folder").mkdir()
    tune = ["finetune", "sft", "--mesh", "8", "1", "1", "--base", str(base), "--out", str(out), "--data.T", "32"]
    data = ["--data", str(examples)]
    cases = [
        (["finetune", "stf"], "no finetune recipe 'stf'; did you mean sft?"),
        (["finetune", "sft", "--optm.lr", "1"], "unknown flag --optm.lr; did you mean --optim.lr?"),
        (["finetune", "sft", "--optim.lr", "fast"], "--optim.lr"),
        (["finetune", "sft", "--method", "lorra"], "unknown method 'lorra'; did you mean lora?"),
        (["finetun"], "no command 'finetun'; did you mean finetune?"),
        ([*tune, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ([*tune, "--data", str(tmp_path / "empty.jsonl")], "empty.jsonl"),
        ([*tune, "--data", str(tmp_path / "bad.jsonl")], "bad.jsonl:2"),
        ([*tune, "--data", str(tmp_path / "latin.jsonl")], "latin.jsonl"),
        ([*tune, "--data", str(tmp_path / "long.jsonl")], "long.jsonl:"),
        ([*tune, *data, "--data.T", "65"], "--data.T 65 is longer than the model's context of 64"),
        ([*tune, *data, "--method.where", "layers/mpl/.*"], "matches no parameter; did you mean layers/mlp/"),
        ([*tune, *data, "--mesh", "3", "1", "1"], "mesh 3x1x1 (data x fsdp x tensor) does not match the 8 device(s)"),
        (
            [*tune, *data, "--base", str(tmp_path / "folder")],
            "is no run directory and no Hugging Face model: it has no config.json",
        ),
        ([*tune, *data, "--base", str(tmp_path / "nothing")], "does not exist"),
        ([*tune, *data, "--data.batch", "12"], "--data.batch 12 does not divide into 8"),
        ([*tune, *data, "--out", str(base)], "is not an empty folder"),
        ([*tune, *data, "--optim.lr", "nan"], "--optim.lr nan"),
        (["eval", str(tmp_path / "folder")], "is no run directory and no Hugging Face model"),
        (["generate", str(base), "--top-p", "2"], "--top-p 2.0: wanted above 0, at most 1"),
        (["pretrain", "five_domains", "--data.root", str(tmp_path)], "no such folder"),
    ]
    for args, expected in cases:
        line = failing(args, capsys)
        assert expected in line, f"{args}: {line}"
        assert not out.exists(), f"{args} wrote {out}"


def test_wsd_falls_over_its_last_steps_and_ends_at_the_last_rate():
    rate = lr_schedule(Optim(lr=1.0, schedule="wsd", warmup=2, decay=0.4, end=0.0), 12)
    np.testing.assert_allclose([rate(i) for i in range(12)], [0.5, *[1] * 7, 0.75, 0.5, 0.25, 0], atol=1e-6)


def test_help_has_an_example_for_every_command(capsys):
    from graftax.train.cli import COMMANDS

    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"graftax {command}" in capsys.readouterr().out
