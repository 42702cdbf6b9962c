"""Steps that must change nothing: losses that are not finite, and spikes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graftax.peft import Subset
from graftax.train import step as steps
from graftax.train.step import init_state, make_train_step
from tiny import make_base, make_batch, same

BASE = make_base()


@pytest.mark.faults
@pytest.mark.parametrize("what", ["spike", "nan", "inf"])
def test_a_bad_step_changes_nothing_but_the_counts(what, monkeypatch):
    monkeypatch.setattr(steps, "SPIKE_WINDOW", 8)
    tx = optax.adam(1e-4)
    step = jax.jit(make_train_step(BASE.model, Subset("all"), tx, spike=6.0))
    state, batch = init_state(BASE.params, tx, spikes=True), make_batch()
    rng = np.random.default_rng(0)
    for _ in range(9):  # the losses differ a little, as those of other rows do
        rows = rng.permutation(4)
        state, metrics = step(state, {}, {k: v[rows] for k, v in make_batch(int(rng.integers(50))).items()})
        assert metrics["ok"]
    kept = jax.tree.map(jnp.copy, state)
    if what == "spike":  # sure of the wrong tokens
        broken = jax.tree.map(lambda x: 40 * x, state.trainable)
    else:
        table = state.trainable["embed"]["table"].at[batch["ids"][0, 0]].set(float(what))
        broken = {**state.trainable, "embed": {"table": table}}
    state = state._replace(trainable=broken)
    after, metrics = step(state, {}, batch)
    assert not metrics["ok"]
    assert same(after.trainable, broken) or what == "nan"  # NaN is not equal to itself
    assert same(after.opt_state, kept.opt_state)
    assert same(after.recent, kept.recent)
    assert (int(after.step), int(after.skipped)) == (10, 1)
    again, metrics = step(after._replace(trainable=kept.trainable), {}, batch)
    assert metrics["ok"], "the next good step is taken"
    assert int(again.skipped) == 1
