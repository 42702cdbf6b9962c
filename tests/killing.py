"""Kills savers: `killing.py FOLDER RANDOM`. Forks savers of a small state before any of jax's threads exist and kills
each, RANDOM times at a random moment and once at each point inside a save. The newest checkpoint must load with the
digests that were noted when its state was made. Prints one JSON line."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

folder, times = Path(sys.argv[1]), int(sys.argv[2])
POINTS = ["save.begin", "save.arrays", "save.manifest", "save.end"]


def life(fault, ready):
    """Checks the newest checkpoint, then saves one step after the other until it is killed."""
    os.environ["GRAFTAX_FAULT"] = fault
    import jax

    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    from graftax.train.runs.checkpoint import CheckpointWriter

    def state(step):
        rng = np.random.default_rng(step)
        return {f"w{i}": jax.numpy.asarray(rng.normal(size=(64, 257))) for i in range(6)}

    checkpoints = CheckpointWriter(folder)
    steps = checkpoints.steps()
    first = steps[-1] if steps else 0
    if first:
        assert not checkpoints.damage(first), checkpoints.damage(first)
        got, wanted = checkpoints.restore(first, "trainable", state(first)), state(first)
        assert all(np.array_equal(got[k], wanted[k]) for k in wanted)
    checkpoints.tidy()
    os.write(ready, str(first).rjust(8).encode())
    for step in range(first + 1, first + 500):
        checkpoints.save(step, {"trainable": state(step)}, {})


def kill(fault, seconds):
    """(the step its predecessor left, how it ended) of a life."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            life(fault, write)
        finally:
            os._exit(1)
    os.close(write)
    found = os.read(read, 8)
    if not fault:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(read)
    assert found, "a checkpoint was lost, or differs"
    return int(found), os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1


if __name__ == "__main__":
    import graftax.train.runs.checkpoint  # noqa: F401  imported once for all; nothing of jax runs here

    random.seed(0)
    lives = [("", random.uniform(0, 0.25)) for _ in range(times)] + [(f"{point}:kill", 0.0) for point in POINTS]
    ends = [kill(*one) for one in [*lives, ("", 0.0)]]
    print(json.dumps({"found": [first for first, _ in ends], "signals": [n for _, n in ends], "partial":
                      sorted(p.name for p in folder.glob("*.partial"))}))  # fmt: skip
