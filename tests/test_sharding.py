"""Law 6: one device and 2 x 2 x 2 give the same losses; meshes that do not fit are refused by name."""

import jax
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import init, shapes_of
from graftax.model.sharding import follow, make_mesh, put_batch, shardings
from graftax.model.tree import named
from graftax.train.optim import make_optimizer
from graftax.train.step import init_state, make_train_step
from tiny import CASES, CONFIG, OPTIM, make_base, make_batch

STEPS = 6
BASE = make_base(V=64)


def losses(method, shape):
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        split = shardings(mesh, BASE.params)
        tx = make_optimizer(OPTIM, jax.eval_shape(method.init, jax.random.key(1), BASE.params), 20, method)

        def begin(params):
            frozen, trainable = peft.partition(method, params, jax.random.key(1))
            return frozen, init_state(trainable, tx)

        where = follow(mesh, begin, BASE.params, split)
        frozen, state = jax.jit(begin, out_shardings=where)(jax.device_put(BASE.params, split))
        step, put, found = jax.jit(make_train_step(BASE.model, method, tx)), put_batch(mesh), []
        for i in range(STEPS):
            state, metrics = step(state, frozen, put({k: np.asarray(v) for k, v in make_batch(i).items()}))
            found.append(float(metrics["loss"]))
    return found, state


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_6_one_device_and_eight_give_the_same_losses(method):
    one, _ = losses(method, (1, 1, 1))
    eight, state = losses(method, (2, 2, 2))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    if method == CASES["subset"]:
        up = state.trainable["layers/mlp/up"]
        assert up.addressable_shards[0].data.size == up.size // 4, "parameters are not split over fsdp x tensor"


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
    split = follow(mesh, make, shapes, shardings(mesh, shapes))["layers/mlp/up"]
    assert tuple(split["a"].spec) == (None, "fsdp", None)
    assert tuple(split["b"].spec) == (None, None, "tensor")


def test_mesh_errors():
    with pytest.raises(InputError, match=r"mesh 3x1x1 .* does not match the 8 device"):
        make_mesh((3, 1, 1))
    with pytest.raises(InputError, match="three sizes"):
        make_mesh((8,))
    assert make_mesh((2, -1, 1)).shape == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(InputError, match=r"embed/table \[61, 32\]: dimension 0 of 61 does not divide over tensor = 2"):
        shardings(make_mesh((2, 2, 2)), shapes_of(CONFIG))
