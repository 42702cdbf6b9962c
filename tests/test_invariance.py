"""What must not change training: LoRA's rank, under Adam, at first; and a scale moved between alpha, A and the rates.

With W + (alpha / r) A B, A [D, r] uniform in +-D^-1/2 (variance 1 / 3D), B = 0 and G = dL / dW, the first step moves B
alone, and the loss falls by <G, dW> to first order, in expectation over A by

    Adam  dW = -lr (alpha / r) A sign(A^T G)      lr alpha sum_f E|a . G_f| ~ lr alpha sum_f |G_f| (2 / 3 pi D)^1/2
    SGD   dW = -lr (alpha / r)^2 A A^T G          lr alpha^2 / r |G|^2 / 3D

Under Adam it does not depend on the rank ("LoRA Without Regret", Schulman et al. 2025: so one learning rate serves all
ranks); under SGD it falls as 1 / r. With rsLoRA's alpha / sqrt(r) it grows as sqrt(r) under Adam and is the same for
all ranks under SGD.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graftax import peft
from graftax.peft import LoRA, RsLoRA, Subset
from graftax.train.config import Optim
from graftax.train.optim import make_optimizer
from graftax.train.step import init_state, make_loss, make_train_step
from tiny import make_base, make_batch, shaken

ALPHA, SEEDS, SMALL, LARGE = 16.0, 64, 1e-4, 3e-3
BASE = make_base(L=1, qkv_bias=False)
BASE = BASE._replace(params=shaken(BASE.params))
BATCH = make_batch()


@pytest.fixture(scope="module")
def gradient():
    """dL / dW [D, F] of every matrix that LoRA acts on."""
    frozen, trainable = peft.partition(Subset("linear"), BASE.params, jax.random.key(0))
    loss = lambda t: make_loss(BASE.model, Subset("linear"))(t, frozen, BATCH)[0] / BATCH["weights"].sum()  # noqa: E731
    return [np.asarray(g[0], np.float64) for g in jax.jit(jax.grad(loss))(trainable).values()]


def runs(method, tx, steps):
    """For each learning rate of `steps`, {rate: steps}: (mean loss before each step, mean change of the logits by the
    first), over SEEDS beginnings on one batch."""
    tx = optax.inject_hyperparams(tx)(learning_rate=0.0)
    begin = lambda key: init_state(method.init(key, BASE.params), tx)  # noqa: E731
    states = jax.vmap(begin)(jax.random.split(jax.random.key(5), SEEDS))
    go = jax.jit(jax.vmap(make_train_step(BASE.model, method, tx), in_axes=(0, None, None)))
    logits = jax.jit(lambda ts: jax.vmap(lambda t: peft.apply(BASE.model, BASE.params, method, t, BATCH["ids"]))(ts))
    found, at_first = {}, logits(states.trainable)
    for rate, n in steps.items():
        opt_state = optax.tree_utils.tree_set(states.opt_state, learning_rate=jnp.full(SEEDS, rate))
        state, losses, moved = states._replace(opt_state=opt_state), [], None
        for _ in range(n):
            state, metrics = go(state, BASE.params, BATCH)
            losses.append(np.asarray(metrics["loss"], np.float64).mean())
            moved = np.mean(logits(state.trainable) - at_first, 0) if moved is None else moved
        found[rate] = np.array(losses), moved
    return found


@pytest.fixture(scope="module")
def adam():
    """{(class, rank): runs}, with no eps to speak of."""
    cases = [(LoRA, 2), (LoRA, 8), (LoRA, 64), (RsLoRA, 2), (RsLoRA, 64)]
    tx = lambda learning_rate: optax.adam(learning_rate, eps=1e-20)  # noqa: E731
    return {(cls, r): runs(cls(rank=r, alpha=ALPHA), tx, {SMALL: 2, LARGE: 8}) for cls, r in cases}


@pytest.mark.full
def test_the_first_adam_step_does_not_depend_on_the_rank(adam, gradient):
    """The loss falls by what theory says, in nats, and the logits move alike, to 5 % (the draw of A, at rank 2);
    rsLoRA's by sqrt(r) times as much."""
    expected = (
        SMALL * ALPHA * sum(np.linalg.norm(g, axis=0).sum() * (2 / (3 * math.pi * len(g))) ** 0.5 for g in gradient)
    )
    reference = adam[LoRA, 64][SMALL][1]
    for (cls, rank), found in adam.items():
        factor = rank**0.5 if cls is RsLoRA else 1.0
        losses, moved = found[SMALL]
        assert losses[0] - losses[1] == pytest.approx(factor * expected, rel=0.05), f"{cls.__name__} of rank {rank}"
        along = (moved * reference).sum() / np.square(reference).sum()
        assert along == pytest.approx(factor, rel=0.05), f"{cls.__name__} of rank {rank}"


@pytest.mark.full
def test_early_training_hardly_depends_on_the_rank(adam):
    """At a rate that takes 6 % off the loss in 8 steps, A and all: to 10 %, where rsLoRA's is three times as fast."""
    fall = {case: found[LARGE][0][0] - found[LARGE][0][-1] for case, found in adam.items()}
    for rank in (2, 8):
        assert fall[LoRA, rank] == pytest.approx(fall[LoRA, 64], rel=0.1)
    assert fall[RsLoRA, 64] > 2 * fall[RsLoRA, 2]


@pytest.mark.full
def test_the_first_sgd_step_falls_as_one_over_the_rank(gradient):
    """E[A A^T] = r / 3D, so rsLoRA is the one that SGD moves alike at every rank; to 6 % (the draw of A, at rank 2)."""
    rate = 1e-2
    expected = rate * ALPHA**2 * sum(np.square(g).sum() / (3 * len(g)) for g in gradient)
    for cls in (LoRA, RsLoRA):
        for rank in (2, 64):
            losses = runs(cls(rank=rank, alpha=ALPHA), optax.sgd, {rate: 2})[rate][0]
            factor = 1.0 if cls is RsLoRA else 1 / rank
            assert losses[0] - losses[1] == pytest.approx(factor * expected, rel=0.06), f"{cls.__name__} of rank {rank}"


def trained(p=1.0, q=1.0, rates=True):
    """Losses of 6 steps of LoRA with A begun p times as large, alpha / p q, and the rates of A and B times p and q."""
    groups = ((".*/a", p), (".*/b", q)) if rates else ()
    optim = Optim(lr=3e-2, warmup=2, weight_decay=0.0, clip=0.0, eps=1e-20, groups=groups)
    method = LoRA(rank=4, alpha=ALPHA / (p * q))
    trainable = {k: t | {"a": p * t["a"]} for k, t in method.init(jax.random.key(1), BASE.params).items()}
    tx = make_optimizer(optim, trainable, 20, method)
    state, step, losses = init_state(trainable, tx), jax.jit(make_train_step(BASE.model, method, tx)), []
    for _ in range(6):
        state, metrics = step(state, BASE.params, BATCH)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.mark.full
def test_adam_does_not_see_where_the_scale_is():
    """(alpha, A, lr_A, lr_B) and (alpha / p q, p A, p lr_A, q lr_B) are one run: A B is p q times as large, the
    gradient of A 1 / p of what it was, and Adam divides by its size. Without the rates it is another run."""
    plain = trained()
    assert plain[-1] < plain[0] - 0.5
    for p, q in ((4.0, 0.5), (10.0, 3.0), (0.1, 7.0)):
        np.testing.assert_allclose(trained(p, q), plain, rtol=1e-5)
    assert np.abs(trained(10.0, 3.0, rates=False) - plain).max() > 1e-2
