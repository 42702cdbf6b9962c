"""Lanes: cells that train as one program. Each is an ordinary run, with its folder, rows, log and checkpoints; only the
step is computed for all of them at once, by `vmap` over what trains, on one frozen base."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .... import InputError
from ....atomic import atomic_write
from ...loop import Runner
from ...progress import Metrics
from ...runs import record
from ...runs.checkpoint import CheckpointWriter
from ...runs.resume import RunSaver, accepted_changes
from ...setup import TrainSetup, compiler_options, initial_layout
from ..base_cache import BaseCache
from .groups import Group, batch_shapes, lane_step
from .results import diverged, told
from .trials import Trial

Tree = Any


class Stack:
    """The state of K lanes as one, and the program that takes a step of all of them.

    On several devices each has K / n lanes and the whole frozen base. Where there are fewer lanes than K, the last one
    is there several times.
    """

    def __init__(
        self, group: Group, which: list[int], phases: list[TrainSetup], K: int, devices: list[Any], ground: BaseCache
    ):
        params = ground.model(group.run)[1]
        shapes = jax.eval_shape(lambda: params)
        self.own = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), phase.state) for phase in phases]
        self.K, self.model = K, phases[0].model
        n = min(K, len(devices))  # which K divides by: see `balanced`
        self.mesh = Mesh(np.array(devices[:n]), ("lanes",))
        self.split = NamedSharding(self.mesh, P("lanes"))
        like = initial_layout(group.run, shapes).shapes[1]
        self.state = self.put([jax.tree.map(_padded, phase.state, like) for phase in phases])
        self.frozen = jax.device_put(phases[0].frozen, NamedSharding(self.mesh, P()))
        numbers = [{name: np.float32(group.value(name, i)) for name in group.numbers} for i in which]
        self.numbers = self.put(numbers)
        sizes = [sum(x.size for x in jax.tree.leaves(state.trainable)) for state in (like, *self.own)]
        self.shares = [(sizes[0] / size) ** 0.5 for size in sizes[1:]]  # of rms over more numbers, which are 0
        for phase in phases:
            phase.state = None  # type: ignore[assignment]  # one copy
        self._compile(group)

    def _compile(self, group: Group) -> None:
        step: Any = jax.vmap(lane_step(self.model, group.run), in_axes=(0, None, 0, 0))
        if self.mesh.size > 1:
            lanes, whole = P("lanes"), P()  # no lane needs another: nothing is exchanged, and nothing need be checked
            step = jax.shard_map(step, mesh=self.mesh, in_specs=(lanes, whole, lanes, lanes), out_specs=lanes,
                                 check_vma=False)  # fmt: skip
        struct = lambda x: jax.ShapeDtypeStruct((self.K, *x.shape), x.dtype, sharding=self.split)  # noqa: E731
        batch, began = jax.tree.map(struct, batch_shapes(group.run)), time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self.frozen, batch, self.numbers)
        self.step = lowered.compile(compiler_options=compiler_options(self.frozen, self.model))
        m: Any = self.step.memory_analysis()
        self.peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        self.seconds = time.perf_counter() - began

    def put(self, trees: list[Tree]) -> Tree:
        """The trees of the lanes as one, on the devices."""
        trees = jax.device_get(trees)
        trees = trees + trees[-1:] * (self.K - len(trees))
        return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees), self.split)

    def take(self, batch: Tree) -> dict[str, Any]:
        """A step of all lanes; returns its metrics [K]."""
        self.state, metrics = self.step(self.state, self.frozen, batch, self.numbers)
        return metrics

    def split_up(self) -> list[Tree]:
        """Each lane's own state, without what it was filled up with, on the host."""
        whole = jax.device_get(self.state)
        cut = lambda k: lambda x, like: x[k][tuple(map(slice, like.shape))]  # noqa: E731
        return [jax.tree.map(cut(k), whole, own) for k, own in enumerate(self.own)]


def _padded(x: Any, like: Any) -> Any:
    x = np.asarray(x)
    return np.pad(x, [(0, n - m) for n, m in zip(like.shape, x.shape, strict=True)]) if x.ndim else x


class Lane:
    """A cell at work."""

    def __init__(self, cell: Trial, ground: BaseCache, guard: Any):
        self.cell, self.run, self.folder = cell, cell.run, Path(cell.run.out)
        self.phase = ground.phase(cell.run)
        # Two at least: killed between the saves of two lanes, both have the step before.
        self.checkpoints = CheckpointWriter(self.folder / "checkpoints", max(cell.run.keep, 2), guard)
        self.log: Any = None
        self.dead = diverged(cell)  # and stopped alone
        self.died = ""

    def begin(self, at: int) -> None:
        """Go on from a step; later ones make way. A dead lane only keeps its place."""
        if self.dead:
            self.course = Runner(self.phase, RunSaver(self.phase, self.folder, self.checkpoints))
            return
        steps = self.checkpoints.steps()
        mine = at if at in steps else None
        taken = accepted_changes(self.phase, self.checkpoints.manifest(at)) if mine else []
        self.course = Runner(self.phase, RunSaver(self.phase, self.folder, self.checkpoints, mine, taken))
        record.make_run_folder(self.folder)
        if told(self.cell).get("steps", 0) > at:
            (self.folder / "summary.json").unlink()
        record.write_first_files(self.phase, self.folder, self.checkpoints, at, [step for step in steps if step > at])
        self.phase.state = jax.device_get(self.phase.state)
        self.log = Metrics(self.folder, self.course.first_step, tensorboard=self.run.tensorboard)

    def feed(self) -> dict[str, np.ndarray]:
        """The next rows; a dead lane's have no targets, so that it changes nothing."""
        rows = self.course.next_batch()
        return rows | {"weights": np.zeros_like(rows["weights"])} if self.dead else rows

    def took(self, steps: list[tuple[int, dict[str, Any]]], k: int, share: float) -> None:
        """What the steps gave in place k of a stack."""
        for i, metrics in steps if not self.dead else ():
            row = {name: values[k] for name, values in metrics.items()}
            self.course.add_metrics(i, row | {"update_rms": row["update_rms"] * share})

    def write(self) -> None:
        """Log the steps since the last time; the lane is dead if too many in a row were bad."""
        if self.dead:
            return
        try:
            self.course.log(self.log)
        except InputError as error:
            self.dead, self.died = True, str(error).partition(", so the run stops")[0]

    def die(self, why: str) -> None:
        """End the lane, with a mark in its folder that says so."""
        self.dead, self.died = True, why
        atomic_write(self.folder / "bad_rows.json", json.dumps({"steps": {}, "why": why}, indent=1) + "\n")

    def close(self) -> None:
        """Close files and threads. InputError if the last save failed."""
        if self.log:
            self.log.close()
        self.course.loader.close()
        self.checkpoints.close()


def common_step(lanes: list[Lane], until: int) -> int:
    """The newest step, no later than `until`, that every living lane has whole; 0: none."""
    living = [lane.checkpoints for lane in lanes if not lane.dead]
    steps = set.intersection(*(set(c.steps()) for c in living)) if living else set()
    verify = lanes[0].run.verify
    whole = (s for s in sorted(steps, reverse=True) if s <= until and not any(c.damage(s, verify) for c in living))
    return next(whole, 0)
