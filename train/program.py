"""What a run compiles: the layout of its state, and the step. A plan makes the same from shapes alone."""

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
from ..peft import partition
from ..peft.sharding import adapter_shardings, frozen_shardings
from .config import Run
from .optim import make_optimizer
from .step import init_state, make_train_step

KEYS = {"ids": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "segments": jnp.int32, "positions": jnp.int32}


class Start(NamedTuple):
    """How a run begins: `begin(params) -> (frozen, state)`."""

    begin: Callable[[Any], Any]
    tx: Any
    trainable: Any  # shapes
    made: Any  # shapes of (frozen, state)


class Layout(NamedTuple):
    """The same on a mesh: begins with the fields of Start."""

    begin: Callable[[Any], Any]
    tx: Any
    trainable: Any  # shapes
    made: Any  # shapes of (frozen, state)
    where: Any  # their shardings


def base_shapes(run: Run, config: Config) -> Any:
    """The shapes of a run's base as it holds it: quantised, if the run says so."""
    shapes, kind = shapes_of(config), run.quantize
    return jax.eval_shape(lambda p: quantize(p, kind), shapes) if kind else shapes


def start(run: Run, shapes: Any) -> Start:
    """How a run begins from a base of these shapes."""
    method, key = run.method, jax.random.key(run.seed + 1)
    trainable = jax.eval_shape(lambda p: method.init(key, p), shapes)
    tx = make_optimizer(run.optim, trainable, run.steps, method)

    def begin(params: Any) -> Any:
        frozen, trainable = partition(method, params, key)
        return frozen, init_state(trainable, tx, bool(run.optim.spike), seed=run.seed)

    return Start(begin, tx, trainable, jax.eval_shape(begin, shapes))


def layout(run: Run, mesh: Any, shapes: Any) -> Layout:
    """The layout of a run on a mesh from the shapes of its base. Raises InputError for what does not divide."""
    split, first = shardings(mesh, shapes), start(run, shapes)
    frozen = frozen_shardings(mesh, first.made[0], shapes, split)
    state = adapter_shardings(mesh, run.method, first.made[1], shapes, split)
    if run.offload:
        state = state._replace(opt_state=on_host(first.made[1].opt_state, state.opt_state, mesh))
    return Layout(*first, (frozen, state))


def check_batch(run: Run, mesh: Any) -> None:
    """InputError for rows or positions that do not divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * run.accumulate
    if run.data.batch % parts:
        raise InputError(f"--data.batch {run.data.batch} does not divide into {parts} (data x fsdp x accumulate)")
    if run.data.T % mesh.shape["context"]:
        raise InputError(f"--data.T {run.data.T} does not divide over context = {mesh.shape['context']}")


def on_host(shapes: Any, where: Any, mesh: Any) -> Any:
    """Shardings of the same layout in the hosts' memory, counts aside. InputError where devices cannot read it."""
    kind, one = "pinned_host", None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    if one and kind not in {m.kind for m in one.addressable_memories()}:
        raise InputError(f"--offload: {one.device_kind} reads no host memory; drop the flag")
    return jax.tree.map(lambda x, s: s.with_memory_kind(kind) if x.ndim else s, shapes, where)


def lower(phase: Any) -> tuple[Any, Any]:
    """(the lowered step, compiler options) of a phase whose `frozen` and `state` are arrays, or shapes with
    shardings."""
    run, platform = phase.run, phase.mesh.devices.flat[0].platform
    parts: dict[str, Any] = {"accumulate": run.accumulate, "chunk": run.chunk, "spike": run.optim.spike}
    step = make_train_step(phase.model, phase.method, phase.tx, **parts)
    shape, split = (run.data.batch, run.data.T), batch_sharding(phase.mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in KEYS.items()}
    where = jax.tree.map(lambda x: x.sharding, phase.state)
    with target_backend(platform):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        lowered = jitted.lower(phase.state, phase.frozen, batch)
        return lowered, compiler_options(phase.frozen, phase.model)


def compiler_options(frozen: Any, model: Transformer) -> dict[str, Any] | None:
    """XLA would cast a whole stack of half-precision layers before its loop: on a CPU, twice the base in fp32."""
    stored = {x.dtype for x in jax.tree.leaves(frozen)}
    lean = backend() == "cpu" and bool(stored - {jnp.dtype(model.config.dtype)})
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if lean else None
