"""Law 6: one device and 2 x 2 x 2 give the same losses; meshes that do not fit are refused by name."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import init, shapes_of
from graftax.model.sharding import infer_adapter_shardings, make_mesh, put_batch, shardings
from graftax.model.tree import named
from tiny import CASES, CONFIG, STEADY, make_base, make_batch, on_mesh, stepper

STEPS = 6
BASE = make_base(V=62)


def losses(frozen, state, step, put=lambda batch: batch):
    """(loss and norm of the gradient of the first steps, the state after them)."""
    found = []
    for i in range(STEPS):
        state, metrics = step(state, frozen, put({k: np.asarray(v) for k, v in make_batch(i).items()}))
        found.append([float(metrics[k]) for k in ("loss", "grad_norm")])
    return found, state


def over(method, shape):
    """(losses, state) of a run over a mesh, begun there."""
    mesh, begin, step = on_mesh(BASE, method, shape)
    with jax.set_mesh(mesh):
        return losses(*begin(), step, put_batch(mesh))


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_6_one_device_and_eight_give_the_same_losses(method):
    one, _ = losses(*stepper(BASE, method, STEADY))
    eight, state = over(method, (2, 2, 2))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    if method == CASES["subset"]:
        up = state.trainable["layers/mlp/up"]
        assert up.addressable_shards[0].data.size == up.size // 4, "parameters are not split over fsdp x tensor"


def test_6_a_mesh_of_one_device_is_no_mesh():
    plain = losses(*stepper(BASE, peft.LoRA(), STEADY))[0]
    np.testing.assert_allclose(over(peft.LoRA(), (1, 1, 1))[0], plain, rtol=1e-5)


def test_sharded_init_equals_plain_init():
    mesh = make_mesh((2, 2, 2))
    split = shardings(mesh, shapes_of(BASE.config))
    params = jax.jit(init, static_argnums=0, out_shardings=split)(BASE.config, jax.random.key(0))
    for path, leaf in named(params).items():
        np.testing.assert_allclose(leaf, named(BASE.params)[path], rtol=1e-6, atol=1e-7)


def test_a_lora_follows_its_matrix():
    mesh = make_mesh((2, 2, 2))
    shapes = shapes_of(BASE.config)
    make = lambda params: peft.LoRA(rank=32).init(jax.random.key(0), params)  # noqa: E731  # rank = D: lengths mislead
    split = infer_adapter_shardings(mesh, make, shapes, shardings(mesh, shapes))["layers/mlp/up"]
    assert tuple(split["a"].spec) == (None, "fsdp", None)
    assert tuple(split["b"].spec) == (None, None, "tensor")


@pytest.mark.parametrize("other", ["missbat", "boft", "road"])
def test_a_lora_follows_its_matrix_beside_a_method_of_lengths_that_divide(other):
    mesh, shapes = make_mesh((2, 2, 2)), shapes_of(BASE.config)
    method = peft.chain(peft.LoRA(), peft.methods[other](where="layers/attn/[qkvo]"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = infer_adapter_shardings(mesh, partial(method.init, jax.random.key(0)), shapes, shardings(mesh, shapes))
    assert tuple(split["lora"]["layers/mlp/up"]["a"].spec) == (None, "fsdp", None)
    assert tuple(split["lora"]["layers/mlp/up"]["b"].spec) == (None, None, "tensor")


def test_what_cannot_be_split_is_said():
    def make(params):
        if params["layers"]["mlp"]["up"].shape[-1] != 48:
            raise InputError("wanted 48")
        return {"new": {"a": jnp.zeros((2, 32, 48))}}

    mesh, shapes = make_mesh((2, 2, 2)), shapes_of(BASE.config)
    with pytest.warns(UserWarning, match="whole on every device, not split: wanted 48"):
        assert not any(infer_adapter_shardings(mesh, make, shapes, shardings(mesh, shapes))["new"]["a"].spec)


def test_mesh_errors():
    with pytest.raises(InputError, match=r"mesh 3x1x1 .* does not match the 8 device"):
        make_mesh((3, 1, 1))
    with pytest.raises(InputError, match="three or four sizes"):
        make_mesh((8,))
    assert make_mesh((2, -1, 1)).shape == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert make_mesh((2, 1, 1, -1)).shape["context"] == 4
    with pytest.raises(InputError, match=r"embed/table \[61, 32\]: dimension 0 of 61 does not divide over tensor = 2;"):
        shardings(make_mesh((2, 2, 2)), shapes_of(CONFIG))
    wide = dataclasses.replace(CONFIG, V=64, F=36)  # [L, D, F]: the layer axis is never split
    told = r"layers/mlp/down \[2, 36, 32\]: dimension 1 of 36 .* tensor = 8; .* tensor may have 1, 2, 3, 4, 6"
    with pytest.raises(InputError, match=told):
        shardings(make_mesh((1, 1, 8)), shapes_of(wide))
