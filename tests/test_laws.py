"""The laws of DESIGN section 5, over every method there is. A new method is held to them with no edit here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graftax import InputError, peft
from graftax.model import generate, token_losses
from graftax.model.tree import named, paths
from graftax.peft import Subset
from graftax.train.config import Optim
from graftax.train.optim import make_optimizer
from graftax.train.step import init_state, make_loss, make_train_step
from tiny import CASES, CONFIG, OPTIM, close, make_base, make_batch, same, shaken, stepper

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
BATCH = make_batch()


def logits(base, method, trainable, batch=BATCH, params=None):
    params = base.params if params is None else params
    return peft.apply(base.model, params, method, trainable, batch["ids"], batch["positions"], batch["segments"])


@every_method
def test_1_identity_at_init(base, method):
    trainable = method.init(jax.random.key(1), base.params)
    difference = jnp.abs(logits(base, method, trainable) - logits(base, Subset(), Subset().init(None, base.params)))
    assert (float(difference.max()) <= 1e-5) == method.identity


@every_method
def test_2_frozen_stays_and_trainable_moves(base, method):
    frozen, state, step = stepper(base, method)
    before, start = jax.tree.map(np.array, frozen), state.trainable
    for i in range(4):
        state, metrics = step(state, frozen, make_batch(i))
        assert metrics["ok"]
    poisoned = BATCH | {"weights": BATCH["weights"].at[0, 0].set(jnp.nan)}
    after_nan, metrics = step(state, frozen, poisoned)
    assert not metrics["ok"]
    assert int(after_nan.skipped) == 1
    assert same(after_nan.trainable, state.trainable)
    assert same(after_nan.opt_state, state.opt_state)
    assert same(frozen, before)
    for path, leaf in paths(after_nan.trainable):
        moved = np.asarray(leaf) != np.asarray(dict(paths(start))[path])
        assert moved.any(), f"{path} did not move"
    touched = {path.split("[")[0] for branch in branches(state.trainable) for path in branch}
    for path, leaf in named(base.params).items():
        if path not in touched:
            assert same(leaf, named(frozen)[path])


def branches(trainable):
    """The {path: arrays} dicts of a method's tree, one for each link of a chain."""
    return trainable.values() if any("/" not in key for key in trainable) else [trainable]


@every_method
def test_3_trees_follow_the_trainable_tree(base, method):
    frozen, trainable = peft.partition(method, base.params, jax.random.key(1))
    gradient = jax.eval_shape(jax.grad(make_loss(base.model, method), has_aux=True), trainable, frozen, BATCH)[0]
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    shapes = {x.shape for x in jax.tree.leaves(trainable)} | {()}
    state = make_optimizer(OPTIM, trainable, 20).init(trainable)
    assert {x.shape for x in jax.tree.leaves(state)} <= shapes
    moments = [x for x in jax.tree.leaves(state) if x.shape]
    assert sum(x.size for x in moments) == 2 * peft.count(method, base.params)


def test_3_clipping_and_norms_cost_no_memory_for_frozen_leaves():
    """LoRA's step holds no gradient and no moment of a frozen leaf, with the norm clipped and logged."""
    base, batch = make_base(D=128, F=512, scan=False), make_batch(B=1, T=8)

    def memory(method, clip):
        frozen, trainable = peft.partition(method, base.params, jax.random.key(1))
        tx = make_optimizer(Optim(clip=clip), trainable, 20)
        step = jax.jit(make_train_step(base.model, method, tx), donate_argnums=0)
        return step.lower(init_state(trainable, tx), frozen, batch).compile().memory_analysis()

    lora = peft.methods["lora"](rank=2)
    adapter, full = (4 * peft.count(method, base.params) for method in (lora, Subset()))
    clipped, plain, everything = memory(lora, 1.0), memory(lora, 0.0), memory(Subset(), 1.0)
    assert clipped.temp_size_in_bytes - plain.temp_size_in_bytes <= adapter
    assert everything.temp_size_in_bytes - clipped.temp_size_in_bytes >= 0.9 * (full - adapter)
    # Arguments: the base once; adapter, two moments; the batch.
    assert clipped.argument_size_in_bytes <= full + 3 * adapter + sum(x.nbytes for x in batch.values()) + 1024


@every_method
def test_4_fold_gives_the_same_logits_and_the_base_structure(base, method):
    trainable = shaken(method.init(jax.random.key(1), base.params))
    bound = method.bind(base.params, trainable)
    linear = all(getattr(w, "linear", True) for w in named(bound).values())
    if not linear or method.context(trainable).length:
        with pytest.raises(InputError):
            peft.merge(method, base.params, trainable)
        return
    folded = peft.fold(bound)
    assert jax.tree.structure(folded) == jax.tree.structure(base.params)
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(base.params), strict=True))
    close(logits(base, Subset("norms"), {}, params=folded), logits(base, method, trainable))


@every_method
def test_5_vmapped_adapters_equal_separate_runs(base, method):
    frozen = method.freeze(base.params)
    # With Adam's usual eps a gradient that is all rounding gives a full step, either way.
    optim = dataclasses.replace(OPTIM, eps=1e-3)
    tx = make_optimizer(optim, method.init(jax.random.key(1), base.params), 20, method)
    step = make_train_step(base.model, method, tx)
    states = [init_state(shaken(method.init(jax.random.key(k), base.params)), tx) for k in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    together = jax.jit(jax.vmap(step, in_axes=(0, None, None)))
    alone = jax.jit(step)
    for i in range(2):
        stacked, metrics = together(stacked, frozen, make_batch(i))
        states, losses = zip(
            *((s, m["loss"]) for s, m in (alone(s, frozen, make_batch(i)) for s in states)), strict=True
        )
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    close(stacked.trainable, jax.tree.map(lambda *x: jnp.stack(x), *(s.trainable for s in states)), 1e-4)


@every_method
def test_7_packed_documents_equal_separate_ones(base, method):
    """And no token sees another document: changing one leaves the other's logits as they were."""
    trainable = shaken(method.init(jax.random.key(1), base.params))
    packed = logits(base, method, trainable)
    half = BATCH["ids"].shape[1] // 2
    apply = lambda ids: peft.apply(base.model, base.params, method, trainable, ids)  # noqa: E731
    close(packed[1:, :half], apply(BATCH["ids"][1:, :half]))
    close(packed[1:, half:], apply(BATCH["ids"][1:, half:]))
    changed = BATCH | {"ids": BATCH["ids"].at[:, :half].add(1) % CONFIG.V}
    assert same(logits(base, method, trainable, changed)[:, half:], packed[:, half:])
    losses = token_losses(base.model, method.bind(base.params, trainable), BATCH, method.context(trainable))
    alone = {k: v[1:, half:] for k, v in BATCH.items() if k not in ("segments", "positions")}
    close(
        losses[1:, half:],
        token_losses(base.model, method.bind(base.params, trainable), alone, method.context(trainable)),
    )


@every_method
def test_8_cached_decoding_equals_recomputation(base, method):
    """Prompts of different lengths in one batch, against greedy steps of the whole row each."""
    trainable = shaken(method.init(jax.random.key(1), base.params), 0.2)
    bound, context = jax.jit(method.bind)(base.params, trainable), method.context(trainable)
    rows = [list(map(int, BATCH["ids"][0, :9])), list(map(int, BATCH["ids"][1, :4]))]
    got = generate(base.model, bound, rows, 5, context=context, pad_to=16)
    apply = jax.jit(lambda ids: peft.apply(base.model, base.params, method, trainable, ids))
    for row, new in zip(rows, got, strict=True):
        for token in new:
            padded = jnp.array([row + [0] * (16 - len(row))])
            step = apply(padded)[0, len(row) - 1]
            assert step[token] >= step.max() - 1e-5
            row.append(token)


@every_method
def test_10_layouts_remat_chunks_and_accumulation_change_nothing(base, method):
    """Stacked and unrolled layers, with and without recomputation, cross-entropy whole and in chunks, one batch or two
    parts of unequal target counts: the same loss and the same step."""
    frozen, state, step = stepper(base, method)
    state, metrics = step(state, frozen, BATCH)
    expected = {k: v for k, v in metrics.items() if k in ("loss", "grad_norm", "targets")}
    variants = [({"remat": "full"}, {}), ({"scan": False}, {"chunk": 8}), ({}, {"accumulate": 2})]
    for config, kwargs in variants:
        other = make_base(**config)
        frozen, state, step = stepper(other, method, **kwargs)
        got = step(state, frozen, BATCH)[1]
        close({k: got[k] for k in expected}, expected, 2e-5)


@pytest.mark.parametrize("where", ["norms", "layers/attn/.*", "embeddings"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_11_partition_equals_masked_full_training(base, where, name):
    """Training the picked tree alone is training the full tree with the rest set to zero updates."""
    method, optim = Subset(where), Optim(name=name, lr=1e-2, clip=0.0)
    frozen, state, step = stepper(base, method, optim)
    full = Subset("all")
    everything = full.init(None, base.params)
    labels = {path: "train" if path in state.trainable else "freeze" for path in everything}
    # The inner optimizer sees the whole tree with its frozen leaves masked.
    masked = {path: leaf if path in state.trainable else optax.MaskedNode() for path, leaf in everything.items()}
    tx = optax.partition({"train": make_optimizer(optim, masked, 20), "freeze": optax.set_to_zero()}, labels)
    reference = init_state(everything, tx)
    reference_step = jax.jit(make_train_step(base.model, full, tx))
    for i in range(3):
        state, _ = step(state, frozen, make_batch(i))
        reference, _ = reference_step(reference, {}, make_batch(i))
    for path, leaf in reference.trainable.items():
        if path in state.trainable:
            close(leaf, state.trainable[path], 1e-4)
        else:
            assert same(leaf, everything[path])


@every_method
def test_12_causality_by_gradients(base, method):
    """d logits[t] / d embedding[s] is 0 for s > t and not 0 for s <= t."""
    trainable = shaken(method.init(jax.random.key(1), base.params))
    T = 6
    ids = BATCH["ids"][:1, :T]

    def out(delta_TD):
        bound = method.bind(base.params, trainable)
        bound = {**bound, "embed": {"table": Nudged(bound["embed"]["table"], delta_TD)}}
        from graftax.model import forward

        return forward(base.model, bound, ids, context=method.context(trainable))[0][0]

    jacobian = jax.jacrev(out)(jnp.zeros((T, CONFIG.D)))  # [T, V, T, D]
    seen = np.abs(np.asarray(jacobian)).max(axis=(1, 3))
    assert (seen[np.triu_indices(T, 1)] == 0).all()
    assert (seen[np.tril_indices(T)] > 0).all()


class Nudged(peft.Weight):
    """A table whose looked-up rows, the last T of them, are moved by delta."""

    w: object
    delta: jax.Array

    def __getitem__(self, ids):
        rows = self.w[ids]
        return rows.at[:, -self.delta.shape[0] :].add(self.delta)

    @property
    def T(self):
        return self.w.T
