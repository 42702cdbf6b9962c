"""A step's memory, FLOPs and traffic on one device without a compiler: the same step, traced at a device's share.

A device of a mesh computes as a small model does: its rows, its heads, its part of F and V. The weights of a layer are
gathered over fsdp when they are read, and their gradients are scattered again. So the step is traced with those sizes
(no array is made), and `trace` says what lives at once.
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
from .trace import Cost, Sizes, cost, nbytes


def traced(run: Run, config: Config, mesh: Any, layout: Layout, platform: str) -> Cost:
    """The cost of a step on one device of a mesh, by a trace."""
    at, small = mesh.shape, share(config, mesh.shape["tensor"])
    shape = (run.data.batch // (at["data"] * at["fsdp"]), run.data.T)
    alone = AbstractMesh((1, 1, 1, at["context"]), tuple(at), (AxisType.Auto,) * 4)
    with target_backend(platform), jax.sharding.use_abstract_mesh(alone):
        first = initial_layout(run, base_shapes(run, small))
        frozen, state = first.shapes
        step = make_train_step(Transformer(small), run.method, first.tx, accumulate=run.accumulate, chunk=run.chunk)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
        closed = jax.make_jaxpr(step)(state, frozen, batch)
    # XLA's CPU backend adds gradients up into another array, the whole of it, and then takes the device's part.
    copies = int(platform == "cpu" and mesh.size > at["tensor"])
    parts = _parts(first.trainable, layout)
    sizes = Sizes(parts, copies, platform == "cpu", math.prod(shape), at["context"], _weights((frozen, state)))
    found = cost(closed, sizes, _donated(state, run.offload), _gathered((state, frozen), layout))
    if platform == "cpu" and config.tied:
        found.peak += _turned_tables(layout)
    return found


def _turned_tables(layout: Layout) -> float:
    """XLA's CPU backend keeps a tied table that trains, and its moments, in the other order besides for all of a step.

    Seen in its programs: a copy of each at the beginning.
    """
    shapes, shardings = layout.shapes[1], layout.shardings[1]
    splits = jax.tree.leaves((shardings.trainable, shardings.opt_state))
    pairs = zip(paths((shapes.trainable, shapes.opt_state)), splits, strict=True)
    return sum(shard(x, where) for (path, x), where in pairs if path.endswith("embed/table"))


def share(config: Config, n: int) -> Config:
    """What one of n devices of the tensor axis has of a model."""
    N, K, F, V = (max(x // n, 1) for x in (config.N, config.K, config.F, config.V))
    return dataclasses.replace(config, N=N, K=K, F=F, V=V)


def _parts(trainable: Any, layout: Layout) -> dict[tuple[int, ...], float]:
    """{shape of a traced gradient, or of one layer's in a stack: what of it a device keeps}."""
    real = jax.tree.leaves(jax.tree.map(shard, layout.trainable, layout.shardings[1].trainable))
    found: dict[tuple[int, ...], float] = {}
    for (path, x), n in zip(paths(trainable), real, strict=True):
        part = min(n / nbytes(x), 1.0)
        found |= {x.shape: part} | ({x.shape[1:]: part} if is_stacked(path) and x.ndim > 2 else {})
    return found


def shard(x: Any, where: Any) -> float:
    """Bytes of an array's part on one device; none if it is in the host's memory."""
    if where.memory_kind == "pinned_host":
        return 0.0
    return float(math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize)


def _weights(tree: Any) -> frozenset[tuple[int, ...]]:
    """The shapes that parameters have, one layer's and transposed ones too: these are not split over context."""
    found = {x.shape for x in jax.tree.leaves(tree)}
    found |= {s[1:] for s in found if s}
    return frozenset(found | {(*s[:-2], s[-1], s[-2]) for s in found if len(s) > 1})


def _donated(state: State, offload: bool) -> list[int]:
    """The outputs of a step that are written where the state was; the optimizer's are not, if it lies on the host."""
    n = len(jax.tree.leaves(state))
    first = len(jax.tree.leaves((state.step, state.trainable)))
    return list(range(first if offload else n))


def _gathered(inputs: Any, layout: Layout) -> list[int]:
    """The inputs (state, frozen), layer stacks aside, of which a device holds a part and computes with the whole."""
    frozen, state = layout.shardings
    where = jax.tree.leaves((state._replace(opt_state=None), frozen))
    given = [(i, path) for i, (path, _) in enumerate(paths(inputs)) if not path.startswith("0/opt_state")]
    return [i for (i, path), s in zip(given, where, strict=True)
            if s.mesh.shape.get("fsdp", 1) > 1 and "fsdp" in s.spec and not is_stacked(path)]  # fmt: skip


def links(run: Run, config: Config, mesh: Any, layout: Layout) -> list[Collective]:
    """The collectives of a step, as a model: per microbatch, weights of layers are gathered over fsdp forwards and
    backwards, gradients are scattered over it and reduced over data; tensor reduces activations, context gathers keys.
    """
    at, A, L = mesh.shape, run.accumulate, config.L
    rows = run.data.batch // (at["data"] * at["fsdp"] * A)
    states = rows * run.data.T // at["context"] * config.D * jnp.dtype(config.dtype).itemsize
    keys = 2 * states * at["context"] * max(config.K * config.H // at["tensor"], config.H) / config.D
    again = config.remat in ("full", "attention")
    found = [*_weight_links(layout, mesh, A)]
    # Forwards and backwards each sublayer's output is summed; of what is recomputed attention's alone.
    # And the embedding's.
    found.append(Collective("all-reduce", ("tensor",), at["tensor"], states, A * (L * (4 + again) + 2)))
    found.append(Collective("all-gather", ("context",), at["context"], keys, A * L * (1 + again)))
    found.append(Collective("reduce-scatter", ("context",), at["context"], keys, A * L))
    return [c for c in found if c.size > 1 and c.nbytes]


def _weight_links(layout: Layout, mesh: Any, A: int) -> list[Collective]:
    """The collectives of parameters and their gradients."""
    at, found = mesh.shape, []
    frozen, trainable = layout.shardings[0], layout.shardings[1].trainable
    for tree, shapes, trains in ((frozen, layout.shapes[0], False), (trainable, layout.trainable, True)):
        for (path, x), where in zip(paths(shapes), jax.tree.leaves(tree), strict=True):
            n, split = shard(x, where), "fsdp" in where.spec
            if split:
                times = 2 * A if in_layers(path) else 1
                found.append(Collective("all-gather", ("fsdp",), at["fsdp"], n * at["fsdp"], times))
            if trains and split:
                found.append(Collective("reduce-scatter", ("fsdp",), at["fsdp"], n * at["fsdp"], A))
            if trains:
                axes = ("data",) if split else ("data", "fsdp")
                size = math.prod(at[a] for a in axes)
                found.append(Collective("all-reduce", tuple(a for a in axes if at[a] > 1), size, n, A))
    return found
