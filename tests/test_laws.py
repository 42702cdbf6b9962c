"""The laws of DESIGN section 5, over every method there is. A new method is held to them with no edit here."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graftax import InputError, peft
from graftax.model import forward, generate
from graftax.model.tree import is_stacked, named, nested, paths
from graftax.peft import Subset
from graftax.train.config import Optim
from graftax.train.optim import make_optimizer
from graftax.train.step import init_state, make_loss, make_train_step
from tiny import CASES, CONFIG, OPTIM, close, evaluator, make_base, make_batch, same, shaken, stepper

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
BATCH = make_batch()


@pytest.fixture(scope="session")
def base():
    """Its vocabulary divides over a mesh, so that law 6 (test_sharding.py) finds the train step compiled."""
    return make_base(V=62)


@cache
def begun(base, method, seed=1):
    """What a method trains, as it begins."""
    return method.init(jax.random.key(seed), base.params)


@cache
def moved(base, method, size=0.05):
    """What a method trains, away from its special starting point."""
    return shaken(begun(base, method), size)


def outputs(base, method, trainable, batch=BATCH):
    """(logits, losses) of a batch."""
    return evaluator(base.model, method)(base.params, trainable, batch)


@partial(jax.jit, static_argnums=0)
def plain(model, params):
    """The logits of BATCH that a base gives by itself."""
    return model.apply({"params": params}, BATCH["ids"], BATCH["positions"], BATCH["segments"])


@pytest.fixture(scope="session")
def base_with_zeros(base):
    """The same shapes, with a zero row and column in every matrix, and one layer whose queries are all 0."""

    def emptied(path, x):
        if x.ndim - is_stacked(path) < 2:
            return x
        x = x.at[..., 0, :].set(0).at[..., 0].set(0)
        return x.at[-1].set(0) if path == "layers/attn/q" else x

    return base._replace(params=nested({path: emptied(path, x) for path, x in named(base.params).items()}))


@every_method
def test_1_identity_at_init(base, method):
    begins_as_the_base(base, method)


@every_method
def test_1_2_hold_on_a_base_with_zeros(base_with_zeros, method):
    begins_as_the_base(base_with_zeros, method)
    trains(base_with_zeros, method)


def begins_as_the_base(base, method):
    difference = jnp.abs(outputs(base, method, begun(base, method))[0] - plain(base.model, base.params))
    assert (float(difference.max()) <= 1e-5) == method.identity


@every_method
def test_2_frozen_stays_and_trainable_moves(base, method):
    trains(base, method)


def trains(base, method):
    """Four steps move every trainable leaf and no frozen one; a step with NaN moves nothing."""
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

    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    (adam,) = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
    for (path, first), last, mean in zip(paths(start), *map(jax.tree.leaves, (state.trainable, adam.mu)), strict=True):
        assert (np.asarray(first) != np.asarray(last)).any(), f"{path} did not move"
        assert np.any(mean), f"{path} has no gradient: decay alone moved it"
    touched = {path.split("[")[0] for branch in branches(state.trainable) for path in branch}
    for path, leaf in named(base.params).items():
        if path not in touched:
            assert same(leaf, named(frozen)[path])


def branches(trainable):
    """The {path: arrays} dicts of a method's tree, one for each link of a chain."""
    return trainable.values() if any("/" not in key for key in trainable) else [trainable]


@every_method
def test_2_training_computes_what_evaluation_does(base, method):
    """As long as nothing is drawn, and no default of a method draws: `bind_train` is `bind`."""
    frozen, state, step = stepper(base, method)
    trainable, weights = moved(base, method), BATCH["weights"]
    expected = (outputs(base, method, trainable)[1] * weights).sum() / weights.sum() + method.aux_loss(trainable)
    close(step(state._replace(trainable=trainable), frozen, BATCH)[1]["loss"], expected)


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
    assert clipped.temp_size_in_bytes <= full // 2
    assert everything.temp_size_in_bytes - clipped.temp_size_in_bytes >= 0.9 * (full - adapter)
    # Arguments: the base once; adapter, two moments; the batch.
    assert clipped.argument_size_in_bytes <= full + 3 * adapter + sum(x.nbytes for x in batch.values()) + 1024


@every_method
def test_4_fold_gives_the_same_logits_and_the_base_structure(base, method):
    trainable = moved(base, method)
    merge = partial(peft.merge, method)
    bound = jax.eval_shape(method.bind, base.params, trainable)
    linear = all(getattr(w, "linear", True) for w in named(bound).values())
    if not linear or method.context(trainable).length:
        with pytest.raises(InputError):
            jax.eval_shape(merge, base.params, trainable)
        return
    folded = jax.jit(merge)(base.params, trainable)
    assert jax.tree.structure(folded) == jax.tree.structure(base.params)
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(base.params), strict=True))
    close(plain(base.model, folded), outputs(base, method, trainable)[0])


@every_method
def test_5_vmapped_adapters_equal_separate_runs(base, method):
    # With Adam's usual eps a gradient that is all rounding gives a full step, either way.
    frozen, state, alone = stepper(base, method, dataclasses.replace(OPTIM, eps=1e-3))
    together = jax.jit(jax.vmap(alone, in_axes=(0, None, None)))
    states = [state._replace(trainable=shaken(begun(base, method, seed))) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
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
    trainable = moved(base, method)
    packed = outputs(base, method, trainable)
    half = BATCH["ids"].shape[1] // 2
    for part in (slice(0, half), slice(half, None)):
        alone = {k: v[1:, part] for k, v in BATCH.items() if k not in ("segments", "positions")}
        close(tuple(x[1:, part] for x in packed), outputs(base, method, trainable, alone))
    changed = BATCH | {"ids": BATCH["ids"].at[:, :half].add(1) % CONFIG.V}
    assert same(outputs(base, method, trainable, changed)[0][:, half:], packed[0][:, half:])


@every_method
def test_8_cached_decoding_equals_recomputation(base, method):
    """Prompts of different lengths in one batch, against greedy steps of the whole rows."""
    trainable = moved(base, method, 0.2)
    bound, context = jax.jit(method.bind)(base.params, trainable), method.context(trainable)
    B, T = BATCH["ids"].shape
    rows = [BATCH["ids"][i, :n].tolist() for i, n in enumerate((9, 4, 7, 1))]
    got = generate(base.model, bound, rows, 5, context=context, pad_to=T)
    one_document = {"segments": jnp.ones((B, T), jnp.int32), "positions": jnp.arange(T)[None].repeat(B, 0)}
    for tokens in zip(*got, strict=True):
        padded = jnp.array([row + [0] * (T - len(row)) for row in rows])
        whole = outputs(base, method, trainable, BATCH | one_document | {"ids": padded})[0]
        for row, token, step in zip(rows, tokens, whole, strict=True):
            assert step[len(row) - 1, token] >= step[len(row) - 1].max() - 1e-5
            row.append(token)


@every_method
def test_10_layouts_remat_chunks_and_accumulation_change_nothing(base, method):
    """Stacked and unrolled layers, with and without recomputation, cross-entropy whole and in chunks, one batch or two
    parts of unequal target counts: the same loss and the same step."""

    def metrics(step, frozen, state):
        return {k: v for k, v in step(state, frozen, BATCH)[1].items() if k in ("loss", "grad_norm", "targets")}

    def differs(scan=True, remat="none", **kwargs):
        other, tx = make_base(V=base.config.V, scan=scan, remat=remat), optax.identity()
        frozen, trainable = peft.partition(method, other.params, jax.random.key(1))
        step = jax.jit(make_train_step(other.model, method, tx, **kwargs))
        try:
            close(metrics(step, frozen, init_state(trainable, tx)), expected, 2e-5)
        except AssertionError as error:
            return str(error)

    frozen, state, step = stepper(base, method)
    expected = metrics(step, frozen, state)
    for settings in ({"remat": "full", "accumulate": 2}, {"scan": False, "chunk": 8}):
        if message := differs(**settings):
            alone = [name for name, value in settings.items() if differs(**{name: value})]
            pytest.fail(f"another step with {settings}, by {alone or 'both together'}:{message}")


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
    T = 6
    ids = BATCH["ids"][:1, :T]

    def out(delta_TD, params, trainable):
        bound = method.bind(params, trainable)
        bound = {**bound, "embed": {"table": Nudged(bound["embed"]["table"], delta_TD)}}
        return forward(base.model, bound, ids, context=method.context(trainable))[0][0]

    jacobian = jax.jit(jax.jacrev(out))(jnp.zeros((T, CONFIG.D)), base.params, moved(base, method))  # [T, V, T, D]
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
