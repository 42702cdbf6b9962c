"""Lanes: trials that train as one program. Each is an ordinary run with its own folder, rows, log and checkpoints.

Only the step is shared: `jax.vmap` over what trains, on one copy of the frozen base.
"""

import json
import time
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
from .programs import Program, batch_shapes, lane_step
from .trials import Trial

Tree = Any


class LaneStack:
    """The states of K lanes stacked into one, and the compiled step of all of them.

    Each of n devices has K / n lanes and the whole frozen base. If there are fewer trials than K, copies of the last
    one fill the stack. The trials are those at `indices` of the program; the states of their setups move into it.
    """

    def __init__(
        self,
        program: Program,
        indices: list[int],
        setups: list[TrainSetup],
        K: int,
        devices: list[Any],
        cache: BaseCache,
    ):
        params = cache.model(program.run)[1]
        self.shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), s.state) for s in setups]
        self.K, self.model = K, setups[0].model
        n = min(K, len(devices))
        self.mesh = Mesh(np.array(devices[:n]), ("lanes",))
        self.lane_sharding = NamedSharding(self.mesh, P("lanes"))
        largest = initial_layout(program.run, jax.eval_shape(lambda: params)).shapes[1]
        self.state = self.put([jax.tree.map(_pad_like, setup.state, largest) for setup in setups])
        self.frozen = jax.device_put(setups[0].frozen, NamedSharding(self.mesh, P()))
        self.numbers = self.put([{k: np.float32(program.value(k, i)) for k in program.numbers} for i in indices])
        sizes = [sum(x.size for x in jax.tree.leaves(state.trainable)) for state in (largest, *self.shapes)]
        # The rms of an update is over the padded array, whose padding is 0: this factor gives that of the lane alone.
        self.rms_factors = [(sizes[0] / size) ** 0.5 for size in sizes[1:]]
        for setup in setups:
            setup.state = None  # type: ignore[assignment]  # one copy, in the stack
        self._compile(program)

    def _compile(self, program: Program) -> None:
        step: Any = jax.vmap(lane_step(self.model, program.run), in_axes=(0, None, 0, 0))
        if self.mesh.size > 1:  # lanes are independent: nothing is exchanged, and there is no replication to check
            lanes, whole = P("lanes"), P()
            step = jax.shard_map(step, mesh=self.mesh, in_specs=(lanes, whole, lanes, lanes), out_specs=lanes,
                                 check_vma=False)  # fmt: skip
        batch = {name: jax.ShapeDtypeStruct((self.K, *x.shape), x.dtype, sharding=self.lane_sharding)
                 for name, x in batch_shapes(program.run).items()}  # fmt: skip
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self.frozen, batch, self.numbers)
        self.step = lowered.compile(compiler_options=compiler_options(self.frozen, self.model))
        m: Any = self.step.memory_analysis()
        self.peak_bytes = (
            m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        )
        self.compile_seconds = time.perf_counter() - start

    def put(self, trees: list[Tree]) -> Tree:
        """Stack one tree a lane along a new first axis [K, ...], on the devices."""
        trees = jax.device_get(trees)
        trees = trees + trees[-1:] * (self.K - len(trees))
        return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees), self.lane_sharding)

    def train_step(self, batch: Tree) -> dict[str, Any]:
        """Train all lanes on a batch from `put`; return the metrics, each [K]."""
        self.state, metrics = self.step(self.state, self.frozen, batch, self.numbers)
        return metrics

    def unstack(self) -> list[Tree]:
        """Return the state of each lane, without padding, on the host."""
        stacked = jax.device_get(self.state)
        return [
            jax.tree.map(lambda x, like, k=k: x[k][tuple(map(slice, like.shape))], stacked, shapes)
            for k, shapes in enumerate(self.shapes)
        ]


def _pad_like(x: Any, like: Any) -> Any:
    x = np.asarray(x)
    return np.pad(x, [(0, n - m) for n, m in zip(like.shape, x.shape, strict=True)]) if x.ndim else x


class Lane:
    """A trial while it trains: its setup, rows, log and checkpoints."""

    def __init__(self, trial: Trial, cache: BaseCache, guard: Any):
        self.trial, self.run, self.folder = trial, trial.run, trial.folder
        self.setup = cache.setup(trial.run)
        # At least two: if the process is killed between the saves of two lanes, both still have the step before.
        self.checkpoints = CheckpointWriter(self.folder / "checkpoints", max(trial.run.keep, 2), guard)
        self.log: Any = None
        self.diverged = trial.diverged
        self.reason = ""  # why it diverged

    def start(self, step: int) -> None:
        """Load the checkpoint of a step (0: begin) and put later ones aside. A diverged lane only keeps its place."""
        if self.diverged:
            self.runner = Runner(self.setup, RunSaver(self.setup, self.folder, self.checkpoints))
            return
        steps = self.checkpoints.steps()
        loaded = step if step in steps else None
        accepted = accepted_changes(self.setup, self.checkpoints.manifest(step)) if loaded else []
        self.runner = Runner(self.setup, RunSaver(self.setup, self.folder, self.checkpoints, loaded, accepted))
        record.make_run_folder(self.folder)
        if self.trial.summary.get("steps", 0) > step:
            (self.folder / "summary.json").unlink()
        later = [other for other in steps if other > step]
        record.write_first_files(self.setup, self.folder, self.checkpoints, step, later)
        self.setup.state = jax.device_get(self.setup.state)
        self.log = Metrics(self.folder, self.runner.first_step, tensorboard=self.run.tensorboard)

    def next_batch(self) -> dict[str, np.ndarray]:
        """Return the next rows; those of a diverged lane have no targets, so that the step changes nothing."""
        rows = self.runner.next_batch()
        return rows | {"weights": np.zeros_like(rows["weights"])} if self.diverged else rows

    def add_metrics(self, steps: list[tuple[int, dict[str, Any]]], k: int, rms_factor: float) -> None:
        """Record the metrics [K] of steps, of which this lane has place k."""
        for i, metrics in steps if not self.diverged else ():
            row = {name: values[k] for name, values in metrics.items()}
            self.runner.add_metrics(i, row | {"update_rms": row["update_rms"] * rms_factor})

    def write_log(self) -> None:
        """Log the steps since the last call; the lane has diverged if too many steps in a row were skipped."""
        if self.diverged:
            return
        try:
            self.runner.log(self.log)
        except InputError as error:
            self.diverged, self.reason = True, str(error).partition(", so the run stops")[0]

    def mark_diverged(self, reason: str) -> None:
        """End the lane, and write the file that says so into its folder."""
        self.diverged, self.reason = True, reason
        atomic_write(self.folder / "bad_rows.json", json.dumps({"steps": {}, "why": reason}, indent=1) + "\n")

    def close(self) -> None:
        """Close files and threads. Raises InputError if the last save failed."""
        if self.log:
            self.log.close()
        self.runner.loader.close()
        self.checkpoints.close()


def common_step(lanes: list[Lane], until: int) -> int:
    """Return the newest step up to `until` of which every active lane has an intact checkpoint, or 0."""
    active = [lane.checkpoints for lane in lanes if not lane.diverged]
    steps = set.intersection(*(set(c.steps()) for c in active)) if active else set()
    verify = lanes[0].run.verify
    intact = (s for s in sorted(steps, reverse=True) if s <= until and not any(c.damage(s, verify) for c in active))
    return next(intact, 0)
