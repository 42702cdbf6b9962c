"""Cost of a training step (time, memory, FLOPs) by method, and how many lanes of a sweep to train at a time."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ...peft import Subset
from ..cluster.signals import Stop
from ..config import Run
from ..plan.estimate import trace_step
from ..plan.planner import state_bytes
from ..plan.topology import parse_topology
from ..progress import console, format_time
from ..runs.report import format_bytes, nbytes
from ..setup import BATCH_DTYPES, compile_step, layout
from .base_cache import BaseCache
from .sweep.lanes import LaneStack
from .sweep.programs import Program

# Methods take turns, so that a drift of the machine's speed meets all of them alike: TURNS turns of STEPS steps each.
# The first step of a turn is not counted: it brings the arrays back into the caches.
TURNS, STEPS = 6, 4
MEMORY_SHARE = 0.8  # share of the device memory that lanes may use
TRIAL_GAIN = 5.0  # stop trying other lane counts when compiling costs more than the remaining time over this


def planned_step(run: Run, cache: BaseCache) -> tuple[dict[str, float], Any]:
    """Return ({part of the state: bytes}, cost of the step) by the plan: its trace, on the platform of this process."""
    model, params = cache.model(run)
    placed = layout(run, cache.mesh, jax.eval_shape(lambda: params))
    return state_bytes(placed), trace_step(run, model.config, cache.mesh, placed, jax.devices()[0].platform)


def step_flops(run: Run, cache: BaseCache) -> float:
    """Return the FLOPs of all matrix products of a training step, including recomputation."""
    return planned_step(run, cache)[1].flops


def measure_costs(
    runs: dict[str, Run], cache: BaseCache, stop: Stop, quantized: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a line of results for each run of {name: run}.

    `seconds` is the median over turns of the fastest step of a turn. `ratio` is the median over turns of that time over
    the time of full fine-tuning, which is measured too if it is not among the runs. A quantised base cannot be
    fine-tuned in full; there the first run is the reference.
    """
    first = next(iter(runs.values()))
    reference = next((name for name, run in runs.items() if run.method == Subset("all")), "")
    if quantized:
        reference = next(iter(runs))
    extra = {} if reference else {"": dataclasses.replace(first, method=Subset("all"))}
    compiled, lines = {}, {}
    for name, run in (extra | runs).items():
        stop.check()
        setup = cache.setup(run)
        setup.state = jax.device_put(setup.state, cache.replicated)
        step, cost = compile_step(setup)
        compiled[name] = [step, setup.state, setup.frozen]
        trainable = setup.totals["trainable"]
        lines[name] = {"trainable": trainable, "share": trainable / setup.totals["base"],
                       "artifact_bytes": nbytes(setup.state.trainable), "peak_bytes": cost["step_peak_bytes"],
                       "flops": step_flops(run, cache),
                       "virtual_tokens": run.method.context(setup.state.trainable).length,
                       "compile_seconds": cost["compile_seconds"]}  # fmt: skip
    batch = jax.device_put(_batch_of_ones(first), cache.replicated)
    seconds = {name: np.zeros((TURNS, STEPS)) for name in compiled}
    for turn in range(TURNS):
        for name, (step, state, frozen) in compiled.items():
            stop.check()
            for k in range(STEPS):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, frozen, batch))
                seconds[name][turn, k] = time.perf_counter() - start
            compiled[name][1] = state
    fastest = {name: times[:, 1:].min(axis=1) for name, times in seconds.items()}
    for name in runs:
        yield {"kind": "cost", "method": name, **lines[name], "seconds": float(np.median(fastest[name])),
               "ratio": float(np.median(fastest[name] / fastest[reference]))}  # fmt: skip


def chunk_size(n: int, most: int, devices: int) -> int:
    """Return the lanes of a chunk if n lanes are cut into as few equal chunks of at most `most` lanes as possible.

    With fewer devices than lanes it is rounded up to a multiple of the devices.
    """
    K = math.ceil(n / math.ceil(n / most))
    return math.ceil(K / devices) * devices if devices < K else K


def lanes_that_fit(program: Program, cache: BaseCache, requested: int, devices: list[Any]) -> int:
    """Return how many lanes of a program to train at a time.

    That is `requested` if it is not 0. Otherwise it is the fastest, in lane-steps per second, of: as many as fit into
    memory by the plan, a quarter of them, and one.
    """
    n = len(program.trials)
    if requested:
        return min(requested, n)
    sizes, cost = planned_step(program.run, cache)
    base_bytes, lane_bytes = sizes["weights"], sizes["trainable"] + sizes["optimizer"] + cost.peak
    fit = max(int((MEMORY_SHARE * parse_topology("").chip.memory - base_bytes) / lane_bytes), 1) * len(devices)
    most = min(fit, n)
    candidates = [K for K in dict.fromkeys((most, most // 4, 1)) if K]
    if len(candidates) == 1:
        return most
    times: dict[int, float] = {}  # {lanes: seconds of a step over its lanes}
    for K in candidates:
        times[K], compile_seconds = _time_lanes(program, cache, K, devices)
        if compile_seconds * TRIAL_GAIN > min(times.values()) * n * program.run.steps:
            break
    best = min(times, key=lambda k: (round(times[k], 4), -k))
    rates = ", ".join(f"{K}: {1 / t:.2f}" for K, t in times.items())
    total = format_time(times[best] * n * program.run.steps)
    console.print(f"a lane needs {format_bytes(lane_bytes)} beside the base's {format_bytes(base_bytes)}, so {fit} "
                  f"fit; lane-steps/s by number of lanes: {rates}; training {best} at a time, about {total} for {n} "
                  f"lanes of {program.run.steps} steps", soft_wrap=True)  # fmt: skip
    return best


def _time_lanes(program: Program, cache: BaseCache, K: int, devices: list[Any], steps: int = 3) -> tuple[float, float]:
    """Return (seconds of a step over its lanes, seconds of compilation) with K lanes at a time."""
    K = chunk_size(K, K, len(devices))
    indices = list(range(min(K, len(program.trials))))
    setups = [cache.setup(program.trials[i].run) for i in indices]
    stack = LaneStack(program, indices, setups, K, devices, cache)
    batch, seconds = stack.put([_batch_of_ones(program.run)]), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        jax.block_until_ready(stack.train_step(batch))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])) / K, stack.compile_seconds


def _batch_of_ones(run: Run) -> dict[str, np.ndarray]:
    return {name: np.ones((run.data.batch, run.data.T), dtype) for name, dtype in BATCH_DTYPES.items()}
