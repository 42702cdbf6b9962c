"""Memory, FLOPs and traffic of a step on one device without a compiler: the step, traced with the device's shapes.

A device of a mesh computes a small model: its share of the rows, the heads, F and V. The weights of a layer are
gathered over fsdp when they are read, and their gradients are scattered. So the step is traced with those sizes (no
array is made), and `trace` computes which arrays are alive at the same time.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from ...model import Config, Transformer
from ...model.backend import target_backend
from ...model.tree import in_layers, is_stacked, paths
from ..config import Run
from ..setup import BATCH_DTYPES, Layout, base_shapes, initial_layout
from ..step import State, make_train_step
from .hlo import Collective
from .trace import Cost, DeviceSizes, nbytes, trace_cost


def trace_step(run: Run, config: Config, mesh: Any, placed: Layout, platform: str) -> Cost:
    """Return the cost of a step on one device of a mesh."""
    axes, local = mesh.shape, device_config(config, mesh.shape["tensor"])
    shape = (run.data.batch // (axes["data"] * axes["fsdp"]), run.data.T)
    device_mesh = AbstractMesh((1, 1, 1, axes["context"]), tuple(axes), (AxisType.Auto,) * 4)
    with target_backend(platform), jax.sharding.use_abstract_mesh(device_mesh):
        first = initial_layout(run, base_shapes(run, local))
        frozen, state = first.shapes
        step = make_train_step(Transformer(local), run.method, first.tx, accumulate=run.accumulate, chunk=run.chunk)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
        closed = jax.make_jaxpr(step)(state, frozen, batch)
    sizes = DeviceSizes(
        kept_share=_kept_shares(first.trainable, placed),
        # XLA's CPU backend adds the gradients of all devices in another whole array before the device takes its part.
        gradient_copies=int(platform == "cpu" and mesh.size > axes["tensor"]),
        early_casts=platform == "cpu",
        tokens=math.prod(shape),
        context=axes["context"],
        weight_shapes=_weight_shapes((frozen, state)),
    )
    cost = trace_cost(closed, sizes, _donated(state, run.offload), _gathered((state, frozen), placed))
    if platform == "cpu" and config.tied:
        cost.peak += _transposed_tables(placed)
    return cost


def _transposed_tables(placed: Layout) -> float:
    """Return the bytes of the copies that XLA's CPU backend makes of a tied, trained table and of its moments.

    Its programs transpose each at their beginning, and keep the copy during the whole step.
    """
    shapes, shardings = placed.shapes[1], placed.shardings[1]
    leaves = jax.tree.leaves((shardings.trainable, shardings.opt_state))
    pairs = zip(paths((shapes.trainable, shapes.opt_state)), leaves, strict=True)
    return sum(shard_bytes(x, sharding) for (path, x), sharding in pairs if path.endswith("embed/table"))


def device_config(config: Config, n: int) -> Config:
    """Return the model that one of n devices of the tensor axis computes."""
    N, K, F, V = (max(x // n, 1) for x in (config.N, config.K, config.F, config.V))
    return dataclasses.replace(config, N=N, K=K, F=F, V=V)


def _kept_shares(trainable: Any, placed: Layout) -> dict[tuple[int, ...], float]:
    """Return {shape of a traced gradient, or of a layer of a stacked one: the share that a device keeps}."""
    real = jax.tree.leaves(jax.tree.map(shard_bytes, placed.trainable, placed.shardings[1].trainable))
    shares: dict[tuple[int, ...], float] = {}
    for (path, x), n in zip(paths(trainable), real, strict=True):
        share = min(n / nbytes(x), 1.0)
        shares[x.shape] = share
        if is_stacked(path) and x.ndim > 2:
            shares[x.shape[1:]] = share
    return shares


def shard_bytes(x: Any, sharding: Any) -> float:
    """Return the bytes of an array's shard on one device; 0 if it is in host memory."""
    if sharding.memory_kind == "pinned_host":
        return 0.0
    return float(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize)


def _weight_shapes(tree: Any) -> frozenset[tuple[int, ...]]:
    """Return the shapes of parameters, of one layer and transposed too; these are not split over context."""
    shapes = {x.shape for x in jax.tree.leaves(tree)}
    shapes |= {shape[1:] for shape in shapes if shape}
    return frozenset(shapes | {(*s[:-2], s[-1], s[-2]) for s in shapes if len(s) > 1})


def _donated(state: State, offload: bool) -> list[int]:
    """Return the outputs of a step that overwrite the state; an optimizer state on the host is not overwritten."""
    donated = (state.step, state.trainable) if offload else state
    return list(range(len(jax.tree.leaves(donated))))


def _gathered(inputs: Any, placed: Layout) -> list[int]:
    """Return the inputs (state, frozen) that a device holds a shard of but reads whole; layer stacks are not among
    them, nor is the optimizer state."""
    frozen, state = placed.shardings
    shardings = jax.tree.leaves((state._replace(opt_state=None), frozen))
    indices = [(i, path) for i, (path, _) in enumerate(paths(inputs)) if not path.startswith("0/opt_state")]
    return [
        i
        for (i, path), sharding in zip(indices, shardings, strict=True)
        if sharding.mesh.shape.get("fsdp", 1) > 1 and "fsdp" in sharding.spec and not is_stacked(path)
    ]


def estimate_collectives(run: Run, config: Config, mesh: Any, placed: Layout) -> list[Collective]:
    """Return the collectives of a step by a model.

    In each microbatch the weights of layers are gathered over fsdp in the forward and in the backward pass, gradients
    are scattered over fsdp and reduced over data, activations are reduced over tensor, and keys gathered over context.
    """
    axes, A, L = mesh.shape, run.accumulate, config.L
    rows = run.data.batch // (axes["data"] * axes["fsdp"] * A)
    activations = rows * run.data.T // axes["context"] * config.D * jnp.dtype(config.dtype).itemsize
    keys = 2 * activations * axes["context"] * max(config.K * config.H // axes["tensor"], config.H) / config.D
    recomputed = config.remat in ("full", "attention")
    collectives = [
        *_parameter_collectives(placed, mesh, A),
        # The output of each sublayer is summed in the forward and in the backward pass, and so is the embedding's.
        # Recomputation repeats the sum of the attention's output only.
        Collective("all-reduce", ("tensor",), axes["tensor"], activations, A * (L * (4 + recomputed) + 2)),
        Collective("all-gather", ("context",), axes["context"], keys, A * L * (1 + recomputed)),
        Collective("reduce-scatter", ("context",), axes["context"], keys, A * L),
    ]
    return [c for c in collectives if c.size > 1 and c.nbytes]


def _parameter_collectives(placed: Layout, mesh: Any, accumulate: int) -> list[Collective]:
    """Return the collectives of parameters and of their gradients."""
    axes, collectives = mesh.shape, []
    frozen, trainable = placed.shardings[0], placed.shardings[1].trainable
    for shardings, shapes, trained in ((frozen, placed.shapes[0], False), (trainable, placed.trainable, True)):
        for (path, x), sharding in zip(paths(shapes), jax.tree.leaves(shardings), strict=True):
            n, split = shard_bytes(x, sharding), "fsdp" in sharding.spec
            if split:
                times = 2 * accumulate if in_layers(path) else 1
                collectives.append(Collective("all-gather", ("fsdp",), axes["fsdp"], n * axes["fsdp"], times))
            if trained and split:
                collectives.append(Collective("reduce-scatter", ("fsdp",), axes["fsdp"], n * axes["fsdp"], accumulate))
            if trained:
                reduced = ("data",) if split else ("data", "fsdp")
                size = math.prod(axes[a] for a in reduced)
                names = tuple(a for a in reduced if axes[a] > 1)
                collectives.append(Collective("all-reduce", names, size, n, accumulate))
    return collectives
