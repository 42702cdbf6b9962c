"""Files that somebody else made (docs/faults.md, Safety): nothing runs, nothing is read or written elsewhere."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from graftax.data.documents import Document
from graftax.data.mixture import HeldOut
from graftax.data.pack import empty_row, tokenize
from graftax.data.sft import sft_rows
from graftax.data.sources import documents
from graftax.data.tasks import tasks
from graftax.data.tokenizers import chat, load_tokenizer
from graftax.model import pattern
from graftax.model.hf.files import read_header, read_index, shard_names
from graftax.model.hf.hub import fetch_checkpoint
from graftax.peft import hf as adapters
from graftax.train import cli
from graftax.train.caches import cache_folder
from graftax.train.cli import main
from graftax.train.config import Run, to_json
from graftax.train.inputs import load_held_out, save_held_out
from test_data_tasks import public  # noqa: F401
from test_faults_input import said, tok  # noqa: F401
from test_peft_hf import CONFIG, FILE, Q, base, changed

pytestmark = pytest.mark.faults
TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"


class Trap:
    """What a pickle runs when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- names that lead elsewhere ---


def test_a_link_out_of_a_folder(tmp_path):
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "same.txt").symlink_to("a.txt")
    assert [d.text for d in documents(str(folder))] == ["a", "a"]
    link = folder / "b.txt"
    link.symlink_to("../secret")
    said(
        lambda: list(documents(str(folder))),
        f"{link}: a link to ../secret, which is outside the folder",
        "copy it into the folder",
    )
    assert len(list(documents(f"{folder}/*.txt"))) == 3  # asked for by a pattern
    link.unlink()
    link.symlink_to("gone")
    said(lambda: list(documents(str(folder))), f"{link}: a link to gone, which is missing", "expected a file")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", "x.pkl", "x.bin"]
)
def test_an_index_that_names_a_file_elsewhere(name, tmp_path):
    listed = tmp_path / "model.safetensors.index.json"
    listed.write_text(json.dumps({"weight_map": {"a": name}}))
    words = (f"{listed}: names the file {name!r}", "wanted the plain name of a .safetensors file in its folder")
    said(lambda: shard_names(listed), *words)
    said(lambda: read_index(tmp_path), *words)


def test_names_in_an_archive_are_not_followed(public, tmp_path):  # noqa: F811
    with zipfile.ZipFile(public / "e2e_nlg" / "e2e-dataset.zip", "a") as archive:
        archive.writestr("../../evil.csv", "mr,ref\n")
        archive.writestr("/evil.csv", "mr,ref\n")
    before = sorted(p for p in tmp_path.parent.rglob("*"))
    assert len(tasks["e2e_nlg"](public).train) == 2
    assert sorted(p for p in tmp_path.parent.rglob("*")) == before
    assert not Path("/evil.csv").exists()


# --- what could run ---


def test_no_pickle_is_read(tmp_path):
    trap, here = tmp_path / "trap", tmp_path / "in"
    here.mkdir()
    for name in ("pytorch_model.bin", "adapter_model.bin", "x.pkl"):
        (here / name).write_bytes(pickle.dumps(Trap(trap)))
    (here / CONFIG).write_text("{}")
    said(lambda: read_index(here), ".bin is a pickle, which runs code when it is read", "safe_serialization")
    said(lambda: adapters.read_tensors(here), ".bin is a pickle, which can run code", "safe_serialization=True")
    said(lambda: list(documents(str(here / "x.pkl"))), "x.pkl: arrays or a pickle", "expected a text file")
    array = np.array([Trap(trap)], object)
    for kind, made in (("object", {"d/ids": array}), ("of", {"d/ids": np.zeros((1, 2)), "d/of": array})):
        np.savez(here / f"{kind}.npz", **made)
        words = ("not the held-out rows of a base", "pickles", "copy it from the original base")
        said(lambda kind=kind: load_held_out(here / f"{kind}.npz"), f"{kind}.npz", *words)
    assert not trap.exists()


def test_a_cache_with_objects_is_not_read(tok, tmp_path):  # noqa: F811
    docs = [Document("a", "question")]
    tokenize(docs, tok, tmp_path / "cache")
    folder = next((tmp_path / "cache").iterdir())
    np.save(folder / "offsets.npy", np.array([Trap(tmp_path / "trap")], object), allow_pickle=True)
    said(
        lambda: tokenize(docs, tok, tmp_path / "cache"),
        f"{folder}: the cached tokens are damaged",
        "delete this folder",
    )
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(("template", "why"), [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after 0.3 seconds"),
    ("{{ 'a' * 10 ** 10 }}", "too much memory"),
    ("{{ ''.__class__.__mro__ }}", "reaches for what a template may not"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "reaches for what a template may not"),
    ("{% include '/etc/passwd' %}", "no loader"),
])  # fmt: skip
def test_a_template_has_no_way_out(template, why, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3 if "seconds" in why else 30)
    monkeypatch.setattr(chat, "MEMORY", 1 << 28)
    hostile = dataclasses.replace(load_tokenizer(TOKENIZERS / "qwen"), template=template)
    said(lambda: sft_rows([("f:1", {"prompt": "a", "completion": "b"})], hostile, 32, 0), "chat template", why)


# --- damaged files ---

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {  # a safetensors file: (header, bytes of arrays)
    "no length": (None, 0),
    "longer than the file": (b" " * 8, -1),
    "a list": (b"[]", 0),
    "no JSON": (b"{'a'}", 0),
    "latin-1": (b'{"\xff": 1}', 0),
    "nested": (b"[" * 99_999, 0),
    "twice": (b'{"a": %b, "a": %b}' % ((json.dumps(ROW).encode(),) * 2), 8),
    "outside": (json.dumps({"a": ROW | {"data_offsets": [8, 16]}}).encode(), 8),
    "over another": (json.dumps({"a": ROW, "b": ROW}).encode(), 8),
    "a negative shape": (json.dumps({"a": ROW | {"shape": [-2]}}).encode(), 8),
    "2**64 numbers": (json.dumps({"a": ROW | {"shape": [1 << 62, 4]}}).encode(), 8),
    "no type": (json.dumps({"a": ROW | {"dtype": "PICKLE"}}).encode(), 8),
    "a cut end": (json.dumps({"a": ROW}).encode(), 7),
    "more behind it": (json.dumps({"a": ROW}).encode(), 9),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_bad_header(name, tmp_path):
    head, size = HEADERS[name]
    length = 1 << 60 if size < 0 else len(head or b"")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 4 if head is None else struct.pack("<Q", length) + head + bytes(max(size, 0)))
    said(lambda: read_header(path), f"{path}: not a whole safetensors file (", "fetch it again")


def arrays(**changes):
    raw = io.BytesIO()
    rows = {f"d/{k}": np.stack([v, v]) for k, v in empty_row(8).items()}
    np.savez(raw, **({k: v for k, v in (rows | {"d/of": np.array([9.0, 2.0])} | changes).items() if v is not None}))
    return raw.getvalue()


HELD_OUT = {
    "empty": b"",
    "garbage": b"garbage",
    "cut": arrays()[:-60],
    "a flipped bit": bytes(x ^ (i == 90) for i, x in enumerate(arrays())),
    "no weights": arrays(**{"d/weights": None}),
    "no size": arrays(**{"d/of": None}),
    "another shape": arrays(**{"d/targets": np.zeros((2, 7), np.int32)}),
    "another type": arrays(**{"d/ids": np.zeros((2, 8))}),
    "an array alone": b"\x93NUMPY\x01\x00v\x00",
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_damaged_held_out_rows(name, tmp_path):
    path = tmp_path / "held_out.npz"
    path.write_bytes(HELD_OUT[name])
    said(lambda: load_held_out(path), f"{path}: not the held-out rows of a base (", "or delete it")


def test_domains_with_one_name_inside_another_stay_apart(tmp_path):
    rows = {name: [empty_row(8, i)] for i, name in enumerate(("a", "a.b", "a.b.c"))}
    save_held_out(tmp_path / "h.npz", {k: HeldOut(v, 3, 1.0) for k, v in rows.items()} | {"none": HeldOut([], 0, 0.0)})
    found = load_held_out(tmp_path / "h.npz")
    assert {name: int(one.rows[0]["row"]) for name, one in found.items()} == {"a": 0, "a.b": 1, "a.b.c": 2}


STRANGE = {  # tokenizer_config.json or tokenizer.json (fuzzing found these): words
    '{"eos_token": "\\ud800"}': ("tokenizer_config.json: not valid JSON", "surrogates not allowed"),
    '{"additional_special_tokens": 3}': ("names no eos token",),
    '{"chat_template": [{"name": []}]}': ("expected one named default",),
    '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}': ("tokenizer.json: not a",),
}


@pytest.mark.parametrize("text", STRANGE)
def test_a_strange_tokenizer(text, tmp_path):
    name = "tokenizer.json" if "model" in text else "tokenizer_config.json"
    shutil.copytree(TOKENIZERS / "llama3", tmp_path / "t")
    old = json.loads((tmp_path / "t" / name).read_text())
    keep = old if name == "tokenizer.json" else {"added_tokens_decoder": None}
    (tmp_path / "t" / name).write_text(json.dumps(keep)[:-1] + ", " + text[1:])
    said(lambda: load_tokenizer(tmp_path / "t"), *STRANGE[text])


# --- caches ---


def test_a_cache_is_the_users_own(tmp_path, monkeypatch, capsys):
    """Made private, in the user's folder, whatever the current one holds; what others could write is not used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache" / "jax").mkdir(parents=True)  # a repository that brings programs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    before = os.umask(0o002)
    folder = cache_folder("jax")
    os.umask(before)
    assert folder == tmp_path / "xdg" / "graftax" / "jax"
    assert [oct(path.stat().st_mode)[-3:] for path in (folder.parent, folder)] == ["700", "700"]
    assert cache_folder("data", "") is None
    assert cache_folder("data", "mine") == Path("mine")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as its specification has it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("data") == tmp_path / "home" / ".cache" / "graftax" / "data"
    (tmp_path / "file").write_text("")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    foreign = "belongs to another user" if os.geteuid() == 0 else "can be written to by others"
    if os.geteuid() == 0:
        (tmp_path / "shared").chmod(0o755)
        os.chown(tmp_path / "shared", 12345, -1)
    for given, words in (("file", "cannot be made (File exists)"), ("shared", foreign), ("file/x", "cannot be made")):
        assert cache_folder("data", str(tmp_path / given)) is None
        line = capsys.readouterr().err
        assert line.startswith(f"without a cache: {tmp_path / given} {words}")
        assert line.count("\n") == 1
    folder.chmod(0o770)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    asked = []
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr(type(jax.config), "update", lambda self, key, value: asked.append(key))
    monkeypatch.setattr("sys.argv", ["graftax", "lineage", "none"])
    for argv, keys in ((["lineage", "none"], 0), (["eval", "none"], 1)):
        monkeypatch.setattr("sys.argv", ["graftax", *argv])
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        with pytest.raises(SystemExit):
            main()
        assert len(asked) == keys, "no folder of compiled programs, and for the first command no more than that"
    assert "can be written to by others; chmod go-w" in capsys.readouterr().err


def test_a_cache_that_cannot_be_used_is_not_damaged(tok, tmp_path, monkeypatch, caplog):  # noqa: F811
    docs = [Document("a", "some words")]
    wanted = tokenize(docs, tok)
    (tmp_path / "file").write_text("")
    assert (tokenize(docs, tok, tmp_path / "file").flat == wanted.flat).all()
    tokenize(docs, tok, tmp_path / "cache")

    def load(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", load)
    assert (tokenize(docs, tok, tmp_path / "cache").flat == wanted.flat).all()
    assert all(record.message.startswith("without a cache: ") for record in caplog.records)
    assert ["(Not a directory)" in caplog.messages[0], "Permission denied" in caplog.messages[1]] == [True, True]


# --- adapters ---


def renamed(old, new):
    def change(held):
        for name in [n for n in held if old in n]:
            held[name.replace(old, new)] = held.pop(name)

    return change


SLOW = ".|..|...)+[!?]"  # its ways to match n letters grow as 1.8^n
WANTED = "Those that save_pretrained writes are wanted"
ADAPTERS = {  # name: (what is done to its tensors, changed keys, words)
    "missing": (lambda t: t.pop(Q), {}, (f"1 missing: {Q}", WANTED)),
    "extra": (lambda t: t.update(more=np.zeros(2)), {}, ("1 unexpected: more", WANTED)),
    "renamed": (renamed("base_model.model.", ""), {}, ("missing: base_model", "unexpected: model.", WANTED)),
    "by peft's name": (renamed(".weight", ".default.weight"), {}, ("missing", "unexpected", "default.weight", WANTED)),
    "paths": (lambda t: t.update({"a.b": t[Q] * 0, "a/b": t[Q] * 0, "../x": t[Q] * 0}), {}, ("../x, a.b, a/b", WANTED)),
    "shape": (lambda t: t.update({Q: np.zeros((3, 7))}), {}, ("1 of another shape", "[3, 7] (wanted [3, 16])")),
    "whole numbers": (lambda t: t.update({Q: t[Q].astype(np.int32)}), {}, (f"{Q} is int32", "floats are wanted")),
    "NaN": (lambda t: t.update({Q: t[Q] * np.nan}), {}, (f"{Q} holds NaN or infinity", "take an earlier one")),
    "rank": (None, {"r": "8"}, ("r is '8'", "a whole number of 1 or more is wanted")),
    "rank 0": (None, {"r": 0}, ("r is 0", "a whole number of 1 or more is wanted")),
    "alpha": (None, {"lora_alpha": float("nan")}, ("lora_alpha is nan", "a finite number is wanted")),
    "a switch": (None, {"use_dora": "yes"}, ("use_dora is 'yes'", "true or false is wanted")),
    "targets": (None, {"target_modules": [3]}, ("target_modules is [3]", "a pattern or a list of names is wanted")),
    "pattern": (None, {"target_modules": "(q"}, ("target_modules '(q' is not a regular expression",)),
    "endless": (
        None,
        {"target_modules": f"({SLOW}"},
        ("takes more than 0.05 s to match 'model", "a repeat inside a repeat"),
    ),
    "endless key": (None, {"rank_pattern": {f"(?:{SLOW}": 2}}, ("takes more than 0.05 s to match 'model",)),
    "endless list": (None, {"modules_to_save": [f"(?P<a>{SLOW}"]}, ("takes more than 0.05 s to match 'model",)),
    "large": (None, {"target_modules": "((a{1000}){1000}){1000}"}, ("counts of more than 1,000 repeats",)),
    "flags": (
        None,
        {"rank_pattern": {"(?i)q_proj": 2}},
        ("is not a regular expression: global flags not at the start",),
    ),
    "ranks": (None, {"rank_pattern": {"q_proj": -1}}, ("rank_pattern is {'q_proj': -1}", "of 1 or more is wanted")),
    "layers": (None, {"layers_to_transform": "0"}, ("layers_to_transform is '0'", "a layer or a list of layers")),
    "saved": (None, {"modules_to_save": "lm_head"}, ("modules_to_save is 'lm_head'", "a list of names is wanted")),
    "ids": (None, {"trainable_token_indices": [-1]}, ("trainable_token_indices is [-1]", "a list of ids")),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_bad_adapter(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pattern, "TIME_LIMIT", 0.05)
    change, keys, words = ADAPTERS[name]
    config, _, params = base("llama")
    folder = changed("llama_lora", tmp_path / "bad", change, **keys)
    said(lambda: adapters.load(folder, config, params), str(folder / (CONFIG if keys else FILE)), *words)


def test_places_outside_of_a_matrix(tmp_path):
    config, _, params = base("llama")

    def change(held):
        name = next(n for n in held if n.endswith("shira_indices"))
        held[name] = held[name] + 10**6

    folder = changed("llama_shira", tmp_path / "bad", change)
    said(lambda: adapters.load(folder, config, params), "shira_indices: places in a matrix [", "of another base?")


# --- secrets ---


def test_a_token_is_in_no_file_no_message_and_no_help(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "verysecret" not in said(
        lambda: fetch_checkpoint("some/model"), "some/model: no such folder, and as a hub id"
    )
    for command in ("finetune", "pretrain", "import"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    shown = capsys.readouterr()
    assert "verysecret" not in shown.out + shown.err + to_json(Run())
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"verysecret" in p.read_bytes()]
