"""What a method's training step costs: time in turns with others, memory by the compiler, FLOPs by the plan's trace."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ...peft import Subset
from ..cluster.signals import Stop
from ..plan.estimate import traced
from ..runs.report import nbytes
from ..setup import BATCH_DTYPES, compile_step, layout
from .base_cache import BaseCache

TURNS, STEPS = 6, 4  # each method takes STEPS steps in each of TURNS turns; the first of a turn finds its memory again


def flops(run: Any, ground: BaseCache) -> float:
    """FLOPs of a step: what its trace multiplies, recomputation too."""
    model, params = ground.model(run)
    laid = layout(run, ground.mesh, jax.eval_shape(lambda: params))
    return traced(run, model.config, ground.mesh, laid, jax.devices()[0].platform).flops


def costs(runs: dict[str, Any], ground: BaseCache, stop: Stop, quantized: bool = False) -> Iterator[dict[str, Any]]:
    """A line of results for each run: {name: run}. `ratio` is a step's time over that of full fine-tuning, which takes
    its turns too, whether it is among them or not: the median over the turns of the fastest step of each. Nothing
    trains all of a quantised base: there it is over that of the first."""
    first, live, facts = next(iter(runs.values())), {}, {}
    full = next((name for name, run in runs.items() if run.method == Subset("all")), "")
    full = next(iter(runs)) if quantized else full
    others = {} if full else {"": dataclasses.replace(first, method=Subset("all"))}
    for name, run in (others | runs).items():
        stop.check()
        phase = ground.phase(run)
        phase.state = jax.device_put(phase.state, ground.whole)
        step, cost = compile_step(phase)
        live[name] = [step, phase.state, phase.frozen]
        size, trains = nbytes(phase.state.trainable), phase.totals["trainable"]
        facts[name] = {"trainable": trains, "share": trains / phase.totals["base"], "artifact_bytes": size,
                       "peak_bytes": cost["step_peak_bytes"], "flops": flops(run, ground),
                       "virtual": run.method.context(phase.state.trainable).length,
                       "compile_seconds": cost["compile_seconds"]}  # fmt: skip
    batch = {name: np.ones((first.data.batch, first.data.T), dtype) for name, dtype in BATCH_DTYPES.items()}
    batch, took = jax.device_put(batch, ground.whole), {name: np.zeros((TURNS, STEPS)) for name in live}
    for turn in range(TURNS):
        for name, (step, state, frozen) in live.items():
            stop.check()
            for k in range(STEPS):
                began = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, frozen, batch))
                took[name][turn, k] = time.perf_counter() - began
            live[name][1] = state
    best = {name: seconds[:, 1:].min(axis=1) for name, seconds in took.items()}
    for name in runs:
        yield {"kind": "cost", "method": name, **facts[name], "seconds": float(np.median(best[name])),
               "ratio": float(np.median(best[name] / best[full]))}  # fmt: skip
