"""Law 6: one device and 2 x 2 x 2 give the same losses; meshes that do not fit are refused by name."""

import dataclasses

import jax
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import init, shapes_of
from graftax.model.sharding import make_mesh, put_batch, shardings
from graftax.model.tree import is_stacked, named
from graftax.peft.sharding import adapter_shardings, base_axes, iter_axes
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


def split_of(method, base=BASE):
    """The shardings of a method's trainable tree on a mesh of 2 x 2 x 2."""
    mesh, shapes = make_mesh((2, 2, 2)), shapes_of(base.config)
    trainable = jax.eval_shape(method.init, jax.random.key(0), shapes)
    return adapter_shardings(mesh, method, trainable, shapes, shardings(mesh, shapes))


def test_a_lora_follows_its_matrix():
    split = split_of(peft.LoRA(rank=32))["layers/mlp/up"]  # rank = D: lengths mislead
    assert tuple(split["a"].spec) == (None, "fsdp", None)
    assert tuple(split["b"].spec) == (None, None, "tensor")


@pytest.mark.parametrize("other", ["missbat", "boft", "road"])
def test_a_lora_follows_its_matrix_beside_a_method_of_lengths_that_divide(other):
    split = split_of(peft.chain(peft.LoRA(), peft.methods[other](where="layers/attn/[qkvo]")))
    assert tuple(split["lora"]["layers/mlp/up"]["a"].spec) == (None, "fsdp", None)
    assert tuple(split["lora"]["layers/mlp/up"]["b"].spec) == (None, None, "tensor")


def test_an_undeclared_array_is_whole_on_every_device():
    class Undeclared(peft.LoRA):
        axes = {"b": "RF"}  # noqa: RUF012

    split = split_of(Undeclared())["layers/mlp/up"]
    assert not any(split["a"].spec)
    assert tuple(split["b"].spec) == (None, None, "tensor")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_declared_axes_are_those_of_the_arrays(method, scan):
    """An axis D, F or M of an array has the length of the parameter's axis, and every axis of the array is declared."""
    params = make_base(scan=scan).params
    flat, trainable = named(params), jax.eval_shape(method.init, jax.random.key(0), params)
    for path, origin, axes, array in iter_axes(method, trainable):
        origin = origin if origin in flat else origin.replace("layers/", "layers/0/")
        if flat[origin].ndim - is_stacked(origin) < 2:
            continue  # a bias or a scale that a Subset trains
        lengths = array.shape[is_stacked(path) :]
        for axis, n in zip(base_axes(axes, flat[origin].shape), lengths, strict=True):
            assert axis is None or flat[origin].shape[axis] == n, path


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
