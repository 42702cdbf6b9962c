"""Faults in what is read (docs/faults.md, Input): each, injected, is one line with what, where and what to do."""

import dataclasses
import gzip
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from graftax import InputError, peft
from graftax.bounds import Checked, bounds_of
from graftax.data.documents import Document, is_held_out
from graftax.data.errors import RowErrors
from graftax.data.pack import tokenize
from graftax.data.sft import sft_rows
from graftax.data.sources import documents, rows
from graftax.data.tasks.file_task import file_task
from graftax.data.tokenizers import load_tokenizer, train_tokenizer
from graftax.model import Rope
from graftax.model.hf.hub import did_you_mean_folder
from graftax.peft.methods.oft import nearest_divisor
from graftax.train import harness
from graftax.train.cli import main
from graftax.train.cluster import processes
from graftax.train.config import Data, Optim, Run, from_json, method_from_dict, method_to_dict, to_json
from graftax.train.evaluate import answerable_rows
from graftax.train.experiments.task_evaluator import TaskEvaluator
from graftax.train.inputs import check_tokenizer, corpus_and_tokenizer, load_task, tuning_rows
from graftax.train.optim import lr_schedule, make_optimizer
from tiny import CONFIG, OPTIM, make_base, make_batch, same, train_step

pytestmark = pytest.mark.faults
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = [f"question {i} about colours\tand a long answer, number {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tok"), 300)


def said(call, *words):
    """The one line that a call is refused with, which holds all of `words`."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    assert not [word for word in words if word not in line], line
    return line


def good(n=40):
    return [json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}).encode() for i in range(n)]


def write(path, lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# --- one bad row among good ones: (the row, what is said, what to do) ---

SURROGATE = b'{"prompt": "a", "completion": "b \\ud83d"}'
BAD = {
    "latin-1": (b'{"prompt": "caf\xe9", "completion": "b"}', "not UTF-8 (byte 0xe9", "iconv -f latin1"),
    "bom inside": (b"\xef\xbb\xbf{}", "a byte order mark at column 1", "expected one JSON object per line"),
    "nul": (b'{"prompt": "a\0", "completion": "b"}', "a NUL byte at offset", "iconv -f utf16"),
    "lone surrogate": (SURROGATE, "lone surrogate '\\ud83d' at character 2", "expected Unicode text"),
    "broken": (b'{"prompt": "a", "completion": b}', "(Expecting value at column 31)", "correct or drop it"),
    "missing field": (b'{"prompt": "a"}', "fields ['prompt']", 'expected one of {"prompt", "completion"}'),
    "list": (b'["a", "b"]', ": a list; ", "expected one JSON object per line"),
    "null": (b"null", ": null; ", "expected one JSON object per line"),
    "null field": (b'{"prompt": "a", "completion": null}', "'completion' is null", "expected text"),
    "misspelt": (b'{"instruction": "a", "Input": "c", "output": "b"}', "column 'Input' beside", "did you mean 'input'"),
    "tools": (b'{"prompt": "a", "completion": "b", "tools": [{"a": 1}]}', "'tools' has no place", "--data.ignore"),
    "blank reply": (b'{"prompt": "a", "completion": " \\n"}', "no words by the assistant", "drop the row or fill"),
    "number": (b'{"prompt": "a", "completion": 4}', "'completion' is a number", "write it in quotes or drop the row"),
    "duplicate key": (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "duplicate key 'prompt'", "expected"),
    "digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "JSON that cannot be read", "expected one JSON object per line"),
    "nested": (b'{"prompt": ' + b"[" * 99_000, "JSON that cannot be read", "expected one JSON object per line"),
    "no reply": (b'{"messages": [{"role": "user", "content": "x"}]}', "no words by the assistant", "drop the row"),
    "empty reply": (b'{"prompt": "a", "completion": ""}', "no words by the assistant", "drop the row or fill it in"),
    "last from user": (
        b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}',
        "the last message is from user", "expected a reply by assistant",
    ),
    "role": (b'{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot'", "expected one of system, user"),
    "content parts": (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        "message 0: 'content' is a list", "expected text",
    ),
    "too long": (b'{"prompt": "a", "completion": "%s"}' % (b"b " * 99), "tokens, but a row holds T=32", "raise T"),
    "10 MB": (b'{"prompt": "a", "completion": "%s"}' % (b"b " * 5_000_000), "tokens, but a row holds T=32", "raise T"),
}  # fmt: skip
REPAIRED = {"latin-1", "nul", "lone surrogate", "number", "too long"}  # by `repair`; it leaves the others out


def tuned(path, tok, policy="error", cap=1.0, V=300):
    """What a fine-tuning run reads of a file."""
    return tuning_rows(Data(task=str(path), T=32, held_out=0.2, bad_rows=policy, max_bad_rows=cap), 0, tok, V)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(name, tok, tmp_path):
    row, *words = BAD[name]
    path = write(tmp_path / "rows.jsonl", [*good(), row, *good(3)])
    assert said(lambda: tuned(path, tok), *words).startswith(f"{path}:41: ")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", [name for name in BAD if name != "10 MB"])
@pytest.mark.parametrize("policy", ["skip", "repair"])
def test_or_left_out_or_repaired_and_counted(name, policy, tok, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [*good(), BAD[name][0]])
    task, sft = tuned(path, tok, policy)
    n = int(policy == "repair" and name in REPAIRED)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"--data.bad-rows {policy}: {1 - n} of 41 rows left out, {n} repaired"
    assert lines[1].startswith(f"{'repaired' if n else 'left out'}: {path}:41: ")
    data = Data(task=str(path), held_out=0.2, bad_rows=policy, max_bad_rows=1)
    assert load_task(data).valid == task.valid  # as `graftax eval` reads the same rows
    clean = write(tmp_path / "clean.jsonl", good())
    if not n:  # what is left out leaves no trace
        assert sft.digest == tuned(clean, tok)[1].digest
    assert capsys.readouterr().err == ""


def test_more_than_the_cap_is_an_error(tok, tmp_path):
    bad = [BAD[name][0] for name in ("latin-1", "broken", "too long", "null")]
    path = write(tmp_path / "rows.jsonl", [*good(56), *bad])
    tuned(path, tok, "skip", 0.07)
    words = (
        "4 of 60 rows left out, 0 repaired",
        "more than --data.max-bad-rows 0.05",
        "raise the cap",
        f"{path}:57: not UTF-8",
    )
    said(lambda: tuned(path, tok, "skip", 0.05), *words)
    said(lambda: tuned(path, tok, "repair", 0.05), "2 of 60 rows left out, 2 repaired", "--data.max-bad-rows")
    said(lambda: tuned(write(path, bad), tok, "skip", 0.5), "more than --data.max-bad-rows 0.5")


def test_repairs_are_what_they_say(tok, tmp_path):
    lines = [BAD[name][0] for name in ("latin-1", "lone surrogate", "number")]
    found = [row for _, row in rows(str(write(tmp_path / "a.jsonl", lines)), RowErrors("repair"))]
    assert found[0]["prompt"] == "caf\ufffd"
    task = file_task(write(tmp_path / "b.jsonl", [*good(), *lines[1:]]), 0.2, 0, RowErrors("repair", 1))
    replies = {row["completion"] for row in task.train + task.valid + task.test}
    assert {"b \ufffd", "4"} <= replies
    long = sft_rows([("f:1", {"prompt": "a", "completion": "b " * 99})], tok, 32, 0, errors=RowErrors("repair", 1))
    assert long.tokens == 32
    prompt = [("f:1", {"prompt": "a " * 99, "completion": "b"}), ("f:2", {"prompt": "a", "completion": "b"})]
    assert sft_rows(prompt, tok, 32, 0, errors=RowErrors("skip", 1)).examples == 1
    bad = RowErrors("repair", 1)
    assert sft_rows(prompt, tok, 32, 0, errors=bad).examples == 1  # cut, nothing of it would be learnt
    assert "no target tokens in the first 32 tokens" in bad.messages[1]


# --- the rows that choose and judge ---

LONG = [json.dumps({"prompt": f"t {n}", "completion": "b " * n}).encode() for n in (1, 2, 60, 3)]  # 60: more than 64


def test_rows_that_judge_are_checked_before_the_first_step(tok, tmp_path, capsys):
    """A file given with --data.test: prompt and longest answer must fit the context of 64, under the same policy."""
    path, test = write(tmp_path / "rows.jsonl", good(96)), write(tmp_path / "test.jsonl", LONG)
    other = write(tmp_path / "other.jsonl", LONG[3:])

    def tuned(policy, cap, **files):
        data = Data(task=str(path), T=32, held_out=0, bad_rows=policy, max_bad_rows=cap, **files)
        return tuning_rows(data, 0, tok, 300, CONFIG, 0)

    words = (f"{test}:3: a prompt of ", " tokens and ", "exceed the model's context of 64", "shorten it")
    said(lambda: tuned("error", 1.0, test=str(test)), *words)
    said(
        lambda: tuned("skip", 0.005, test=str(test)),
        "1 of 100 rows left out",
        "more than --data.max-bad-rows",
        *words,
    )
    capsys.readouterr()
    task, _ = tuned("skip", 0.01, test=str(test))
    assert [row["prompt"] for row in task.test] == ["t 1", "t 2", "t 3"]
    assert capsys.readouterr().err.startswith("--data.bad-rows skip: 1 of 100 rows left out, 0 repaired")
    said(lambda: tuned("error", 1.0, valid=str(test)), f"{test}:3: ")
    task, sft = tuned("skip", 0.01, valid=str(test))
    assert len(task.valid) == 3
    assert sft.valid
    both, _ = tuned("skip", 0.01, valid=str(test), test=str(other))
    assert [row["prompt"] for row in both.valid] == ["t 1", "t 2"], "no row that judges, and none that does not fit"
    capsys.readouterr()
    tuned("skip", 0.01, valid=str(test))
    assert "1 of 100 rows left out, 0 repaired" in capsys.readouterr().err, "once, though it is read for two things"
    write(test, LONG[2:3])
    said(lambda: tuned("skip", 1.0, test=str(test)), "none of the 1 rows to score can be used", f"{test}:1")


def test_a_row_of_the_rest_is_refused_for_the_longest_answer(tok, tmp_path):
    """One row's long answer fits behind its own prompt; behind another's it does not: that one is named."""
    rows = [{"prompt": "a", "completion": "b " * 10}, {"prompt": "b " * 10, "completion": "c"}]
    assert answerable_rows(rows, tok, CONFIG) == rows
    rows[1]["prompt"] = "b " * 27
    said(lambda: answerable_rows(rows, tok, CONFIG), "row 2: a prompt of ", "exceed the model's context of 64")
    assert answerable_rows(rows, tok, CONFIG, bad=RowErrors("skip")) == rows[:1]
    assert answerable_rows(rows[1:], tok, CONFIG) == rows[1:]
    learned = dataclasses.replace(CONFIG, rope=None, learned_positions=True)
    said(lambda: answerable_rows(rows[1:], tok, learned, 9), "context of 55 (less 9 virtual tokens)")


@pytest.mark.parametrize("part", ["task", "valid", "test"])
def test_a_row_that_the_template_refuses_is_one_row(part, tmp_path, capsys):
    """Wherever it is: gemma's template has no system role."""
    gemma = load_tokenizer(Path(__file__).parent / "golden" / "tokenizers" / "gemma")
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    files = {"task": write(tmp_path / "task.jsonl", good(30))}
    other = [json.dumps({"prompt": f"other {i}", "completion": "a"}).encode() for i in range(30)]
    files[part] = write(tmp_path / "bad.jsonl", [*other, json.dumps({"messages": turns}).encode()])
    data = Data(T=64, held_out=0, max_bad_rows=0.1, **{name: str(file) for name, file in files.items()})
    read = lambda **changes: tuning_rows(dataclasses.replace(data, **changes), 0, gemma, 10**6, CONFIG)  # noqa: E731
    line = said(read, "System role not supported")
    assert line.startswith(f"{files[part]}:31: chat template ")
    capsys.readouterr()
    task, sft = read(bad_rows="skip")
    assert f"--data.bad-rows skip: 1 of {31 if part == 'task' else 61} rows left out" in capsys.readouterr().err
    assert (sft.examples, bool(sft.valid), len(task.test)) == (30, part == "valid", 30 * (part == "test"))


# --- whole files ---

ZSTD = pyarrow.Codec("zstd").compress
FILES = {  # name: (bytes, words)
    "empty.jsonl": (b"", ("empty.jsonl: no rows", "expected at least one")),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', ("cut.jsonl:2: not valid JSON", "correct or drop it")),
    "header.csv": (b"text\n", ("header.csv: no rows", "expected at least one")),
    "twice.csv": (b"text,text\na,b\n", ("twice.csv:1: duplicate column 'text'", "rename one")),
    "cells.csv": (b"text,b\nx,1\ny,2,3\n", ("cells.csv:3: 3 cells", "expected 2")),
    "field.csv": (b"body\nx\n", ("field.csv:2: no field 'text', only ['body']", "rename one, or drop the row")),
    "utf16.csv": ("text\nx\n".encode("utf-16-le"), ("utf16.csv:1: a NUL byte", "iconv -f utf16")),
    "latin.txt": ("un\ncaf\u00e9\n".encode("latin-1"), ("latin.txt:2: not UTF-8 (byte 0xe9 at offset 6)", "iconv")),
    "nul.txt": (b"one\ntwo\0", ("nul.txt:2: a NUL byte at offset 7", "leave a binary file out")),
    "blank.txt": (b" \n", ("blank.txt: no text in it", "at least one document")),
    "one.json": (b'{"text": "x"}', ("one.json: an object with", "expected one JSON array of objects")),
    "twice.json": (b'[{"text": "x", "text": "y"}]', ("twice.json:1", "duplicate key 'text'")),
    "half.parquet": (b"PAR1", ("half.parquet: not readable as parquet", "check the file")),
    "x.pkl": (b"(dp0\n.", ("x.pkl: arrays or a pickle, which can run code", "expected a text file")),
    "x.pt": (b"PK\3\4", ("x.pt: arrays or a pickle", "expected a text file")),
    "x.npy": (b"\x93NUMPY", ("x.npy: arrays or a pickle", "expected a text file")),
    "x.tar": (b"../evil", ("x.tar: an archive", "unpack it first (none is unpacked here)")),
    "x.TAR.gz": (b"../evil", ("x.TAR.gz: an archive", "unpack it first (none is unpacked here)")),
    "cut.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
        ("cut.jsonl.gz: cannot be decompressed", "truncated or damaged"),
    ),
    "flip.txt.gz": (
        gzip.compress(b"a b c\n")[:-8] + b"12345678",
        ("flip.txt.gz: cannot be decompressed", "fetch it again"),
    ),
    "cut.txt.zst": (ZSTD(b"a b c\n" * 99).to_pybytes()[:-9], ("cut.txt.zst: cannot be decompressed", "fetch it again")),
    "none.txt.GZ": (b"hello\n", ("none.txt.GZ: named .gz, but its first bytes are not", "rename it")),
    "bad.jsonl.gz": (gzip.compress(b'{"text": "a"}\n[]\n'), ("bad.jsonl.gz:2: an empty list",)),
    "zip.txt": (b"PK\3\4 and so on", ("zip.txt: a zip archive", "not text", "leave it out")),
    "zip.jsonl": (b"PK\3\4 and so on", ("zip.jsonl: a zip archive", "not text", "leave it out")),
    "two.txt.gz": (gzip.compress(gzip.compress(b"a")), ("two.txt.gz: gzip inside gzip", "unpack it")),
    "rows.txt": (b'{"text": "a"}\n{"text": "b"}\n', ("rows.txt: its lines are JSON objects", "name it .jsonl")),
    "cells.tsv": (b"text\tb\nx,1\n", ("cells.tsv:2: 1 cells", "expected 2, as in the header")),
    "lines.json": (b'{"text": "a"}\n{"text"', ("lines.json:2: not valid JSON", "one JSON object per line")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, tmp_path):
    raw, words = FILES[name]
    (tmp_path / name).write_bytes(raw)
    said(lambda: list(documents(str(tmp_path / name))), *words)
    if name.endswith((".pkl", ".tar", ".npy")):  # not for tuning either
        said(lambda: list(rows(str(tmp_path / name))), "has no rows", ".jsonl, .ndjson, .json, .csv, .tsv, .parquet")


def test_no_file_is_named(tmp_path):
    said(lambda: list(documents(f"{tmp_path}/*.jsonl")), "*.jsonl: the pattern matches no file", "check it")
    said(lambda: list(documents(str(tmp_path))), "the folder holds no files", "expected a folder")
    said(lambda: list(documents("x" * 5000)), "File name too long", "expected a file or folder")


def test_line_ends_a_mark_and_an_escaped_nul_stay_what_they_are(tok, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n\\u0000"}\r\n{"text": "b"}\r\n')
    assert [d.text for d in documents(str(path))] == ["a\r\n\0", "b"]
    assert tok.decode(tok.encode("a\r\n\0\ufeff")) == "a\r\n\0\ufeff"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert [d.text for d in documents(str(tmp_path / "a.txt"))] == ["a\r\nb\r\n"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_a_real_latin1_file():
    path = SHARED / "snips" / "train_PlayMusic_full.json"
    said(lambda: next(documents(str(path))), f"{path}:", "not UTF-8 (byte 0x", "iconv -f latin1")


def test_tuning_reads_what_pretraining_reads(tok, tmp_path, monkeypatch):
    """Folders, patterns, several files, packed ones and the hub, for `--data` as for a domain."""
    parts = [good(40)[at : at + 20] for at in (0, 20)]
    (tmp_path / "some").mkdir()
    write(tmp_path / "some" / "a.jsonl", parts[0])
    (tmp_path / "some" / "b.JSONL.gz").write_bytes(gzip.compress(b"\n".join(parts[1])))
    (tmp_path / "notes").write_text("x")
    table = [json.loads(row) for row in good(40)]
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: table if name == "org/set" else [])
    whole = tuned(write(tmp_path / "whole.jsonl", good(40)), tok)[1].digest
    some = str(tmp_path / "some")
    for task in (some, f"{some}/*", f"{some}/a.jsonl,{some}/b.JSONL.gz", "hub:org/set", "hub:org/set@test"):
        assert tuned(task, tok)[1].digest == whole, task
    said(lambda: tuned("clink150", tok), "no task and no file 'clink150'; did you mean clinc150?")
    said(lambda: tuned("snips,clinc150", tok), "snips: no such file or folder")
    said(lambda: tuned(f"{tmp_path}/no", tok), "/no: no such file or folder")
    said(lambda: tuned(tmp_path / "notes", tok), "notes: has no rows", "hub:owner/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    said(lambda: tuned("hub:org/set", tok), "a folder org/set exists here too", "give that folder itself")


@pytest.mark.parametrize(
    ("text", "name", "metric"),
    [
        ("snips", "snips", ""),
        ("snips@slot_f1", "snips", "slot_f1"),
        ("hub:org/set@test", "hub:org/set@test", ""),
        ("hub:org/set@test@exact_match", "hub:org/set@test", "exact_match"),
    ],
)
def test_a_metric_behind_a_task(text, name, metric):
    assert TaskEvaluator.split_metric(text) == (name, metric)


def corpus(folder, work, **changes):
    data = Data(domains=(("d", str(folder), 1.0),), T=16, vocab=300, held_out=0.3, cache="", **changes)
    return corpus_and_tokenizer(data, 0, work)


def test_pretraining_leaves_out_files_and_rows(tmp_path, capsys):
    folder = tmp_path / "docs"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:40]):
        (folder / f"{i}.txt").write_text(text)
    clean = corpus(folder, tmp_path)[0].digest
    (folder / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin-1"))
    write(folder / "z.jsonl", [b'{"text": 3}', b"null"])
    said(lambda: corpus(folder, tmp_path), "latin.txt:1: not UTF-8")
    capsys.readouterr()
    assert corpus(folder, tmp_path, bad_rows="skip", max_bad_rows=0.1)[0].digest == clean
    assert "--data.bad-rows skip: 3 of 43 rows left out, 0 repaired" in capsys.readouterr().err
    assert corpus(folder, tmp_path, bad_rows="repair", max_bad_rows=0.1)[0].digest != clean
    assert "--data.bad-rows repair: 1 of 43 rows left out, 2 repaired" in capsys.readouterr().err
    said(lambda: corpus(folder, tmp_path, bad_rows="skip"), "3 of 43 rows left out", "--data.max-bad-rows 0.01")


# --- what is held out is not trained on ---


def test_held_out_documents_inside_the_training_data(tmp_path, capsys):
    folder = tmp_path / "docs"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:40]):
        (folder / f"{i}.txt").write_text(text)
    held = next(p for p in sorted(folder.iterdir()) if is_held_out(f"docs/{p.name}", 0.3))
    free = next(f"copy{i}.txt" for i in range(99) if not is_held_out(f"docs/copy{i}.txt", 0.3))
    before, _ = corpus(folder, tmp_path)
    (folder / free).write_text(held.read_text())
    after, _ = corpus(folder, tmp_path)
    assert after.dropped == {"d": 1}
    assert after.tokens == before.tokens
    assert "left out of training: 1 that are held out too" in capsys.readouterr().err


def test_held_out_rows_inside_the_training_data(tok, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", good())
    held = file_task(path, 0.2).valid[0]
    other = next(
        s for s in (held["prompt"] + " " * i for i in range(1, 99)) if not is_held_out(f"0/{json.dumps(s)}", 0.2)
    )
    write(path, [*good(), json.dumps({"prompt": other, "completion": "x"}).encode()])
    task, _ = tuned(path, tok)
    assert task.dropped == 1
    assert other not in {row["prompt"] for row in task.train}
    assert "left out of training: 1 that are held out too" in capsys.readouterr().err


# --- nothing to learn ---


def test_a_batch_without_targets_changes_nothing():
    base, method = make_base(), peft.LoRA(rank=2)
    from graftax.train.optim import make_optimizer
    from graftax.train.step import init_state

    trainable = method.init(jax.random.key(0), base.params)
    state = init_state(trainable, make_optimizer(OPTIM, trainable, 20, method))
    step = jax.jit(lambda s, f, b: train_step(base.model, method, OPTIM)(s, f, b, OPTIM.lr, OPTIM.eps))
    batch = make_batch()
    after, metrics = step(state, base.params, batch | {"weights": jnp.zeros_like(batch["weights"])})
    assert metrics["loss"] == 0
    assert not metrics["ok"]
    assert after.skipped == 1
    same((after.trainable, after.opt_state), (state.trainable, state.opt_state))


# --- the vocabulary ---


def test_an_id_without_a_row_is_refused(tok, tmp_path):
    path = write(tmp_path / "a.jsonl", good())
    words = ("the tokenizer has 300 tokens, but the base has 299 rows", "give the tokenizer that the base was trained")
    said(lambda: tuned(path, tok, V=299), *words)
    said(lambda: tok.decode([300]), "token id 300: outside the vocabulary of 300", "wrong tokenizer?")


def test_gaps_between_ids_count(tmp_path):
    """A vocabulary of three tokens whose last id is 70,000 needs 70,001 rows, and more than 16 bits."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    model = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "?": 1}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>"])
    state = json.loads(model.to_str())
    state["added_tokens"][0]["id"] = state["model"]["vocab"]["</s>"] = 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "?"}')
    tok = load_tokenizer(tmp_path)
    assert tok.vocab_size == 70_001
    assert np.flatnonzero(tok.has_token(70_009)).tolist() == [0, 1, 2, 70_000]
    assert tokenize([Document("x", "a b")], tok).flat.tolist() == [2, 0, 70_000, 2]


def test_ids_of_65535_and_more_are_whole():
    for size in (1 << 16, (1 << 16) + 1):
        big = SimpleNamespace(vocab_size=size, bos=1, eos=2, encode_batch=lambda texts, last=size - 1: [[last]])
        assert tokenize([Document("a", "x")], big).flat.tolist() == [1, size - 1, 2]


def test_another_tokenizer_of_equal_size(tok, tmp_path):
    other = train_tokenizer([text[::-1] for text in TEXTS], tmp_path, 300)
    assert other.vocab_size == tok.vocab_size
    check_tokenizer(tok, tok.digest, tmp_path)
    words = ("tokenizer.model is not the tokenizer of this run", tok.digest[:12], "restore the old file")
    said(lambda: check_tokenizer(other, tok.digest, tmp_path), str(tmp_path), *words)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_truncated_tokenizer(kind, tok, tmp_path):
    golden = Path(__file__).parent / "golden" / "tokenizers" / "llama3" / "tokenizer.json"
    data = tok.data if kind == "model" else golden.read_bytes()
    path = tmp_path / f"tokenizer.{kind}"
    what = "not a whole SentencePiece model" if kind == "model" else "not valid JSON"
    for part in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:part])
        said(lambda: load_tokenizer(tmp_path), f"{path}: {what}")


# --- config.json ---

CONFIGS = {  # what is in the file: words
    '{"stps": 3}': ("unknown key 'stps'; did you mean steps?",),
    '{"data": {"bach": 3}}': ("data: unknown key 'bach'; did you mean batch?",),
    '{"method": {"name": "lorra"}}': ("unknown method 'lorra'; did you mean lora?",),
    '{"method": {"name": "lora", "rnk": 3}}': ("method lora: unknown key 'rnk'; did you mean rank?",),
    '{"method": {"name": "lora", "rank": "8"}}': ("method lora: 'rank' is '8'", "a whole number is wanted"),
    '{"method": ["lora"]}': ("method is a list", "an object with its name and fields is wanted"),
    '{"method": {"chain": []}}': ("chain is []", "a list of methods is wanted"),
    '{"steps": "3"}': ("'steps' is '3'", "a whole number is wanted"),
    '{"steps": 3.5}': ("'steps' is 3.5", "a whole number is wanted"),
    '{"steps": true}': ("'steps' is True", "a whole number is wanted"),
    '{"steps": 1e400}': ("'steps' is inf", "a whole number is wanted"),
    '{"tensorboard": [1]}': ("'tensorboard' is [1]", "true or false is wanted"),
    '{"base": null}': ("'base' is None", "text is wanted"),
    '{"phase": "tune"}': ("'phase' is 'tune'", "one of 'pretrain', 'finetune' is wanted"),
    '{"mesh": [1, "a", 1]}': ("'mesh' is [1, 'a', 1]", "a list of a whole number each is wanted"),
    '{"data": {"domains": [["a", "b"]]}}': ("'domains' is [['a', 'b']]", "[text, text, a finite number]"),
    '{"data": {"domains": [["../a", "b", 1]]}}': ("the name '../a'", "letters, digits"),
    '{"data": {"T": 1}}': ("--data.T 1", "wanted 2 or more"),
    '{"data": {"batch": 0}}': ("--data.batch 0", "wanted 1 or more"),
    '{"data": {"bad_rows": "ignore"}}': ("'bad_rows' is 'ignore'", "one of 'error', 'skip', 'repair' is wanted"),
    '{"optim": {"lr": NaN}}': ("optim: 'lr' is nan", "a finite number is wanted"),
    '{"optim": {"lr": -1}}': ("optim: --optim.lr -1", "wanted 0 or more"),
    '{"optim": {"b2": 1}}': ("optim: --optim.b2 1", "below 1"),
    '{"optim": {"groups": [[".*", -1]]}}': ("optim: --optim.groups .* -1", "wanted 0 or more"),
    '{"optim": 3}': ("optim: a int", "an object of keys and values is wanted"),
    '{"model": {"V": 8}}': ("model: has no 'D'", "a whole number is wanted"),
    '{"model": {"rope": 3}}': ("model.rope: a int", "an object"),
    '{"steps": 1, "steps": 2}': ("duplicate key 'steps'",),
    '{"out": "\\ud800"}': ("not readable as JSON", "surrogates not allowed"),
    '{"steps": 1': ("not readable as JSON",),
    "[" * 99_999: ("not readable as JSON",),
    "[]": ("holds a list", "an object is wanted"),
    "": ("not readable as JSON",),
    "\xff": ("not readable as JSON", "can't decode byte 0xff"),
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:40])
def test_a_bad_config_is_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    assert said(lambda: from_json(path), *CONFIGS[text]).startswith(f"{path}: ")


def test_good_configs_are_read(tmp_path):
    for cls in peft.methods.values():
        assert method_from_dict(json.loads(json.dumps(method_to_dict(cls()))), "here") == cls()
    run = Run(model=make_base().config, data=Data(domains=(("a.b-c", "x", 1),)))
    (tmp_path / "config.json").write_text(to_json(run))
    assert from_json(tmp_path / "config.json") == run


# --- numbers: every field of everything that is made of flags ---


def checked():
    """Every class whose fields are checked, methods included."""
    for name in ("commands", "runs.commands", "demo", "experiments.compare", "experiments.decide"):
        module = importlib.import_module(f"graftax.train.{name}")
        commands = [c for c in vars(module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
        assert [c for c in commands if hasattr(c, "run") and not issubclass(c, Checked)] == []
    kinds, found = [Checked], []
    while kinds:
        kinds += (new := kinds.pop().__subclasses__())
        found += [cls for cls in new if cls.__module__.startswith("graftax.")]
    return [*found, *peft.methods.values()]


def filled(hint, x):
    """A value of a type with x for every number in it."""
    if get_origin(hint) is tuple:
        return tuple(filled(one, x) for one in get_args(hint) if one is not Ellipsis)
    return x if hint in (int, float, int | None) else Run(steps=1) if hint is Run else "a>=1"


def test_no_number_and_no_text_is_taken_unchecked():
    """A field without bounds of its own takes finite numbers of 0 or more; a new field is tested without an edit."""
    seen = 0
    for cls in checked():
        hints, flags = get_type_hints(cls), getattr(cls, "FLAGS", "--method.")
        needed = {f.name: ("a", "b") if get_origin(hints[f.name]) is tuple else filled(hints[f.name], 2)
                  for f in dataclasses.fields(cls)
                  if f.default is f.default_factory is dataclasses.MISSING}  # fmt: skip
        for name, bounds in bounds_of(cls).items():
            bad = [math.nan, math.inf, -math.inf, 1e39] if "float" in str(hints[name]) else [2**63, -(2**63)]
            bad += [] if bounds.low < 0 else [-1]
            bad = bad if filled(hints[name], 0) != filled(hints[name], 1) else ["\ud800", "\0"] * (hints[name] is str)
            for x in bad:
                value = x if isinstance(x, str) else filled(hints[name], x)
                said(lambda: cls(**needed | {name: value}), f"{flags}{name.replace('_', '-')} ", ": wanted ")  # noqa: B023
                seen += 1
    assert seen > 850


NUMBERS = {  # arguments: words
    "pretrain embedded --seed 4294967296": ("--seed 4294967296: wanted 0 to 4294967295",),
    "pretrain embedded --optim.b2 0.99999999999": ("--optim.b2 0.99999999999: wanted 0 or more, below 1",),
    "pretrain embedded --optim.eps 0": ("--optim.eps 0.0: wanted a finite number of 1e-30 or more",),
    "pretrain embedded --optim.end 1.5": ("--optim.end 1.5: wanted 0 to 1",),
    "pretrain embedded --optim.warmup 2.5": ("--optim.warmup 2.5: wanted whole steps",),
    "pretrain embedded --optim.groups .*bias nan": ("--optim.groups .*bias nan: wanted a finite number",),
    "pretrain embedded --data.T 65536 --data.batch 65536": ("--data.batch 65536 x --data.T 65536: wanted 2147483647",),
    "pretrain embedded --mesh 1 -2 1": ("--mesh -2: wanted -1 or more",),
    "pretrain embedded --model.rope.theta 0": ("--model.rope.theta 0.0: wanted a finite number above 0",),
    "finetune sft --method lora --method.rank 70000": ("lora: --method.rank 70000: wanted 1 to 65536",),
    "finetune sft --method loraplus --method.ratio 0": ("loraplus: --method.ratio 0.0: wanted",),
    "finetune sft --epochs 0": ("--epochs 0.0: wanted a finite number above 0",),
    "finetune sft --base caf\udce9": (r"the argument 'caf\udce9' is not UTF-8", "rename"),
    "generate x --prompt \udcff": (r"the argument '\udcff' is not UTF-8",),
    "generate x --top-p 0": ("--top-p 0.0: wanted above 0, at most 1",),
    "generate x --temperature 1e-9": ("--temperature 1e-09: wanted 0 (greedy), or 1e-5 or more",),
    "generate x --seed -1": ("--seed -1: wanted 0 to 4294967295",),
    "export x --out y --shard-gb 0": ("--shard-gb 0.0: wanted a finite number above 0",),
    "import x --out y --resize 99999999": ("--resize 99999999: wanted 0 to 16777216",),
    "decide --task T --target a>=1 --steps 9 --sizes 0": ("--sizes 0: wanted 1 or more",),
    "compare --task T --methods lora,ia3 --factors nan --steps 9": ("--factors nan: wanted",),
}  # fmt: skip


@pytest.mark.parametrize("args", NUMBERS)
def test_a_number_or_text_is_refused_by_its_flag(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("graftax: ")
    assert not [word for word in NUMBERS[args] if word not in line], line


MEANT = {  # arguments: what is asked back
    "finetune sft --lr 1": "--optim.lr", "finetune sft --learning-rate 1": "--optim.lr", "demo --lrr 1": "--lr",
    "finetune sft --weight_decay 1": "--optim.weight-decay", "finetune sft --optim.lrr 1": "--optim.lr",
    "finetune sft --batch-size 1": "--data.batch", "finetune sft --per-device-train-batch-size 1": "--data.batch",
    "finetune sft --rank 1": "--method lora --method.rank", "finetune sft --method lora --rank 1": "--method.rank",
    "finetune sft --method lora --method.r 1": "--method.rank", "finetune sft --r 1": "--method lora --method.rank",
    "finetune sft --method lora --lora-alpha 1": "--method.alpha", "finetune sft --max-seq-length 1": "--data.T",
    "finetune sft --method lora --method.target-modules q": "--method.where", "finetune sft --output-dir x": "--out",
    "finetune sft --model-name-or-path x": "--base", "finetune sft --num-train-epochs 1": "--epochs",
    "finetune sft --gradient-accumulation-steps 1": "--accumulate", "finetune sft --warmup-ratio 1": "--optim.warmup",
    "finetune sft --load-in-4bit": "--quantize nf4", "finetune sft --bf16": "--dtype bfloat16",
    "finetune sft --datta x": "--data", "generate x --max-new-tokens 1": "--new", "sweep sft --overr x": "--over",
    "sweep sft --base x --over lr=1,2": "optim.lr", "compare --task T --methods lora,ia3 --factorz 3": "--factors",
    "finetune sft --method LoRA": "lora", "finetune sft --method rs_lora": "rslora", "finetune stf": "sft",
    "finetune lora": "finetune sft --method lora", "train": "pretrain or finetune", "finetun": "finetune",
    "masks tiny --where q_proj,v_proj": "layers/attn/q,layers/attn/v", "masks tiny --where Norms": "norms",
    "masks tiny --where .*.(gate_proj|up_proj)": "layers/mlp/gate,layers/mlp/up", "masks tniy": "tiny",
}  # fmt: skip


@pytest.mark.parametrize("args", MEANT)
def test_what_was_meant_is_asked_back(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"; did you mean {MEANT[args]}?" in line, line


@pytest.mark.parametrize("base", ["runs/embeded", "./rnus/Embedded"])
@pytest.mark.parametrize("args", ["finetune sft --data x.jsonl --base", "eval", "plan sft --base", "masks"])
def test_a_misspelt_folder_is_not_looked_for_on_the_hub(args, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("the network was tried"))
    (tmp_path / "runs" / "embedded").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main([*args.split(), base])
    assert "; did you mean runs/embedded?" in capsys.readouterr().err.splitlines()[-1]
    assert not did_you_mean_folder("runs/embedded-2")  # names of models differ by numbers


def test_what_does_not_fit_the_steps(base):
    said(lambda: lr_schedule(Optim(warmup=20), 20), "--optim.warmup 20: wanted fewer than the 20 steps")
    assert lr_schedule(Optim(warmup=19, schedule="wsd", decay=0), 20)(19) == pytest.approx(1e-3)
    method = peft.AdaLoRA(rank=13, init_rank=12)
    begun = jax.eval_shape(lambda: method.init(jax.random.key(0), base.params))
    tx = make_optimizer(Optim(), begun, 20, method)
    said(lambda: tx.init(begun), "--method.rank 13 is above the 12 ranks", "raise --method.init-rank")
    begun = {"x": {"e": jnp.zeros((2, 12))}}  # two layers
    peft.AdaLoRA(rank=12).update_transform(20).init(begun)


def test_numbers_of_the_harness_and_of_a_rope():
    for asked, words in (
        ({"temperature": math.nan}, "--temperature nan: wanted"), ({"temperature": "hot"}, "temperature='hot': a "),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0 with do_sample"), ({"top_p": 0}, "--top-p 0: wanted"),
        ({"top_k": -1}, "top_k=-1: a whole number"), ({"top_k": 2.5}, "top_k=2.5: a whole number"),
    ):  # fmt: skip
        said(lambda: harness._sampling(asked), words)  # noqa: B023
    assert harness._sampling({"do_sample": True}).temperature == 1
    assert harness._sampling({"top_k": None, "temperature": None}).temperature == 0
    said(lambda: harness._whole("max_gen_toks", 0, 1), "max_gen_toks=0: a whole number from 1")
    assert harness._whole("batch_size", "4", 1) == 4
    rope = Rope(kind="llama3", original=32, low=4.0, high=4.0)  # the blend between the two divides by their difference
    said(lambda: make_base(rope=rope), "rope of kind llama3: low 4.0 must be below high 4.0")
    assert nearest_divisor(48, 2**31 - 1) == 48, "at once"


@pytest.mark.parametrize("value", ["", "x", "-1", "0", "nan", "1e9", "99999999", "1.5"])
def test_seconds_of_the_environment(value, monkeypatch):
    monkeypatch.setenv("GRAFTAX_WAIT", value)
    said(processes.startup_timeout, f"GRAFTAX_WAIT='{value}'", "wanted whole seconds, 1 to 86400")
    said(lambda: processes.parse_processes("host:70000,2,0"), "wanted ADDRESS:PORT,N,I")


# --- the command line: exit code 2, one line, nothing written ---


def test_by_the_command_line(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"steps": "3"}')
    (tmp_path / "in" / "a.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "in" / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text"')
    out = tmp_path / "out"
    run = ["pretrain", "embedded", "--out", str(out), "--mesh", "8", "1", "1", "--data.domains", "d"]
    for args, words in (
        ([*run, str(tmp_path / "in" / "a.txt"), "1"], ("a.txt:1: not UTF-8", "iconv")),
        ([*run, str(tmp_path / "in" / "b.jsonl"), "1"], ("b.jsonl:2: not valid JSON", "correct or drop it")),
        ([*run, str(tmp_path / "none*"), "1"], ("none*: the pattern matches no file",)),
        ([*run, "x.txt", "1", "--optim.lr", "-1"], ("--optim.lr -1",)),
        ([*run, "x.txt", "1", "--optim.lr", "nan"], ("--optim.lr nan",)),
        ([*run, "x.txt", "1", "--data.bad-rows", "ignore"], ("--data.bad-rows", "error", "skip", "repair")),
        ([*run, "x.txt", "1", "--data.max-bad-rows", "2"], ("--data.max-bad-rows 2", "0 to 1")),
        (
            ["pretrain", str(tmp_path / "in" / "config.json")],
            ("config.json: 'steps' is '3'", "a whole number is wanted"),
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        line = err.splitlines()[-1]
        assert line.startswith("graftax: ")
        assert "Traceback" not in err
        assert not [word for word in words if word not in line], line
        assert not out.exists()
