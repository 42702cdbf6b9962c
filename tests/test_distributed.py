"""Runs of several processes on this machine, two host devices each: one order of rows, kills, resumes, who is gone."""

import dataclasses
import json
import os
import pydoc_data.topics
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from graftax import InputError
from graftax.model.sharding import batch_rows, make_mesh, put_batch
from graftax.peft import LoRA
from graftax.train.cluster import coordinator, processes
from graftax.train.config import Data, Optim, Run, to_json
from graftax.train.loop import stream_digest
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.train import train
from tiny import CONFIG

MODEL = dataclasses.replace(CONFIG, V=400, context=64)
HERE = Path(__file__).parent
STEPS = 6


def launch(n, args, die=None, only=None, each=lambda i: [], **env):
    """[(exit code, stdout, stderr, seconds)] of n processes (or `only` some); `die`: {process: step it dies at}."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(HERE.parent / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "GRAFTAX_HEARTBEAT": "5",
        "GRAFTAX_WAIT": "60",
    } | env  # fmt: skip
    began, found = time.monotonic(), {}

    def one(i):
        command = [sys.executable, str(HERE / "dying.py"), *args, *each(i), "--processes", f"localhost:{port},{n},{i}"]
        with subprocess.Popen(command, env=env | {"DIE": str((die or {}).get(i, 10**6))}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as child:  # fmt: skip
            out, err = child.communicate(timeout=200)
        found[i] = (child.returncode, out, err, time.monotonic() - began)

    threads = [threading.Thread(target=one, args=(i,)) for i in (range(n) if only is None else only)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in sorted(found)]


def well(found):
    """All processes did all that was asked; only the first one speaks."""
    assert [code for code, *_ in found] == [0] * len(found), "\n".join(err for _, _, err, _ in found)
    assert all(out == "" and err == "" for _, out, err, _ in found[1:]), found[1:]


def losses(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{r["step"]: r["loss"] for r in rows if "loss" in r}[i] for i in range(1, STEPS + 1)]


def last(folder):
    return CheckpointWriter(Path(folder) / "checkpoints").manifest(STEPS)


def bit_equal(a, b):
    for key in ("leaves", "rows_digest", "next_row"):
        assert last(a)[key] == last(b)[key], key


def near(a, b):
    assert (last(a)["rows_digest"], last(a)["next_row"]) == (last(b)["rows_digest"], last(b)["next_row"])
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with pre.json and lora.json, runs that say all but where they go."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "texts").mkdir()
    for i, (name, text) in enumerate(sorted(pydoc_data.topics.topics.items())[:24]):
        (folder / "texts" / f"{i}-{name}.txt").write_text(text[:4000], "utf-8")
    rows = [{"prompt": f"{word} {i}", "completion": word[::-1]} for i in range(30) for word in ("red", "blue")]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = Data(domains=(("docs", str(folder / "texts"), 1.0),), T=32, batch=8, vocab=400, held_out=0.2, cache="")
    run = Run(steps=STEPS, mesh=(2, -1, 1), log_every=1, save_every=2, eval_tokens=512, tensorboard=False,
              optim=Optim(lr=1e-3), model=MODEL, data=data)  # fmt: skip
    (folder / "pre.json").write_text(to_json(run))
    data = dataclasses.replace(data, domains=(), task=str(folder / "colours.jsonl"))
    # The tensor axis goes over processes: rows that several of them need.
    tune = dataclasses.replace(run, phase="finetune", base=str(folder / "base"), method=LoRA(rank=2), data=data,
                               model=None, eval_base_first=False, eval_rows=4, mesh=(1, 1, -1))  # fmt: skip
    (folder / "lora.json").write_text(to_json(tune))
    return folder


@pytest.fixture(scope="module")
def base(work):
    """Two processes, unbroken."""
    found = launch(2, ["pretrain", str(work / "pre.json"), "--out", str(work / "base"), "--json"])
    well(found)
    assert json.loads(found[0][1])["steps"] == STEPS
    return work / "base"


@pytest.fixture(scope="module")
def deaths(work):
    """[(who, what all said)] of a run in which process 1 dies at step 3 and, when it goes on, process 0 at step 5."""
    go = ["pretrain", str(work / "pre.json"), "--out", str(work / "dies")]
    found = [(1, launch(2, go, die={1: 3})), (0, launch(2, [*go, "--resume"], die={0: 5}))]
    shutil.copytree(work / "dies", work / "four")
    return found


@pytest.mark.full
def test_one_process_dies_and_the_others_say_which(work, base, deaths):
    for who, found in deaths:
        (died, *_, then), (code, _, err, end) = found[who], found[1 - who]
        assert died == -9
        assert code == 1, err
        assert end - then < 60
        lines = [line for line in err.splitlines() if line.startswith("graftax: ")]
        assert len(lines) == 1
        assert f"process {who} of 2 ({socket.gethostname()}, pid " in lines[0]
        assert "is gone" in lines[0]
        assert err.splitlines()[-1] == lines[0], "nothing after it, no abort"
    well(launch(2, ["pretrain", str(work / "pre.json"), "--out", str(work / "dies"), "--resume"]))
    bit_equal(base, work / "dies")


@pytest.mark.full
@pytest.mark.faults
def test_one_gets_a_signal_and_all_stop_after_the_same_step(work, base):
    """The last step is far: they have the time to agree."""
    go = ["pretrain", str(work / "pre.json"), "--out", str(work / "stops"), "--steps", "4000", "--save-every", "0"]
    go += ["--optim.schedule", "constant", "--log-every", "100"]
    found = launch(2, go, die={1: -3})
    assert [code for code, *_ in found] == [75, 75], found
    said = re.search(r"stopped at step (\d+) of 4000, saved", found[0][2])
    assert said is not None
    assert [int(said[1])] == saved(work / "stops")
    assert "Traceback" not in found[0][2] + found[1][2]
    step = saved(work / "stops")[0]
    assert CheckpointWriter(work / "stops/checkpoints").damage(step) == ""
    found = launch(2, [*go, "--resume", "--steps", str(step + 3)])
    well(found)
    assert saved(work / "stops")[-1] == step + 3


def saved(folder):
    return CheckpointWriter(folder / "checkpoints").steps()


@pytest.mark.full
def test_another_number_of_processes_goes_on_in_the_same_order(work, base, deaths):
    """2 (killed at 5) -> 4 -> one, whose layers are unrolled."""
    out = work / "four"
    assert CheckpointWriter(out / "checkpoints").steps()[-1] == 4
    go = ["pretrain", str(work / "pre.json"), "--out", str(out), "--resume", "--mesh", "2", "2", "2"]
    go += ["--save-every", "1"]
    found = launch(4, go, die=dict.fromkeys(range(4), 5))
    assert [code for code, *_ in found] == [-9] * 4
    assert CheckpointWriter(out / "checkpoints").manifest(5)["mesh"] == [2, 2, 2, 1]
    run = dataclasses.replace(_run(work / "pre.json"), out=str(out), resume="auto", layers="unrolled")
    train(run)
    near(base, out)
    assert "layers/1/mlp/up" in last(out)["leaves"]["trainable"]


@pytest.mark.full
def test_an_adapter_killed_and_resumed_equals_unbroken(work, base):
    go = ["finetune", str(work / "lora.json"), "--out"]
    well(launch(2, [*go, str(work / "whole")]))
    found = launch(2, [*go, str(work / "cut")], die={0: 5, 1: 5})
    assert [code for code, *_ in found] == [-9, -9]
    well(launch(2, [*go, str(work / "cut"), "--resume"]))
    bit_equal(work / "whole", work / "cut")
    train(dataclasses.replace(_run(work / "lora.json"), out=str(work / "one"), mesh=(2, 2, 2)))
    near(work / "whole", work / "one")


@pytest.mark.full
def test_processes_that_differ_and_mistakes_of_all(work):
    go = ["pretrain", str(work / "pre.json"), "--out", str(work / "never")]
    found = launch(2, go, each=lambda i: ["--seed", str(i)])
    assert [(code, out) for code, out, *_ in found] == [(2, ""), (2, "")]
    assert found[0][2].startswith(f"graftax: process 1 of 2 ({socket.gethostname()}, pid ")
    assert "has seed 1, process 0 has 0" in found[0][2]
    assert found[1][2] == "", "said once"
    assert not (work / "never").exists()


def test_a_process_that_never_comes_is_named(work):
    go = ["pretrain", str(work / "pre.json"), "--out", str(work / "never")]
    (code, _, err, _), = launch(3, go, only=[0], GRAFTAX_WAIT="2")  # fmt: skip
    assert (code, err) == (2, "graftax: process 1, 2 of 3 did not come within 2 s\n")
    (code, _, err, _), = launch(3, go, only=[2], GRAFTAX_WAIT="1")  # fmt: skip
    assert code == 2
    assert err.startswith("graftax: [process 2] process 0 of 3 did not come within 1 s: nothing answers at localhost:")


def _run(path):
    from graftax.train.config import from_json

    return from_json(path)


@pytest.mark.full
def test_the_flag_says_what_it_wants():
    assert processes.parse_processes("10.0.0.1:8476,4,3") == ("10.0.0.1:8476", 4, 3, None)
    for wrong in ("4", "host,2,0", "host:1,2,2", "host:1,2,-1", "host:x,2,0"):
        with pytest.raises(InputError, match="wanted ADDRESS:PORT,N,I"):
            processes.parse_processes(wrong)


@pytest.mark.full
def test_a_slurm_step_is_found_and_a_shell_is_none(monkeypatch):
    for name in processes.CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    assert processes.detect_cluster() is None
    step = {"JOB_ID": "7", "STEP_NODELIST": "node[003-004]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0",
            "STEP_NUM_TASKS": "2"}  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, n, i, devices = processes.detect_cluster()
    assert (address.split(":")[0], n, i, devices) == ("node003", 2, 1, [0])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert processes.detect_cluster() is None


@pytest.mark.full
@pytest.mark.parametrize(("hellos", "wrong"), [
    ([{"index": 0, "count": 2}, {"index": 0, "count": 2}], r"two processes say that they are process 0: h, pid 1; h"),
    ([{"index": 0, "count": 2}, {"index": 1, "count": 3}], r"process 1 \(h, pid 1\) was told of 3 processes, not of 2"),
    (["GET / HTTP/1.1", {"index": 1, "count": 2}], "process 0 of 2 did not come within"),
    (["{}", {"index": 1, "count": 2}, {"index": 0, "count": 2}], "^$"),
])  # fmt: skip
def test_the_coordinator_knows_who_is_wrong(hellos, wrong):
    server = socket.create_server(("localhost", 0))
    open_ = [socket.create_connection(server.getsockname()) for _ in hellos]
    for connection, hello in zip(open_, hellos, strict=True):
        line = hello if isinstance(hello, str) else json.dumps(hello | {"host": "h", "pid": 1})
        connection.sendall(line.encode() + b"\n")
    found, _, said = coordinator.gather(server, 2, 1.0)
    with pytest.raises(AssertionError, match=wrong):
        raise AssertionError(said)
    assert (len(found) == 2) == (said == "")


@pytest.mark.full
def test_the_digest_of_rows_adds_up():
    ids = np.arange(100, 124)
    whole = stream_digest(np.arange(24), ids)
    assert whole == stream_digest(np.arange(10), ids[:10]) + stream_digest(np.arange(10, 24), ids[10:])
    assert whole != stream_digest(np.arange(24), ids[::-1])


@pytest.mark.full
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 2, 2), (1, 1, 8)])
def test_a_batch_of_the_rows_of_a_process_is_the_batch(shape):
    mesh = make_mesh(shape)
    held, counted = batch_rows(mesh, 16)
    assert held.tolist() == counted.tolist() == list(range(16)), "one process holds all"
    batch = {"ids": np.arange(16 * 32).reshape(16, 32)}
    a, b = put_batch(mesh)(batch)["ids"], put_batch(mesh, 16)(batch)["ids"]
    assert a.sharding == b.sharding
    assert np.array_equal(a, b)
    assert np.array_equal(a, batch["ids"])
