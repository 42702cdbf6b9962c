"""`graftax plan --search`: meshes, recomputation and batches, by the model first; the best few are compiled."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ... import InputError
from ..config import Run
from .planner import make_plan
from .topology import Target

REMATS = ("none", "dots", "full")  # from the fastest to the smallest in memory
BATCH_FACTORS, ACCUMULATE = (1, 2, 4), (1, 2, 4, 8)
MAX_PLANS, MAX_COMPILED = 3, 6  # plans returned, and compiled at most to find them


def search(run: Run, target: Target, compiling: bool = True) -> tuple[list[dict[str, Any]], int]:
    """Return (the plans that fit, sorted by tokens/s; the number of variants tried)."""
    fitting, tried = [], 0
    for mesh in meshes(target.n, len(run.mesh) > 3):
        for factor in BATCH_FACTORS:
            for variant in variants(run, mesh, factor):
                try:
                    plan = make_plan(variant, target, compiling=False)
                except InputError:  # this mesh does not divide the heads, the rows or the vocabulary
                    continue
                tried += 1
                if plan["fits"]:  # more recomputation or more microbatches would be slower
                    fitting.append((plan, variant))
                    break
    fitting.sort(key=lambda pair: -pair[0]["tokens_per_second"])
    if not compiling or not target.devices:
        return [plan for plan, _ in fitting[:MAX_PLANS]], tried
    compiled: list[dict[str, Any]] = []
    for _, variant in fitting[:MAX_COMPILED]:
        plan = make_plan(variant, target)
        if plan["fits"]:
            compiled.append(plan)
        if len(compiled) == MAX_PLANS:
            break
    return sorted(compiled, key=lambda plan: -plan["tokens_per_second"]), tried


def meshes(n: int, context: bool) -> Iterator[tuple[int, ...]]:
    """Yield all data x fsdp x tensor x context with product n; tensor and context are at most 8, one host."""
    for fsdp in _divisors(n):
        for tensor in _divisors(n // fsdp):
            for parts in _divisors(n // fsdp // tensor) if context else [1]:
                if tensor <= 8 and parts <= 8:
                    yield (n // (fsdp * tensor * parts), fsdp, tensor, parts)


def variants(run: Run, mesh: tuple[int, ...], batch_factor: int) -> Iterator[Run]:
    """Yield the run on a mesh with a larger batch: the least recomputation first, then more microbatches."""
    shards, batch = math.prod(mesh[:2]), run.data.batch * batch_factor
    data = dataclasses.replace(run.data, batch=batch)
    for remat in REMATS:
        # Pretraining has the recomputation in its architecture.
        model: Any = run.model and dataclasses.replace(run.model, remat=remat)
        for accumulate in ACCUMULATE:
            if batch % (shards * accumulate) == 0:
                yield dataclasses.replace(run, mesh=mesh, accumulate=accumulate, data=data, remat=remat, model=model)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
