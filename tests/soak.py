"""Kills at random moments: `python tests/soak.py [--kills 200] [--seed 0] [--folder FOLDER]`.

A supervisor starts a small run with --resume, kills it (every fifth time with SIGTERM, else -9) and starts it again,
with no clean-up between; when the run has come to its end it must equal the unbroken one by sha256, and another
one begins.
Lives are forked from a process that has imported all and started nothing, so that most of a life is the run itself.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "GRAFTAX_MALLOC": "0",
               "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip

import numpy as np  # noqa: F401
from graftax.train import cli
from graftax.train.config import Data, Optim, Run, to_json
from graftax.train.runs import export  # noqa: F401
from tiny import CONFIG


def small(folder, steps):
    """A pretraining run's config file: two domains, one device."""
    import dataclasses
    import pydoc_data.topics

    for i, (_, text) in enumerate(sorted(pydoc_data.topics.topics.items())[:24]):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.txt").write_text(text[:3000], "utf-8")
    domains = (("a", str(folder / "a"), 0.7), ("b", str(folder / "b"), 0.3))
    data = Data(domains=domains, T=32, batch=4, vocab=400, held_out=0.2, cache="")
    run = Run(steps=steps, mesh=(1, 1, 1), log_every=25, save_every=25, eval_every=200, eval_tokens=256, keep=3,
              tensorboard=False, optim=Optim(lr=3e-3), model=dataclasses.replace(CONFIG, V=400), data=data)  # fmt: skip
    (folder / "run.json").write_text(to_json(run))
    return folder / "run.json"


def life(config, out, seconds, how):
    """(exit code or -signal, seconds) of one life; it ends by itself or is killed after `seconds`."""
    began, pid = time.monotonic(), os.fork()
    if not pid:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            cli.main(["pretrain", str(config), "--out", str(out), "--resume"])
            os._exit(0)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.005)
    os.kill(pid, how)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - began


def outcome(out):
    """What must be the same: the digests of the last checkpoint, and the logged steps."""
    newest = max((p for p in (out / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    manifest = json.loads((newest / "manifest.json").read_text())
    logged = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]
    assert logged == sorted(set(logged)), "a step is there twice"
    return {key: manifest[key] for key in ("step", "leaves", "rows_digest", "next_row")}, logged[-1]


def main():
    """Run the soak; prints a line a run and a JSON object, and exits 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(exist_ok=True)
    random.seed(args.seed)
    config, began = small(folder, args.steps), time.monotonic()
    life(config, folder / "warm", 600, signal.SIGKILL)  # compiles
    code, whole = life(config, folder / "whole", 600, signal.SIGKILL)
    assert code == 0, (folder / "whole.log").read_text()
    wanted = outcome(folder / "whole")
    codes, kills, finished = Counter(), 0, 0
    while kills < args.kills or codes["now"] != 0:
        out, how = folder / f"run{finished}", signal.SIGTERM if kills % 5 == 4 else signal.SIGKILL
        code, _ = life(config, out, random.uniform(0, 0.7 * whole) if kills < args.kills else 600, how)
        codes[str(code)] += 1
        codes["now"] = code
        kills += code != 0
        if code not in (0, 75, -9, -15):  # -15: before it listened, or after it was done
            sys.exit(f"a life ended with {code}; see {out}.log")
        if code == 0:
            finished += 1
            if outcome(out) != wanted:
                sys.exit(f"{out} is not what {folder / 'whole'} is")
            print(f"run {finished}: equal to the unbroken one after {kills} kills in all", file=sys.stderr, flush=True)
    del codes["now"]
    seconds = round(time.monotonic() - began)
    said = {"kills": kills, "runs": finished, "ended": dict(codes), "unbroken": round(whole, 1), "seconds": seconds}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
