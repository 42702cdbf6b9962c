"""Checkpoints restore anywhere: on another mesh, and with the layers stacked or unrolled."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import layout, shapes_of
from graftax.model.layout import convert_layout, with_shardings
from graftax.model.sharding import make_mesh, shardings
from graftax.model.tree import named, paths
from graftax.train.optim import make_optimizer
from graftax.train.runs import manifest
from graftax.train.runs.checkpoint import CheckpointWriter
from graftax.train.runs.manifest import fingerprint
from graftax.train.step import init_state
from tiny import CASES, OPTIM, make_base, same

STACKED, UNROLLED = make_base(V=64), make_base(V=64, scan=False)


def shapes(base, method):
    """The shapes of a run's state."""
    trainable = jax.eval_shape(method.init, jax.random.key(1), base.params)
    tx = make_optimizer(OPTIM, trainable, 20, method)
    return jax.eval_shape(lambda: init_state(jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), trainable), tx))


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_a_state_has_the_same_values_in_both_layouts(method):
    a, b = (dict(paths(shapes(base, method))) for base in (STACKED, UNROLLED))
    assert layout.same_layers(a, b)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = lambda tree: {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for k, x in tree.items()}  # noqa: E731
    made = {k: jax.numpy.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype) for k, x in a.items()}
    kept = {k: np.asarray(x) for k, x in made.items()}
    there = layout.convert_arrays(made, where(b))
    assert {k: (x.shape, x.dtype) for k, x in there.items()} == {k: (x.shape, x.dtype) for k, x in b.items()}
    back = layout.convert_arrays(there, where(a))
    assert all(np.array_equal(back[k], kept[k]) for k in kept)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 2, 2)])
def test_a_checkpoint_restores_bit_equal_on_any_mesh_in_any_layout(mesh, tmp_path):
    start = make_mesh((2, 2, 2))
    flat = dict(named(jax.device_put(STACKED.params, shardings(start, STACKED.params))))
    checkpoints = CheckpointWriter(tmp_path)
    checkpoints.save(1, {"trainable": flat}, {})
    mesh = make_mesh(mesh)
    for base in (STACKED, UNROLLED):
        split = shardings(mesh, shapes_of(base.config))
        checkpoints.wait()
        found = checkpoints.restore(1, "trainable", dict(named(with_shardings(shapes_of(base.config), split))))
        assert same(found, dict(named(base.params)))
        assert {k: x.sharding for k, x in found.items()} == named(split)
    checkpoints.close()


def test_the_best_has_a_finite_score(monkeypatch):
    """A run that diverged has NaN scores, and min() gives NaN back where it comes first."""
    scores: dict = {1: math.nan, 2: 3.0, 3: 2.0, 4: -math.inf, 5: None, 6: "low"}
    checkpoints = CheckpointWriter(Path("nowhere"))
    monkeypatch.setattr(checkpoints, "steps", lambda: list(scores))
    monkeypatch.setattr(checkpoints, "manifest", lambda step: {"score": scores[step]})
    assert checkpoints.best() == 3
    del scores[2], scores[3]
    assert checkpoints.best() is None, "as if none had a score"


def test_a_digest_is_of_the_value_wherever_it_lies(monkeypatch):
    mesh = make_mesh((2, 2, 2))
    params = jax.device_put(STACKED.params, shardings(mesh, STACKED.params))
    whole = {path: manifest.array_digest(np.asarray(x)) for path, x in named(STACKED.params).items()}
    monkeypatch.setattr(manifest, "PIECE_BYTES", 4096)  # a piece is a layer, or a few rows
    assert manifest.array_digests(dict(named(params))) == whole
    assert fingerprint(params) == fingerprint(STACKED.params) == fingerprint(UNROLLED.params)


def test_a_base_changes_its_layout_in_place():
    mesh = make_mesh((2, 2, 2))
    params = jax.device_put(jax.tree.map(np.array, STACKED.params), shardings(mesh, STACKED.params))  # it is used up
    config, params = convert_layout(STACKED.config, params, "unrolled", mesh)
    assert config == UNROLLED.config
    assert same(params, UNROLLED.params)
    config, params = convert_layout(config, params, "stacked", mesh)
    assert same(params, STACKED.params)
    assert convert_layout(config, params, "", mesh)[1] is params


def test_another_method_is_still_refused(tmp_path):
    checkpoints = CheckpointWriter(tmp_path)
    init = lambda base, **kw: peft.LoRA(**kw).init(jax.random.key(0), base.params)  # noqa: E731
    checkpoints.save(1, {"trainable": init(STACKED, rank=2)}, {})
    checkpoints.wait()
    with pytest.raises(InputError, match="has no layers/0/attn/k/a"):
        checkpoints.restore(1, "trainable", init(UNROLLED, rank=4))
    checkpoints.close()
