"""Law 6 on every mesh: the losses of one device, whatever is split, the positions of a row too; what is gathered."""

import re
from functools import cache

import jax
import numpy as np
import pytest
from graftax.model.sharding import put_batch
from graftax.peft import LoRA, Prefix, Prompt, Subset
from tiny import make_base, make_batch, on_mesh

BASE = make_base(V=64, L=3)  # 8 devices divide V; no batch has 3 rows
METHODS = {"full": Subset("all"), "lora": LoRA(), "prefix": Prefix(tokens=3), "prompt": Prompt(tokens=3)}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (1, 1, 1, 8), (2, 1, 1, 4), (1, 2, 2, 2)]


@cache
def losses(name, shape, steps=10, **kwargs):
    """(loss, norm of the gradient) of the first steps."""
    mesh, begin, step = on_mesh(BASE, METHODS[name], shape, **kwargs)
    found = []
    with jax.set_mesh(mesh):
        frozen, state = begin()
        for i in range(steps):
            batch = {k: np.asarray(v) for k, v in make_batch(i, B=8).items()}
            state, metrics = step(state, frozen, put_batch(mesh)(batch))
            found.append([float(metrics[k]) for k in ("loss", "grad_norm")])
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_6_every_mesh_gives_the_losses_of_one_device(shape, name):
    np.testing.assert_allclose(losses(name, shape), losses(name, (1, 1, 1)), rtol=1e-5)


@pytest.mark.full
def test_6_chunks_and_parts_of_a_batch_over_stretches():
    parts = losses("prompt", (1, 2, 1, 4), 4, accumulate=2, chunk=16)
    np.testing.assert_allclose(parts, losses("prompt", (1, 1, 1))[:4], rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_a_step_gathers_one_layer_at_a_time_and_no_whole_batch(shape, name):
    """What a device is sent is no more than its part of a layer's largest matrix, or of the table; never all layers,
    the optimizer's state, or the states of the rows of others."""
    mesh, begin, step = on_mesh(BASE, METHODS[name], shape)
    with jax.set_mesh(mesh):
        frozen, state = begin()
        batch = put_batch(mesh)({k: np.asarray(v) for k, v in make_batch(B=8).items()})
        text = step.lower(state, frozen, batch).compile().as_text()
    shapes = re.findall(r"= \(?f32\[([\d,]*)\]\S* all-gather", text)
    sizes = [int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes]
    c, tensor = BASE.config, mesh.shape["tensor"]
    assert sizes, "parameters split over fsdp are gathered"
    assert max(sizes) <= max(c.D * c.F, c.D * c.V) // tensor, shapes
    assert not [dims for dims in shapes if re.fullmatch(f"{c.L},.*,.*", dims)], "a stack of layers"
    assert not [dims for dims in shapes if dims.startswith("8,16,")], "the states of a whole batch"
