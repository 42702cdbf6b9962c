"""How many lanes at once: as many as the plan says fit, fewer if a short timing of a few numbers finds that faster."""

import math
import time
from typing import Any

import jax
import numpy as np

from ...plan.estimate import traced
from ...plan.planner import held
from ...plan.topology import target
from ...progress import console, format_time
from ...runs.report import format_bytes
from ...setup import BATCH_DTYPES, layout
from ..base_cache import BaseCache
from .groups import Group
from .lanes import Stack

ROOM = 0.8  # part of the memory that lanes may take
PAYS = 5.0  # trying another number must cost less than what is left over this


def predicted(group: Group, ground: BaseCache) -> tuple[float, float]:
    """Bytes of the frozen base, and of each lane besides, by the plan's model of a step."""
    run, (model, params) = group.run, ground.model(group.run)
    laid = layout(run, ground.mesh, jax.eval_shape(lambda: params))
    sizes = held(laid)
    peak = traced(run, model.config, ground.mesh, laid, jax.devices()[0].platform).peak
    return sizes["weights"], sizes["trainable"] + sizes["optimizer"] + peak


def balanced(n: int, most: int, devices: int) -> int:
    """Lanes of a chunk, if n lanes are cut into as few chunks of at most `most` as will do, all of one size."""
    K = math.ceil(n / math.ceil(n / most))
    return math.ceil(K / devices) * devices if devices < K else K


def lanes_that_fit(group: Group, ground: BaseCache, wanted: int, devices: list[Any]) -> int:
    """The largest number of lanes to train at once; `wanted`, if it is not 0."""
    n = len(group.cells)
    if wanted:
        return min(wanted, n)
    chip = target("").chip
    weights, lane = predicted(group, ground)
    fit = max(int((ROOM * chip.memory - weights) / lane), 1) * len(devices)
    most = min(fit, n)
    said = f"a lane needs {format_bytes(lane)} beside the base's {format_bytes(weights)}, so {fit} fit"
    tries, found = [K for K in dict.fromkeys((most, most // 4, 1)) if K], {}
    if len(tries) == 1:
        return most
    for K in tries:
        found[K], compiling = timed(group, ground, K, devices)
        left = found[min(found, key=lambda k: found[k])] * n * group.run.steps
        if compiling * PAYS > left:  # no time to look further
            break
    best = min(found, key=lambda k: (round(found[k], 4), -k))
    times = ", ".join(f"{K}: {1 / t:.2f}" for K, t in found.items())
    console.print(f"{said}; lane-steps a second by lanes at once: {times}; taking {best}, about "
                  f"{format_time(found[best] * n * group.run.steps)} for {n} lanes of {group.run.steps} steps",
                  soft_wrap=True)  # fmt: skip
    return best


def timed(group: Group, ground: BaseCache, K: int, devices: list[Any], steps: int = 3) -> tuple[float, float]:
    """(seconds of a step over its lanes, seconds of compiling) with K lanes at once."""
    K = balanced(K, K, len(devices))
    which = list(range(min(K, len(group.cells))))
    stack = Stack(group, which, [ground.phase(group.cells[i].run) for i in which], K, devices, ground)
    shape = (group.run.data.batch, group.run.data.T)
    batch = {name: np.ones(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
    given, took = stack.put([batch]), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        jax.block_until_ready(stack.take(given))
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:])) / K, stack.seconds
