"""Merging: deltas, merges of several, LoRA from them. Also schedules and groups of the optimizer."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graftax import InputError, peft
from graftax.model.layout import restack
from graftax.model.tree import named
from graftax.peft import IA3, DoRA, LoRA, LoRAHead, Prompt, RsLoRA, Subset, chain, merging
from graftax.peft.methods.subset import Gradual
from graftax.train.config import Optim
from graftax.train.optim import labels, make_optimizer
from graftax.train.step import init_state, make_train_step
from tiny import close, make_base, make_batch, same, shaken, stepper

MERGE = np.load(Path(__file__).parent / "golden" / "peft" / "merge.npz")
NAMES = ("head/matrix", "layers/0/attn/q")
QV = "layers/attn/[qv]"


def tuned(method, base, size=0.05):
    return shaken(method.init(jax.random.key(1), base.params), size)


def change(method, params, trainable):
    """W' - W by hand: all of the merged base against the base."""
    merged, before = named(peft.merge(method, params, trainable, jnp.float32)), named(params)
    return {k: np.asarray(merged[k], np.float64) - np.asarray(before[k], np.float64) for k in merged}


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=3), LoRA(rank=2, where="layers/[1:]/attn/q"), DoRA(rank=2, where=QV), IA3(), Subset("norms"),
     LoRA(rank=2, where="embed/table"), chain(Subset("biases"), LoRA(rank=2, where=QV))],
    ids=["lora", "range", "dora", "ia3", "norms", "table", "chain"],
)  # fmt: skip
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_delta_is_what_merging_changes(method, param_dtype):
    base = make_base(tied=False, param_dtype=param_dtype, dtype="float32")
    params = jax.tree.map(lambda x, w: x.astype(w.dtype), shaken(base.params), base.params)  # no bias of zeros
    base = base._replace(params=params)
    trainable = tuned(method, base)
    got = jax.jit(merging.delta, static_argnums=0)(method, base.params, trainable)
    expected = change(method, base.params, trainable)
    assert {k for k, d in expected.items() if d.any()} == set(got)
    for path, d in got.items():
        assert d.dtype == jnp.float32
        np.testing.assert_allclose(d, expected[path], atol=2e-6)
    applied = merging.apply_delta(base.params, got)
    close(applied, peft.merge(method, base.params, trainable), 1e-6 if param_dtype == "float32" else 1e-2)
    assert all(same(named(applied)[k], v) for k, v in named(base.params).items() if k not in got)


def test_sums_and_means_of_trees(base):
    first, second = (shaken(Subset("norms").init(None, base.params), size) for size in (0.1, 0.2))
    by_hand = {k: (1 * first[k] + 3 * second[k]) / 4 for k in first}
    close(merging.average([first, second], [1, 3]), by_hand)
    close(merging.average([first, second]), jax.tree.map(lambda a, b: (a + b) / 2, first, second))
    close(merging.add(first, second, first), jax.tree.map(lambda a, b: 2 * a + b, first, second))
    close(merging.scale(first, -0.5), jax.tree.map(lambda a: -a / 2, first))
    with pytest.raises(InputError, match="tree 1 has other paths"):
        merging.add(first, {k: v for k, v in second.items() if k != "final_norm/scale"})


def test_task_vectors_add_and_take_away(base):
    first, second = (shaken(base.params, size) for size in (0.1, -0.3))
    a, b = (merging.task_vector(t, base.params) for t in (first, second))
    both = merging.apply_delta(base.params, merging.task_arithmetic([a, b], [0.5, 2.0]))
    close(both, jax.tree.map(lambda w, x, y: w + 0.5 * (x - w) + 2 * (y - w), base.params, first, second))
    close(merging.apply_delta(first, a, factor=-1.0), base.params, 1e-6)
    some = {k: v for k, v in b.items() if "attn" in k}
    mixed = merging.task_arithmetic([a, some])
    close(mixed["layers/mlp/up"], a["layers/mlp/up"])
    close(mixed["layers/attn/q"], a["layers/attn/q"] + b["layers/attn/q"])
    with pytest.raises(InputError, match="layers/mlp/upp: wanted a plain array"):
        merging.apply_delta(base.params, {"layers/mlp/upp": a["layers/mlp/up"]})
    with pytest.raises(InputError, match="one architecture"):
        merging.task_vector({"embed": base.params["embed"]}, base.params)


def golden(kind):
    return [{name: jnp.asarray(MERGE[f"{name}/{kind}"][i]) for name in NAMES} for i in range(3)]


@pytest.mark.parametrize("how", ["task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_merging_is_what_hf_peft_does(how, monkeypatch):
    deltas, weights = golden("task"), MERGE["weights"]
    if how.startswith("dare"):
        masks = iter([kept for d in golden("kept") for kept in d.values()])
        monkeypatch.setattr(jax.random, "bernoulli", lambda *_: next(masks))
        deltas = merging.dare(jax.random.key(0), deltas, 0.4)
    if how == "magnitude_prune":
        deltas = [merging.trim(d, 0.3) for d in deltas]
    if how.endswith("ties"):
        got = merging.ties(deltas, 1.0 if how == "dare_ties" else 0.3, weights)
    else:
        got = merging.task_arithmetic(deltas, weights)
    for name in NAMES:
        np.testing.assert_allclose(got[name], MERGE[f"{name}/{how}"], atol=1e-6)


@pytest.mark.full
def test_merging_takes_each_layer_by_itself(base):
    """Stacked or unrolled, the same numbers stay; a path that one update has not is a row of zeros."""
    unrolled = dataclasses.replace(base.config, scan=False)
    stacked = [merging.task_vector(shaken(base.params, s), base.params) for s in (0.1, 0.2)]
    stacked[1] = {k: jnp.flip(v) for k, v in stacked[1].items()}
    flat = [named(restack(peft.base.nested(d), unrolled)) for d in stacked]
    merge = jax.jit(lambda ds: merging.ties(merging.dare(jax.random.key(3), ds, 0.3), 0.4))
    close(named(restack(peft.base.nested(merge(stacked)), unrolled)), merge(flat), 1e-6)
    without = {k: v for k, v in stacked[1].items() if k != "layers/mlp/up"}
    zeros = stacked[1] | {"layers/mlp/up": 0 * stacked[1]["layers/mlp/up"]}
    close(merging.ties([stacked[0], without]), merging.ties([stacked[0], zeros]))


def test_dare_keeps_the_mean():
    x = {"head/matrix": jnp.ones((300, 400))}
    kept = merging.dare(jax.random.key(0), [x, x], 0.9)
    for d in kept:
        assert set(np.unique(d["head/matrix"])) == {0, np.float32(1 / (1 - 0.9))}
        assert float(d["head/matrix"].mean()) == pytest.approx(1, abs=0.03)
    assert not same(kept[0], kept[1])
    for wrong, message in ((lambda: merging.dare(jax.random.key(0), [x], 1.0), "rate 1.0"),
                           (lambda: merging.trim(x, 1.5), "density 1.5")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            wrong()


def product(method, params, trainable):
    return merging.delta(method, jax.tree.map(jnp.zeros_like, params), trainable)


def learns(trainable):
    """No column of A is 0, so that every row of B has a gradient."""
    return all((jnp.abs(t["a"]).max(-2) > 0).all() for t in trainable.values())


def test_extraction_is_the_nearest_of_its_rank(base):
    delta = merging.task_vector(shaken(base.params, 0.1), base.params)
    got, kept = jax.jit(merging.extract_lora, static_argnums=(1, 2))(delta, 4, "linear")
    assert set(got) == {k for k in delta if k.split("/")[-1] in ("q", "k", "v", "o", "gate", "up", "down")}
    for path, t in got.items():
        u, s, v = np.linalg.svd(np.asarray(delta[path], np.float64), full_matrices=False)
        np.testing.assert_allclose(t["a"] @ t["b"], (u[..., :4] * s[..., None, :4]) @ v[..., :4, :], atol=1e-5)
        np.testing.assert_allclose(kept[path], (s[:, :4] ** 2).sum(-1) / (s**2).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(jnp.linalg.norm(t["a"], axis=-2), jnp.linalg.norm(t["b"], axis=-1), rtol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("where", ["linear", "layers/[1:]/mlp/up", QV])
def test_any_update_of_low_rank_becomes_lora(scan, where):
    """Also one that LoRA cannot write itself; with a rank to spare, the rest of the columns can learn."""
    base = make_base(scan=scan)
    method = IA3(where="layers/mlp/up") if where == "linear" else LoRA(rank=3, where=where)
    trainable = tuned(method, base)
    delta = merging.delta(method, base.params, trainable)
    rank = 32 if where == "linear" else 5
    lora, lora_tree = merging.to_lora(delta, rank, where)
    close(merging.delta(lora, base.params, lora_tree), delta, 2e-6)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), base.params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, lora_tree)
    assert learns(lora_tree)
    with pytest.raises(InputError, match="wanted a matrix"):
        merging.to_lora(merging.task_vector(base.params, base.params), 2, "norms")


@pytest.mark.full
@pytest.mark.parametrize(
    "method",
    [LoRA(rank=4), RsLoRA(rank=4, alpha=3.0, where=QV), LoRA(rank=4, where="layers/[:1]/mlp/.*"),
     LoRA(rank=4, ranks=(("layers/[1:]/attn/q", 6),), alphas=(("layers/[-1:]/attn/.*", 5.0),)),
     LoRA(rank=4, where="head/matrix,embed/table")],
    ids=["lora", "rslora", "range", "rules", "tables"],
)  # fmt: skip
@pytest.mark.parametrize("rank", [2, 40])
def test_another_rank(method, rank):
    """The same update where the rank suffices, the nearest where not, by NumPy's SVD of the whole product."""
    base = make_base(tied=False)
    trainable = tuned(method, base)
    new, lora_tree = merging.rerank(method, trainable, rank, base.params)
    assert new == dataclasses.replace(method, rank=rank, ranks=(), alphas=())
    again = jax.jit(lambda t: merging.rerank(method, t, rank, base.params)[1])(trainable)
    before, after = (product(m, base.params, t) for m, t in ((method, trainable), (new, lora_tree)))
    close(product(new, base.params, again), after, 1e-4)
    for path, d in before.items():
        u, s, v = np.linalg.svd(np.asarray(d, np.float64), full_matrices=False)
        nearest = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
        np.testing.assert_allclose(after[path], nearest, atol=2e-5 * s.max())
    if not method.ranks:
        shapes = jax.eval_shape(new.init, jax.random.key(0), base.params)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, lora_tree)
    assert learns(lora_tree)


def test_a_lora_of_another_rank_has_the_same_update(base):
    """A new one stays new, and a trained one keeps its update."""
    method = LoRA(rank=4)
    lora_tree = merging.rerank(method, method.init(jax.random.key(0), base.params), 6)[1]
    assert all((t["b"] == 0).all() for t in lora_tree.values())
    assert learns(lora_tree)
    trainable = tuned(method, base)
    new, lora_tree = merging.rerank(method, trainable, 6)
    close(merging.delta(new, base.params, lora_tree), merging.delta(method, base.params, trainable), 2e-6)


def test_concatenated_adapters_act_as_their_sum(base):
    adapters = [LoRA(rank=2, alpha=3.0, where=QV), RsLoRA(rank=5, where="layers/attn/.*[qo]"),
                LoRA(rank=3, where="layers/[1:]/mlp/up", alphas=(("layers/[-1:]/.*", 7.0),)),
                LoRA(rank=1, where="layers/[:1]/mlp/up")]  # fmt: skip
    pairs = [(m, shaken(m.init(jax.random.key(i), base.params), 0.1 * (i + 1))) for i, m in enumerate(adapters)]
    lora, lora_tree = merging.concatenate(*pairs, params=jax.eval_shape(lambda: base.params))
    total = merging.task_arithmetic([product(m, base.params, t) for m, t in pairs])
    close(dict(sorted(product(lora, base.params, lora_tree).items())), dict(sorted(total.items())), 1e-6)
    ranks = {key: t["a"].shape[-1] for key, t in lora_tree.items()}
    assert ranks == {"layers/attn/q": 7, "layers/attn/v": 2, "layers/attn/o": 5,
                     "layers/mlp/up[1:2]": 3, "layers/mlp/up[0:1]": 1}  # fmt: skip
    shapes = jax.eval_shape(lora.init, jax.random.key(0), base.params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, lora_tree)


def test_what_is_not_one_product_is_refused(base):
    dora = DoRA(rank=2, where=QV)
    with pytest.raises(InputError, match="DoRA: its update is not s A B alone"):
        merging.rerank(dora, dora.init(jax.random.key(0), base.params), 4)
    for other in (LoRAHead(), Prompt()):
        with pytest.raises(InputError, match=f"{type(other).__name__}: its update is not"):
            merging.rerank(other, {}, 4)
    with pytest.raises(InputError, match="Prompt: its update is not"):
        merging.concatenate((Prompt(), {}))
    ruled = LoRA(rank=2, alphas=((".*", 4.0),))
    with pytest.raises(InputError, match="give params="):
        merging.rerank(ruled, ruled.init(jax.random.key(0), base.params), 4)
    part, whole = LoRA(where="layers/[1:]/mlp/up"), LoRA(where="layers/mlp/up")
    with pytest.raises(InputError, match=r"layers/mlp/up\[1:2\] and layers/mlp/up share layers"):
        merging.concatenate(*((m, m.init(jax.random.key(0), base.params)) for m in (part, whole)))


# Schedules: parts that begin later, and groups with an optimizer of their own.


def bits(x):
    return np.asarray(x).view(np.uint32)


def test_gradual_begins_at_the_top(base):
    method = Gradual()
    trainable = method.init(None, base.params)
    starts = method.starts(trainable, 100)
    assert starts["final_norm/scale"] == [0]
    assert starts["layers/mlp/up"] == [10, 5]
    assert starts["embed/table"] == [15]
    deep = jax.eval_shape(lambda: method.init(None, make_base(L=8).params))
    assert Gradual(stages=5, until=0.4).starts(deep, 100)["layers/attn/q"] == [40, 30, 30, 20, 20, 10, 10, 0]
    part = Gradual("layers/[1:]/attn/.*").init(None, base.params)
    assert set(map(tuple, Gradual("layers/[1:]/attn/.*").starts(part, 100).values())) == {(0,)}
    unrolled = method.init(None, make_base(scan=False).params)
    assert method.starts(unrolled, 100)["layers/0/mlp/up"] == [10]
    with pytest.raises(InputError, match="stages 0"):
        Gradual(stages=0).starts(trainable, 100)


def test_gradual_leaves_every_bit_until_its_time():
    """Weight decay included; -0.0 stays -0.0; all of it is one compilation."""
    base, method = make_base(), Gradual(stages=4, until=0.3)  # 20 steps: 0, 2, 4, 6
    base.params["layers"]["attn"]["q_bias"] = jnp.full_like(base.params["layers"]["attn"]["q_bias"], -0.0)
    frozen, state, step = stepper(base, method, Optim(lr=1e-2, weight_decay=0.1))
    starts = method.starts(state.trainable, 20)
    assert {s for row in starts.values() for s in row} == {0, 2, 4, 6}
    begin = state.trainable
    for i in range(8):
        state, _ = step(state, frozen, make_batch(i))
        for key, row in starts.items():
            layers = [state.trainable[key][j] for j in range(len(row))] if len(row) > 1 else [state.trainable[key]]
            before = [begin[key][j] for j in range(len(row))] if len(row) > 1 else [begin[key]]
            for start, now, was in zip(row, layers, before, strict=True):
                assert (bits(now) == bits(was)).all() == (i < start), f"{key} at step {i}, which begins at {start}"
    assert step.func._cache_size() == 1
    # A step that is left out does not count: the clock is in the optimizer's state, and so is it in a checkpoint.
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert all(int(x) == 8 for x in counts)
    poisoned = make_batch() | {"weights": make_batch()["weights"].at[0, 0].set(jnp.nan)}
    assert same(step(state, frozen, poisoned)[0].opt_state, state.opt_state)


def test_rates_by_group_are_optimizers_with_those_rates(base):
    """Optim.groups against optax.partition of whole optimizers, weight decay and schedule included."""
    method, optim = Subset(), Optim(lr=1e-2, warmup=2, clip=0.0, eps=1e-6)  # or Adam makes a step of what is rounding
    frozen, state, step = stepper(
        base, method, dataclasses.replace(optim, groups=((".*norm.*", 3.0), ("embed/.*", 0.1)))
    )
    rates = {"norm": 3.0, "table": 0.1, "rest": 1.0}
    group = labels([(".*norm.*", "norm"), ("embed/.*", "table"), (".*", "rest")], state.trainable)

    def optimizer(name, factor):
        group_tree = {k: v if group[k] == name else optax.MaskedNode() for k, v in state.trainable.items()}
        return make_optimizer(dataclasses.replace(optim, lr=optim.lr * factor), group_tree, 20)

    tx = optax.partition({name: optimizer(name, factor) for name, factor in rates.items()}, group)
    other, other_step = init_state(state.trainable, tx), jax.jit(make_train_step(base.model, method, tx))
    for i in range(3):
        state, _ = step(state, frozen, make_batch(i))
        other, _ = other_step(other, frozen, make_batch(i))
    close(state.trainable, other.trainable, 1e-5)


def test_groups_may_have_another_optimizer(base):
    """Any Optax transformation trains any trainable tree: Muon for A and B, Adam by its own schedule for norms."""
    method = chain(Subset("norms"), LoRA(rank=4, where=QV))
    frozen, trainable = peft.partition(method, base.params, jax.random.key(1))
    axes = optax.contrib.MuonDimensionNumbers
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda x: axes(x.ndim - 2, x.ndim - 1), tree)
    )
    group = labels([("lora/.*", "matrix"), ("subset/.*", "norm")], trainable)
    parts = {
        "matrix": optax.chain(muon, optax.scale_by_learning_rate(1e-2)),
        "norm": optax.adam(optax.linear_schedule(0.0, 1e-2, 2)),
    }
    tx = optax.partition(parts, group)
    state, step = init_state(trainable, tx), jax.jit(make_train_step(base.model, method, tx))
    state, _ = step(state, frozen, make_batch())
    assert same(state.trainable["subset"], trainable["subset"]), "its schedule begins at 0"
    b = state.trainable["lora"]["layers/attn/q"]["b"]
    singular = np.linalg.svd(b, compute_uv=False)
    assert (singular.max() / singular.min()) < 2, "Muon's first step is nearly orthogonal"
    state, _ = step(state, frozen, make_batch(1))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.trainable, trainable)
    assert all(jax.tree.leaves(moved))
    with pytest.raises(InputError, match="no label covers"):
        labels([("lora/.*", "matrix")], trainable)
