"""What a run compiles and holds in memory: the layout of its state on the mesh, the compiled step, and its data.

`layout` and `lower` need shapes only, so a plan of a run makes the same program as the run itself.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from .. import InputError
from ..model import Config, Transformer, shapes_of
from ..model.backend import backend, target_backend
from ..model.quantize import quantize
from ..model.sharding import batch_sharding, shardings
from ..peft import Chain, Method, partition
from ..peft.sharding import adapter_shardings, frozen_shardings
from .config import Run
from .optim import make_optimizer
from .step import State, init_state, make_train_step

BATCH_DTYPES = {
    "ids": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "segments": jnp.int32,
    "positions": jnp.int32,
}


@dataclasses.dataclass
class TrainSetup:
    """All that a run needs in memory before its first step."""

    run: Run
    mesh: Any
    model: Transformer
    method: Method
    frozen: Any
    state: State
    tx: Any
    rows: Any  # the endless stream of training rows
    data_digest: str
    tokenizer: Any
    held_out: dict[str, Any]  # the held-out rows of the base's domains
    task: Any = None
    valid: list[Any] = dataclasses.field(default_factory=list)  # the task's validation rows, packed
    base_fingerprint: str = ""  # empty for a pretraining run
    totals: dict[str, int] = dataclasses.field(default_factory=dict)  # parameters and bytes of the base and the method
    data_sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # tokens or examples, to describe a change
    lineage: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the base
    untrained_tokens: dict[str, int] = dataclasses.field(default_factory=dict)  # added tokens whose rows stay untrained


class Layout(NamedTuple):
    """How a run begins: `begin(params) -> (frozen, state)`, and the shapes and shardings of both."""

    begin: Callable[[Any], Any]
    tx: Any
    trainable: Any  # shapes
    shapes: Any  # of (frozen, state)
    shardings: Any = None  # of (frozen, state); None without a mesh

    def materialize(self, params: Any) -> tuple[Any, State]:
        """Return (frozen, state) on the mesh. `params` is donated, so that the base is never in memory twice."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return jax.jit(self.begin, out_shardings=self.shardings, donate_argnums=0)(params)


def base_shapes(run: Run, config: Config) -> Any:
    """Return the shapes of a run's base, quantised if the run quantises it."""
    shapes, kind = shapes_of(config), run.quantize
    return jax.eval_shape(lambda p: quantize(p, kind), shapes) if kind else shapes


def initial_layout(run: Run, shapes: Any) -> Layout:
    """Return the layout of a run without a mesh, from the shapes of its base."""
    method, key = run.method, jax.random.key(run.seed + 1)
    trainable = jax.eval_shape(lambda p: method.init(key, p), shapes)
    tx = make_optimizer(run.optim, trainable, run.steps, method)

    def begin(params: Any) -> Any:
        frozen, trainable = partition(method, params, key)
        return frozen, init_state(trainable, tx, bool(run.optim.spike), seed=run.seed)

    return Layout(begin, tx, trainable, jax.eval_shape(begin, shapes))


def layout(run: Run, mesh: Any, shapes: Any) -> Layout:
    """Return the layout of a run on a mesh, from the shapes of its base. Raises InputError for an axis that does not
    divide over the mesh."""
    local = initial_layout(run, shapes)
    base = shardings(mesh, shapes)
    frozen = frozen_shardings(mesh, local.shapes[0], shapes, base)
    state = adapter_shardings(mesh, run.method, local.shapes[1], shapes, base)
    if run.offload:
        state = state._replace(opt_state=offloaded(local.shapes[1].opt_state, state.opt_state, mesh))
    return local._replace(shardings=(frozen, state))


def check_batch(run: Run, mesh: Any) -> None:
    """Raise InputError if rows or positions do not divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * run.accumulate
    if run.data.batch % parts:
        raise InputError(f"--data.batch {run.data.batch} does not divide into {parts} (data x fsdp x accumulate)")
    if run.data.T % mesh.shape["context"]:
        raise InputError(f"--data.T {run.data.T} does not divide over context = {mesh.shape['context']}")


def offloaded(shapes: Any, shardings: Any, mesh: Any) -> Any:
    """Return the same shardings in host memory; scalars stay on the device.

    Raises InputError where devices cannot read host memory.
    """
    device = None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    if device and "pinned_host" not in {m.kind for m in device.addressable_memories()}:
        raise InputError(f"--offload: {device.device_kind} reads no host memory; drop the flag")
    return jax.tree.map(lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s, shapes, shardings)


def lower(setup: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return (the lowered step, compiler options). `setup.frozen` and `setup.state` are arrays, or shapes with
    shardings."""
    run, platform = setup.run, setup.mesh.devices.flat[0].platform
    step = make_train_step(
        setup.model, setup.method, setup.tx, accumulate=run.accumulate, chunk=run.chunk, spike=run.optim.spike
    )
    shape, sharding = (run.data.batch, run.data.T), batch_sharding(setup.mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_DTYPES.items()}
    state_shardings = jax.tree.map(lambda x: x.sharding, setup.state)
    with target_backend(platform):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
        lowered = jitted.lower(setup.state, setup.frozen, batch)
        return lowered, compiler_options(setup.frozen, setup.model)


def compiler_options(frozen: Any, model: Transformer) -> dict[str, Any] | None:
    """Keep XLA from casting a whole stack of half-precision layers before its loop: on a CPU that holds the base in
    fp32 a second time."""
    stored = {x.dtype for x in jax.tree.leaves(frozen)}
    casts = backend() == "cpu" and bool(stored - {jnp.dtype(model.config.dtype)})
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if casts else None


def compile_step(setup: TrainSetup) -> tuple[Any, dict[str, Any]]:
    """Return the compiled step, the seconds its compilation took, and the bytes per device it needs."""
    start = time.perf_counter()
    lowered, options = lower(setup)
    compiled = lowered.compile(compiler_options=options)
    m: Any = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    seconds = round(time.perf_counter() - start, 2)
    return compiled, {"compile_seconds": seconds, "step_temp_bytes": m.temp_size_in_bytes, "step_peak_bytes": peak}


def virtual_tokens(method: Method, params: Any) -> int:
    """Return the number of positions that a method puts before the text; computes shapes only."""
    lengths = []
    jax.eval_shape(lambda p: lengths.append(method.context(method.init(jax.random.key(0), p)).length), params)
    return lengths[0]


def resolve_method(method: Any, tokenizer: Any, seed: int | None = None) -> Any:
    """Return the method as one run uses it: with the token ids of its initial text, and the run's seed where the
    method draws numbers and names no seed."""
    if isinstance(method, Chain):
        return Chain(tuple((name, resolve_method(link, tokenizer, seed)) for name, link in method.methods))
    text = getattr(method, "text", "")
    method = dataclasses.replace(method, ids=tuple(tokenizer.prompt(text))) if text else method
    return dataclasses.replace(method, seed=seed) if getattr(method, "seed", 0) is None else method
