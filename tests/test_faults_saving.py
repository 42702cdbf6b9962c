"""Faults in checkpoints (docs/faults.md, Runs and checkpoints): kills, damage, full disks, and two writers."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faulty import STEPS, copied, good, last, life, programs, runs, whole  # noqa: F401
from graftax import InputError
from graftax.atomic import atomic_folder, atomic_write, is_leftover
from graftax.peft import LoRA
from graftax.train.cli import main
from graftax.train.config import to_json
from graftax.train.runs import lock
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.load import load_run
from graftax.train.runs.lock import Lock
from graftax.train.runs.train import train
from test_faults_input import said

pytestmark = pytest.mark.faults
HERE = Path(__file__).parent
TREE = {f"layers/{i}/mlp/up": jax.numpy.arange(600.0) * (i + 1) for i in range(3)}


@pytest.fixture(scope="module")
def cut(runs, tmp_path_factory):  # noqa: F811
    """LoRA, crashed in step 21, with checkpoints 12 and 18."""
    run = dataclasses.replace(runs["lora"], out=str(tmp_path_factory.mktemp("cut") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        assert isinstance(life(patch, run, "step@21:fail"), RuntimeError)
    return run


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    with CheckpointWriter(tmp_path / "two") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"trainable": TREE}, {"next_row": step})
    return CheckpointWriter(tmp_path / "two")


# --- kills ---


def test_kill_9_in_saves(tmp_path):
    """20 at random moments, then one at each point: arrays without a manifest, a manifest without a name, ..."""
    run = [sys.executable, str(HERE / "killing.py"), str(tmp_path / "saved"), "20"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["signals"] == [9] * 25
    assert found["found"] == sorted(found["found"]), "what was there stays there"
    before, begin, arrays, manifest, end = found["found"][-5:]
    assert begin == arrays == manifest == before, "no half checkpoint counts"
    assert end == before + 1, "it has its name"


@pytest.mark.full
def test_a_run_killed_between_arrays_and_manifest(runs, whole, tmp_path, monkeypatch):  # noqa: F811
    """A process of its own, on one device; then a second signal in another."""
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"), mesh=(1, 1, 1), steps=14, eval_rows=1)
    (tmp_path / "run.json").write_text(to_json(run))
    go = [sys.executable, "-m", "graftax.train.cli", "finetune", str(tmp_path / "run.json"), "--resume"]
    env = os.environ | {"GRAFTAX_MALLOC": "0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
                        "JAX_COMPILATION_CACHE_DIR": str(HERE.parent / ".cache" / "jax")}  # fmt: skip
    ends = []
    for fault in ("save.arrays@12:kill", "step@9:term,save.begin@9:term", ""):
        done = subprocess.run(go, capture_output=True, text=True, timeout=200, env=env | {"GRAFTAX_FAULT": fault})
        ends.append((done.returncode, good(run.out)))
        assert "Traceback" not in done.stderr
    assert ends == [(-9, 6), (75, 6), (0, 14)], done.stderr
    assert "taken over from process" not in done.stderr or "which is gone" in done.stderr


# --- damage ---


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_one_flipped_bit_in_20_places(two):
    folder, rng = two.folder / "2", random.Random(0)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    for n in range(20):
        path = files[n % len(files)]
        kept = path.read_bytes()
        flip(path, rng)
        assert str(path) in two.damage(2), path
        with contextlib.suppress(InputError):
            found = two.restore(2, "trainable", TREE)  # the file says nothing of the values
            assert all(np.array_equal(found[k], TREE[k]) for k in TREE)
        path.write_bytes(kept)
        assert not two.damage(1)
    assert not two.damage(2)


def test_damage_is_named_by_file_and_parameter(two):
    folder = two.folder / "2"
    data = max((p for p in folder.rglob("*") if p.parent.name == "d"), key=lambda p: p.stat().st_size)
    kept = data.read_bytes()
    data.write_bytes(kept[: len(kept) // 2])
    why = two.damage(2, "fast")
    assert f"{data} has {len(kept) // 2} bytes, {len(kept)} were written; lost: trainable/layers/" in why
    said(lambda: two.restore(2, "trainable", TREE), str(data), "lost: trainable/layers/", "load another step (1)")
    middle = bytearray(kept)
    middle[len(kept) // 2] ^= 16
    data.write_bytes(middle)
    assert two.damage(2, "fast") == "", "sizes say nothing of bits"
    line = said(lambda: two.restore(2, "trainable", TREE), f"{data} has other bytes than were written", "lost: ")
    assert "sha256 differs" in line or "cannot be read" in line
    data.unlink()
    said(lambda: two.restore(2, "trainable", TREE), f"{data} is missing", "lost: trainable/layers/")


@pytest.mark.parametrize("text", ["", "{", '{"step": 2, "step": 2}', "[]", "null", "{}", '{"step": 1, "leaves": {}}'])
def test_a_broken_manifest(two, text):
    path = two.folder / "2/manifest.json"
    path.write_text(text)
    said(lambda: two.restore(2, "trainable", TREE), str(path), "load another step, or delete this one")
    assert two.best() is None
    assert two.damage(1) == ""
    with CheckpointWriter(two.folder, keep=1) as checkpoints:
        checkpoints.save(3, {"trainable": TREE}, {})
    assert checkpoints.damage(3) == ""


def test_a_manifest_of_another_step(two):
    shutil.copytree(two.folder / "2", two.folder / "7")
    assert "of step 2, in the folder of 7" in two.damage(7)
    for name in ("05", "٣", "8.aside", "9.partial", "x"):
        shutil.copytree(two.folder / "2", two.folder / name)
    assert two.steps() == [1, 2, 7]


@pytest.mark.full
def test_the_newest_good_one_is_taken(cut, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = copied(cut, tmp_path)
    damaged = next((Path(run.out) / "checkpoints/18/trainable").glob("**/d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    said(lambda: load_run(run.out), str(damaged), "load another step (12)")
    said(
        lambda: train(dataclasses.replace(run, resume="18")), "--resume 18: damaged", "`--resume auto` takes the newest"
    )
    assert life(monkeypatch, run) is None
    err = capsys.readouterr().err
    assert f"step 18 is damaged, resuming from an earlier one: {damaged} has" in err
    assert "resumed at step 12 of 40" in err
    assert last(run.out) == last(whole("lora"))
    run = copied(cut, tmp_path, "all")
    for file in (Path(run.out) / "checkpoints").glob("*/manifest.json"):
        file.write_text("{")
    said(
        lambda: train(dataclasses.replace(run, resume="auto")), "no checkpoint in", "is whole", "start anew in another"
    )


@pytest.mark.parametrize("damage", ["", "{", '{"steps": 1, "steps": 2}', None])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "held_out.npz"])
def test_sidecars(name, damage, runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Deleted (None), empty or broken: refused by name where they are needed, written anew by a resume."""
    run = copied(runs["pretrain"], tmp_path)
    path = Path(run.out) / name
    kept = path.read_bytes()
    path.unlink() if damage is None else path.write_text(damage)
    if name == "held_out.npz" and damage is None:
        assert load_run(run.out).held_out == {}
        assert "held_out.npz is missing: forgetting cannot be measured" in capsys.readouterr().err
    else:
        said(lambda: load_run(run.out), str(path) if damage is not None or name != "config.json" else run.out)
    if damage != "{":
        assert life(monkeypatch, run, steps=STEPS + 1) is None
        assert len(path.read_bytes()) == len(kept) or name == "config.json"
        assert load_run(run.out).held_out


# --- full disks ---


def limited(patch, size, step):
    """Files may have `size` bytes at most while this step is saved."""
    save, limits = CheckpointWriter.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def saved(self, i, *args):
        if i == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            save(self, i, *args)
            self.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    patch.setattr(CheckpointWriter, "save", saved)


@pytest.mark.full
@pytest.mark.parametrize("step", [6, 40])
def test_a_file_that_grows_too_large(step, runs, whole, tmp_path, monkeypatch):  # noqa: F811
    run = dataclasses.replace(runs["lora"], out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        limited(patch, 2000, step)
        ended = life(patch, run)
    assert isinstance(ended, InputError)
    newest = good(run.out)
    for word in (f"checkpoints/{step}: this checkpoint could not be written", "continue with --resume"):
        assert word in str(ended)
    assert newest == (None if step == 6 else 36)
    assert f"the newest checkpoint is of step {newest}" in str(ended) or newest is None
    assert not list(Path(run.out).glob("checkpoints/*.partial")), "it makes no use of the room"
    assert life(monkeypatch, run) is None
    assert last(run.out) == last(whole("lora"))


@pytest.mark.parametrize("point", ["save.begin", "save.arrays", "save.manifest", "save.end"])
def test_no_space_left_stops_the_run_at_the_next_step(point, cut, tmp_path, monkeypatch, capsys):
    run = copied(cut, tmp_path)
    ended = life(monkeypatch, run, f"{point}@24:full")
    assert isinstance(ended, InputError)
    assert "checkpoints/24: this checkpoint could not be written ([Errno 28] No space left on device" in str(ended)
    assert "newest checkpoint is of step" in str(ended)
    assert not (Path(run.out) / "summary.json").exists()
    assert (Path(run.out) / "checkpoints/36").exists() is False, "it did not go on without"
    assert good(run.out) == (24 if point == "save.end" else 18)
    assert not (Path(run.out) / "lock").exists()


def test_an_exit_waits_for_the_save_under_way(cut, tmp_path, monkeypatch):
    run = copied(cut, tmp_path)
    assert isinstance(life(monkeypatch, run, "step@25:fail"), RuntimeError)
    assert good(run.out) == 24


def test_older_ones_stay_until_the_new_one_is_there(two, monkeypatch):
    rename = Path.rename

    def losing(self, target):
        moved = rename(self, target)
        if self.name == "3.partial":  # the disk lies
            next((moved / "trainable").glob("**/d/*")).unlink()
        return moved

    monkeypatch.setattr(Path, "rename", losing)
    with CheckpointWriter(two.folder, keep=1) as checkpoints:
        checkpoints.save(3, {"trainable": TREE}, {})
        said(checkpoints.wait, "is missing; no older checkpoint was deleted")
    assert two.damage(1) == two.damage(2) == ""


# --- two writers ---


def test_two_writers(tmp_path, monkeypatch, capsys):
    with Lock(tmp_path) as mine:
        here = f"process {os.getpid()} on {socket.gethostname()} is writing"
        said(
            lambda: Lock(tmp_path).__enter__(),
            f"{tmp_path}: {here}",
            "is writing here; wait for it or stop it",
            "--force lock",
        )
        mine.check()
        with Lock(tmp_path, take_over=True):
            said(mine.check, "now written by process", "this run stops and saves nothing more")
        said(mine.check, "nobody (the lock file was deleted)")
    assert not (tmp_path / "lock").exists()


def lock_of_another(folder, **fields):
    """Write the lock file of another writer: this process's own, with other fields."""
    with Lock(folder) as own:
        text = own.path.read_text()
    for key, value in fields.items():
        text = re.sub(f"{key}=.*", f"{key}={value}", text)
    own.path.unlink(missing_ok=True)
    own.path.write_text(text)


@pytest.mark.parametrize(("other", "age", "lives"), [
    ({"pid": 2**22 - 3, "start": 1}, 0, False),  # no such process
    ({"start": 1}, 0, False),  # its number belongs to another process now
    ({}, 0, True),
    ({"pid": 1, "host": "node-7"}, 0, True),  # another host, a moment ago
    ({"pid": 1, "host": "node-7"}, 200, False),
    ("not a lease", 0, False),
    ('{"pid": 1, "host": "node-7", "key": "x"}', 0, False),  # written by an earlier version
    ("", 200, False),  # the machine stopped while it was written
], ids=["dead", "other process", "alive", "other host", "other host, silent", "broken", "old", "empty"])  # fmt: skip
def test_whose_lock_is_stale(other, age, lives, tmp_path, capsys):
    path = tmp_path / "lock"
    path.write_text(other) if isinstance(other, str) else lock_of_another(tmp_path, **other)
    os.utime(path, (time.time() - age,) * 2)
    if lives:
        said(lambda: Lock(tmp_path).__enter__(), "is writing here")
        return
    with Lock(tmp_path):
        assert "taken over from " in capsys.readouterr().err
        assert f"pid={os.getpid()}" in path.read_text()


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with Lock(tmp_path) as one:
        os.utime(one.path, (1.0, 1.0))
        for _ in range(200):
            if one.path.stat().st_mtime > 2:
                break
            time.sleep(0.02)
        assert time.time() - one.path.stat().st_mtime < 60


def test_a_run_stops_where_another_writes(cut, tmp_path, monkeypatch, capsys):
    run = copied(cut, tmp_path)
    with Lock(Path(run.out)):
        (tmp_path / "run.json").write_text(to_json(run))
        with pytest.raises(SystemExit) as ended:
            main(["finetune", str(tmp_path / "run.json"), "--resume"])
        assert ended.value.code == 2
        assert f"graftax: {run.out}: process {os.getpid()} on" in capsys.readouterr().err
        assert (Path(run.out) / "lock").exists()
    real = CheckpointWriter.save

    def save(self, step, *args):
        if step == 30:  # another host thought this one was dead
            self.wait()  # the save of step 24, in the background, comes before
            other = tmp_path / "other"
            other.mkdir()
            lock_of_another(other, pid=5, host="node-7", token="y")
            (other / "lock").replace(Path(run.out) / "lock")
        real(self, step, *args)

    monkeypatch.setattr(CheckpointWriter, "save", save)
    ended = life(monkeypatch, run)
    assert "now written by process 5 on node-7" in str(ended)
    assert good(run.out) == 24
    assert (Path(run.out) / "lock").exists(), "it is the other's"


def test_a_strangers_folder_leads_nowhere_else(cut, tmp_path, monkeypatch):
    """Links at every name that a run writes to, and at those that it once wrote beside, are replaced, not followed."""
    run, out = copied(cut, tmp_path), tmp_path / "outside"
    out.mkdir()
    for name in ("config.json.tmp", "metrics.jsonl", "metrics.jsonl.tmp", "loss.png", "summary.json.tmp", "lock.tmp"):
        path = Path(run.out) / name
        kept = path.read_bytes() if path.exists() else b"mine"
        (out / name).write_bytes(kept)
        path.unlink(missing_ok=True)
        path.symlink_to(out / name)
    (out / "tokenizer.model").write_bytes(b"mine")
    (Path(run.out) / "begin.tmp").symlink_to(out)
    (out / "notes.partial").mkdir()
    (Path(run.out) / "checkpoints" / "notes.partial").mkdir()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert life(monkeypatch, run) is None
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert (Path(run.out) / "checkpoints" / "notes.partial").is_dir(), "no name of ours"
    assert (Path(run.out) / "begin.tmp").is_symlink()


def test_a_file_is_made_under_a_name_of_its_own(tmp_path):
    """As the umask has it; what a kill leaves goes when the next writer begins, what another left stays."""
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a.json", "{}")
        with atomic_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode)[-3:] for name in ("a.json", "b")] == ["640", "750"]
    for name in ("a.json.0123456789abcdef.tmp", "a.json.tmp", "x.tmp"):
        (tmp_path / name).write_text("")
    with Lock(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.json.tmp", "b", "x.tmp"]
    with pytest.raises(IsADirectoryError):
        atomic_write(tmp_path / "b", "")
    assert not [path for path in tmp_path.iterdir() if is_leftover(path.name)]


def test_two_writers_of_one_new_folder(tmp_path):
    """Each has its own; the second one is refused, and nothing of it is left. A stranger's folder stays."""
    (tmp_path / "out.unchecked").mkdir()
    (tmp_path / "out.unchecked" / "theirs").write_text("")

    def late():
        with atomic_folder(tmp_path / "out") as one:
            with atomic_folder(tmp_path / "out") as two:
                (two / "two").write_text("")
            (one / "one").write_text("")

    (tmp_path / "file").write_text("")
    said(
        lambda: atomic_folder(tmp_path / "file" / "out").__enter__(), "cannot be written (Not a directory)", "choose a"
    )
    (tmp_path / "file").unlink()
    said(
        late,
        f"{tmp_path / 'out'}: cannot be written (Directory not empty)",
        "another process wrote there",
        "choose another",
    )
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "out", "out.unchecked", "out.unchecked/theirs", "out/two",
    ]  # fmt: skip


def test_another_method_over_the_same_folder(cut, tmp_path):
    run = copied(cut, tmp_path)
    said(
        lambda: train(dataclasses.replace(run, method=LoRA(rank=2, where="mlp"), resume="auto")),
        "method.where",
        '-> "mlp"',
    )
