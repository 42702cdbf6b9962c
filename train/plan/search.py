"""`graftax plan --search`: meshes, recomputation and batches, by the model first; the best few are compiled."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ... import InputError
from ..config import Run
from .planner import planned
from .topology import Target

REMATS = ("none", "dots", "full")  # from the fastest to the leanest
BATCHES, PARTS = (1, 2, 4), (1, 2, 4, 8)  # times the run's batch; microbatches
KEEP, COMPILE = 3, 6  # how many are printed, and compiled at most to find them


def search(run: Run, target: Target, compiling: bool = True) -> tuple[list[dict[str, Any]], int]:
    """(the plans that fit, the most tokens a second first; how many were tried)."""
    found, tried = [], 0
    for shape in meshes(target.n, len(run.mesh) > 3):
        for times in BATCHES:
            for way in ways(run, shape, times):
                try:
                    row = planned(way, target, compiling=False)
                except InputError:  # heads, rows or a vocabulary that this mesh does not divide
                    continue
                tried += 1
                if row["fits"]:  # what recomputes more, or cuts the batch further, is slower
                    found.append((row, way))
                    break
    found.sort(key=lambda pair: -pair[0]["tokens_per_second"])
    if not compiling or not target.devices:
        return [row for row, _ in found[:KEEP]], tried
    kept: list[dict[str, Any]] = []
    for _, way in found[:COMPILE]:
        row = planned(way, target)
        kept += [row] if row["fits"] else []
        if len(kept) == KEEP:
            break
    return sorted(kept, key=lambda r: -r["tokens_per_second"]), tried


def meshes(n: int, context: bool) -> Iterator[tuple[int, ...]]:
    """All data x fsdp x tensor (x context) with product n; tensor and context up to 8, inside a host."""
    for fsdp in _divisors(n):
        for tensor in _divisors(n // fsdp):
            for parts in _divisors(n // fsdp // tensor) if context else [1]:
                if tensor <= 8 and parts <= 8:
                    yield (n // (fsdp * tensor * parts), fsdp, tensor, parts)


def ways(run: Run, shape: tuple[int, ...], times: int) -> Iterator[Run]:
    """The run on a mesh with a larger batch: the least recomputation first, then more microbatches."""
    rows, batch = math.prod(shape[:2]), run.data.batch * times
    for remat in REMATS:
        for parts in PARTS:
            if batch % (rows * parts) == 0:
                data = dataclasses.replace(run.data, batch=batch)
                yield with_remat(dataclasses.replace(run, mesh=shape, accumulate=parts, data=data), remat)


def with_remat(run: Run, remat: Any) -> Run:
    """The run with other recomputation; pretraining has it in its architecture."""
    model = run.model and dataclasses.replace(run.model, remat=remat)
    return dataclasses.replace(run, remat=remat, model=model)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
