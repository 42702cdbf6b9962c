"""`python -m graftax.train.bench.safety`: the cost of safety, as ratios of contenders that take turns.

The step against the same step without its check for finite numbers; the loop's own work before a step; a checkpoint
against plain Orbax with the same arrays: seconds that the loop waits, seconds in all, bytes, and seconds to restore.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from ...model import Transformer, init, presets
from ...peft import Subset, partition
from .. import faults
from ..cluster.signals import Stop
from ..config import Optim
from ..optim import make_optimizer, rms
from ..runs.checkpoint import CheckpointWriter
from ..step import State, init_state, make_loss, make_train_step
from .timing import median_ratio, time_in_turns


def bare_step(model: Any, method: Any, tx: Any) -> Callable[..., Any]:
    """Return the train step without its checks: the same loss, gradient, metrics and update."""
    gradient = jax.value_and_grad(make_loss(model, method), has_aux=True)
    tx = optax.with_extra_args_support(tx)

    def step(state: State, frozen: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (total, targets), grads = gradient(state.trainable, frozen, batch, key)
        n = jnp.maximum(targets, 1.0)
        grads = jax.tree.map(lambda g: g / n, grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, grads=grads)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": total / n, "targets": targets, "grad_norm": norm, "update_rms": rms(updates)}
        return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return step


def steps(preset: str, B: int, T: int, rounds: int) -> tuple[dict[str, Any], State]:
    """Return (step times with and without checks, and the loop's own work; a state to save)."""
    model, method, optim = Transformer(presets[preset]), Subset("all"), Optim()
    params = init(presets[preset], jax.random.key(0))
    frozen, trainable = partition(method, params, jax.random.key(1))
    tx, rng = make_optimizer(optim, trainable, 1000, method), np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, model.config.V, (B, T)), jnp.int32)
    ones = jnp.ones((B, T), jnp.int32)
    batch = {"ids": ids, "targets": ids, "weights": ones.astype(jnp.float32), "segments": ones,
             "positions": jnp.broadcast_to(jnp.arange(T), (B, T))}  # fmt: skip
    states: dict[str, State] = {}

    def contender(name: str, step: Any) -> Callable[[], Any]:
        states[name] = init_state(jax.tree.map(jnp.copy, trainable), tx)
        compiled = jax.jit(step, donate_argnums=0)

        def call() -> None:
            states[name], metrics = compiled(states[name], frozen, batch)
            jax.block_until_ready(metrics)

        return call

    calls = {"checked": contender("checked", make_train_step(model, method, tx)),
             "bare": contender("bare", bare_step(model, method, tx))}  # fmt: skip
    seconds = time_in_turns(calls, rounds)
    step = statistics.median(seconds["checked"])
    with tempfile.TemporaryDirectory() as work, Stop() as stop, CheckpointWriter(Path(work)) as checkpoints:
        stop.begin_steps(0)
        start = time.perf_counter()
        for i in range(10_000):
            checkpoints.check(), stop.may_step(i + 1), faults.at("step", i)
        loop = (time.perf_counter() - start) / 10_000
    results = {
        "step_ms": round(step * 1e3, 1),
        "step_over_bare": round(median_ratio(seconds["checked"], seconds["bare"]), 4),
        "best_step_over_best_bare": round(min(seconds["checked"]) / min(seconds["bare"]), 4),
        "loop_microseconds": round(loop * 1e6, 2),
        "loop_over_step": round(loop / step, 7),
    }
    return results, states["checked"]


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def checkpoints(state: State, rounds: int, work: Path) -> dict[str, Any]:
    """Return the cost of a checkpoint of the state relative to plain Orbax."""
    items = {"trainable": state.trainable, "optimizer": state._replace(trainable=None)}
    ours, orbax, n = CheckpointWriter(work / "ours", keep=1), ocp.StandardCheckpointer(), iter(range(10**6))
    returned: dict[str, list[float]] = {"ours": [], "orbax": []}

    def save() -> None:
        start = time.perf_counter()
        ours.save(next(n), items, {})
        returned["ours"].append(time.perf_counter() - start)
        ours.wait()

    def bare() -> None:
        start = time.perf_counter()
        orbax.save(work / "orbax", items, force=True)
        returned["orbax"].append(time.perf_counter() - start)
        orbax.wait_until_finished()

    saved = time_in_turns({"ours": save, "orbax": bare}, rounds)
    like, step = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items),
        ours.steps()[-1],
    )
    load = {how: lambda how=how: [ours.restore(step, k, v, verify=how) for k, v in like.items()]
            for how in ("full", "fast", "off")}  # fmt: skip
    read = time_in_turns({**load, "orbax": lambda: orbax.restore(work / "orbax", like)}, rounds)
    returned = {k: v[1:] for k, v in returned.items()}
    ours_bytes, orbax_bytes = folder_bytes(work / "ours" / str(step)), folder_bytes(work / "orbax")
    ours.close()
    return {
        "megabytes": round(orbax_bytes / 1e6, 1),
        "bytes_over_orbax": round(ours_bytes / orbax_bytes, 4),
        "save_s": round(statistics.median(saved["ours"]), 3),
        "save_over_orbax": round(median_ratio(saved["ours"], saved["orbax"]), 2),
        "loop_waits_s": round(statistics.median(returned["ours"]), 3),
        "loop_waits_over_orbax": round(median_ratio(returned["ours"], returned["orbax"]), 2),
        **{f"restore_{how}_over_orbax": round(median_ratio(read[how], read["orbax"]), 2) for how in load},
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.safety", description=__doc__)
    parser.add_argument("--preset", default="5m", choices=list(presets))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--T", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    results, state = steps(args.preset, args.batch, args.T, args.rounds)
    with tempfile.TemporaryDirectory() as work:
        results |= checkpoints(state, args.rounds, Path(work))
    print(json.dumps({"preset": args.preset, **results, "load": round(os.getloadavg()[0], 1)}, indent=1))


if __name__ == "__main__":
    main()
