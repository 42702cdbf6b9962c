"""Methods beyond the laws: counts, partition, chains, and errors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import presets
from graftax.model.tree import named, paths
from graftax.peft import (
    HRA,
    IA3,
    DoRA,
    HiRA,
    Houlsby,
    LoHa,
    LoKr,
    LoRA,
    LoRAPlus,
    MiSS,
    Prefix,
    Prompt,
    RsLoRA,
    Subset,
    chain,
)  # fmt: skip
from graftax.peft.methods.lokr import split
from graftax.peft.methods.lora import LoRAWeight
from graftax.peft.methods.pissa import principal
from graftax.train.config import Optim, Run
from graftax.train.optim import decay_mask, make_optimizer
from graftax.train.runs.added_tokens import trains_rows
from graftax.train.setup import initial_layout as start
from graftax.train.setup import resolve_method
from graftax.train.step import init_state, make_loss
from tiny import CONFIG, OPTIM, close, make_base, make_batch, same, shaken, stepper


def test_counts_equal_published_ones():
    qv = "layers/attn/[qv]"
    expected = {
        "llama-2-7b": (4_194_304, 39_976_960, 41_336_832, 614_400, 81_920, 7_864_320),
        "qwen2.5-0.5b": (540_672, 8_798_208, 9_102_336, 141_312, 17_920, 184_320),
        "gemma-2-2b": (1_597_440, 20_766_720, 21_472_256, 319_488, 46_080, 1_597_440),
    }
    for name, counts in expected.items():
        ia3 = IA3() if name == "llama-2-7b" else IA3(where=qv)  # HF PEFT's default differs by architecture
        methods = (LoRA(rank=8, where=qv), LoRA(rank=16), DoRA(rank=16), ia3, Prompt(tokens=20), Prefix(tokens=30))
        assert tuple(peft.count(m, presets[name]) for m in methods) == counts


def test_partition_keeps_one_copy_of_each_parameter(base):
    for where in ("all", "norms", "layers/[1:]/mlp/.*"):
        method = Subset(where)
        frozen, trainable = peft.partition(method, base.params, jax.random.key(0))
        total = sum(x.size for x in jax.tree.leaves(base.params))
        assert sum(x.size for x in jax.tree.leaves((frozen, trainable))) == total
        assert same(method.bind(frozen, trainable), base.params)
        assert same(method.bind(base.params, trainable), base.params)
    assert set(trainable) == {f"layers/mlp/{n}[1:2]" for n in ("gate", "up", "down")}


def test_trainable_is_fp32_over_a_half_precision_base():
    base = make_base(param_dtype="bfloat16", dtype="bfloat16")
    for method in (Subset("norms"), LoRA(), Houlsby(), Prompt(), Prefix()):
        trainable = method.init(jax.random.key(0), base.params)
        assert {str(x.dtype) for x in jax.tree.leaves(trainable)} == {"float32"}
    folded = peft.merge(LoRA(), base.params, shaken(LoRA().init(jax.random.key(0), base.params)))
    assert {str(x.dtype) for x in jax.tree.leaves(folded)} == {"bfloat16"}


def test_lora_is_its_formula(base):
    method = LoRA(rank=3, alpha=6.0, where="layers/attn/q")
    trainable = shaken(method.init(jax.random.key(0), base.params))
    t = trainable["layers/attn/q"]
    expected = named(base.params)["layers/attn/q"] + 2.0 * jnp.einsum("ldr,lrf->ldf", t["a"], t["b"])
    close(named(peft.merge(method, base.params, trainable))["layers/attn/q"], expected)


def test_methods_are_the_same_on_stacked_and_unrolled_layers():
    batch = make_batch()
    for method in (LoRA(), Houlsby(), Prefix(), Subset("layers/[1:]/attn/.*")):
        out = []
        for scan in (True, False):
            base = make_base(scan=scan)
            out.append(
                peft.apply(base.model, base.params, method, method.init(jax.random.key(3), base.params), batch["ids"])
            )
        close(*out)


def test_chain_is_one_after_the_other(base):
    method = chain(Subset("norms"), LoRA(), LoRA(rank=2, where="layers/mlp/up"))
    assert [name for name, _ in method.methods] == ["subset", "lora", "lora_2"]
    trainable = shaken(method.init(jax.random.key(0), base.params))
    batch = make_batch()
    by_hand = base.params
    for name, m in method.methods:
        by_hand = peft.merge(m, by_hand, trainable[name])
    logits = peft.apply(base.model, base.params, method, trainable, batch["ids"])
    close(logits, base.model.apply({"params": by_hand}, batch["ids"]))


def test_chain_refuses_what_has_no_order(base):
    wrong = chain(LoRA(), Subset("attention"))
    with pytest.raises(InputError, match=r"Subset trains layers/attn/\w+, which an earlier method has taken"):
        wrong.bind(base.params, wrong.init(jax.random.key(0), base.params))
    two = chain(Prompt(), Prefix())
    with pytest.raises(InputError, match="two methods put positions before the text"):
        two.context(two.init(jax.random.key(0), base.params))


def test_errors_name_what_is_wrong(base):
    with pytest.raises(InputError, match="wanted a matrix"):
        LoRA(where="norms").init(jax.random.key(0), base.params)
    with pytest.raises(InputError, match="belongs to another base"):
        LoRA().bind({"embed": base.params["embed"]}, LoRA().init(jax.random.key(0), base.params))
    with pytest.raises(InputError, match="not linear"):
        peft.fold(Houlsby().bind(base.params, Houlsby().init(jax.random.key(0), base.params)))


def test_a_prompt_starts_as_rows_of_the_vocabulary(base):
    prompt = Prompt(tokens=4).init(jax.random.key(0), base.params)["embed/table"]["prompt"]
    table = base.params["embed"]["table"]
    assert all((table == row).all(axis=1).any() for row in prompt)
    assert prompt.shape == (4, CONFIG.D)


def dense(base, method, trainable, path):
    return named(peft.merge(method, base.params, trainable))[path] - named(base.params)[path]


def test_lora_by_rules(base):
    """Ranks and alphas for some layers and matrices, alike in both layouts."""
    rules = {"ranks": (("layers/[1:]/attn/q", 3), (".*/[kv]", 1)), "alphas": (("layers/[:1]/attn/.*", 4.0),)}
    method = LoRA(rank=2, alpha=6.0, where="layers/attn/[qkv]", **rules)
    trainable = shaken(method.init(jax.random.key(0), base.params))
    assert {k: t["a"].shape for k, t in trainable.items()} == {
        "layers/attn/q[0:1]": (1, 32, 2), "layers/attn/q[1:2]": (1, 32, 3),
        "layers/attn/k": (2, 32, 1), "layers/attn/v": (2, 32, 1),
    }  # fmt: skip
    q, k = ([t for key, t in sorted(trainable.items()) if key.startswith(f"layers/attn/{n}")] for n in "qk")
    close(dense(base, method, trainable, "layers/attn/q"),
          jnp.concatenate([2 * q[0]["a"] @ q[0]["b"], 2 * q[1]["a"] @ q[1]["b"]]))  # fmt: skip
    close(
        dense(base, method, trainable, "layers/attn/k"), jnp.array([4.0, 6.0])[:, None, None] * (k[0]["a"] @ k[0]["b"])
    )
    unrolled = make_base(scan=False)
    plain = LoRA(rank=2, where="layers/attn/q", ranks=rules["ranks"][:1])
    a, b = (named(plain.init(jax.random.key(0), x.params)) for x in (base, unrolled))
    assert same(a["layers/attn/q[1:2]/a"][0], b["layers/1/attn/q/a"])
    with pytest.raises(InputError, match="rank rule 'layers/atn/q' matches no parameter"):
        LoRA(ranks=(("layers/atn/q", 3),)).init(jax.random.key(0), base.params)


def test_every_draw_of_a_run_follows_its_seed(base):
    """Dropout of the step, and what methods draw from a seed of their own (VeRA's projections, SHiRA's places)."""
    method, norms = LoRA(rank=2, dropout=0.5), []
    frozen, state, step = stepper(base, method)
    for seed in (0, 0, 1):
        state = init_state(state.trainable, make_optimizer(OPTIM, state.trainable, 20, method), seed=seed)
        norms.append(float(step(state, frozen, make_batch())[1]["grad_norm"]))
    assert norms[0] == norms[1] != norms[2]
    keys = [start(Run(steps=1, seed=seed), base.params).begin(base.params)[1].key for seed in (0, 1)]
    assert not same(*keys), "a run hands its seed to the step"
    drawing = {name: cls() for name, cls in peft.methods.items() if hasattr(cls(), "seed")}
    assert set(drawing) >= {"vera", "randlora", "lorafa", "shira", "fourierft"}
    for name, drawn in drawing.items():
        assert drawn.seed is None, f"{name}: its draws would be the same in runs of different seeds"
        assert resolve_method(chain(drawn), None, 7).methods[0][1].seed == 7
        seeded = dataclasses.replace(drawn, seed=3)
        assert resolve_method(seeded, None, 7) == seeded


def test_dropout_draws_in_training_alone(base):
    batch, method = make_batch(), LoRA(rank=2, dropout=0.5)
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    loss = make_loss(base.model, method)
    plain = make_loss(base.model, LoRA(rank=2))(trainable, base.params, batch)[0]
    assert same(loss(trainable, base.params, batch)[0], plain)
    drawn = [jax.jit(loss)(trainable, base.params, batch, jax.random.key(i))[0] for i in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != plain
    # Dropout keeps the mean: one weight, many draws.
    w = LoRAWeight(jnp.zeros((32, 8)), jnp.ones((32, 2)), jnp.ones((2, 8)), dropout=0.25)
    x, seeds = jnp.linspace(1, 2, 32)[None], jax.random.key_data(jax.random.split(jax.random.key(0), 4000))
    mean = jax.vmap(lambda seed: x @ dataclasses.replace(w, seed=seed))(seeds).mean(0)
    close(mean, x @ w, 1e-2)


def test_no_two_draws_of_a_run_are_alike(base):
    """Dropout differs between matrices, layers, steps and accumulated parts; two links of a chain begin apart."""
    method = LoRA(rank=2, dropout=0.5)
    frozen, state, step = stepper(base, method)
    state = state._replace(trainable=shaken(state.trainable, 0.3))
    bound = named(method.bind_train(base.params, state.trainable, jax.random.key(0)))
    seeds = [tuple(seed) for w in bound.values() if isinstance(w, LoRAWeight) for seed in np.asarray(w.seed).tolist()]
    assert len(set(seeds)) == len(seeds) == 14
    row = {name: x[:1] for name, x in make_batch().items()}
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), row)
    losses = [float(step(state._replace(step=jnp.int32(i)), frozen, row)[1]["loss"]) for i in (0, 1)]
    losses.append(float(stepper(base, method, accumulate=2)[2](state, frozen, twice)[1]["loss"]))
    assert min(np.diff(sorted(losses))) > 1e-4
    links = chain(LoRA(rank=2), LoRA(rank=2)).init(jax.random.key(0), base.params)
    assert not same(links["lora"], links["lora_2"])


def test_lora_of_a_table(base):
    """The tied projection keeps the base's rows, as in HF PEFT."""
    method, ids = LoRA(rank=2, alpha=4.0, where="embed/table"), make_batch()["ids"]
    trainable = shaken(method.init(jax.random.key(0), base.params))
    table, t = named(base.params)["embed/table"], trainable["embed/table"]
    weight = method.bind(base.params, trainable)["embed"]["table"]
    close(weight[ids], (table + 2 * t["a"] @ t["b"])[ids])
    assert same(weight.T, table.T)
    with pytest.raises(InputError, match="embed/table: the output projection is tied"):
        peft.merge(method, base.params, trainable)
    untied = make_base(tied=False)
    merged = peft.merge(method, untied.params, trainable)
    close(named(merged)["embed/table"], named(untied.params)["embed/table"] + 2 * t["a"] @ t["b"])


def test_b_learns_faster_in_lora_plus(base):
    moved = {}
    for method in (LoRA(rank=2), LoRAPlus(rank=2, ratio=8.0)):
        frozen, state, step = stepper(base, method, Optim(lr=1e-3, warmup=0, weight_decay=0.0))
        after = step(state, frozen, make_batch())[0].trainable
        moved[type(method)] = jax.tree.map(lambda a, b: a - b, after, state.trainable)["layers/attn/q"]
    close(moved[LoRAPlus]["a"], moved[LoRA]["a"])
    close(moved[LoRAPlus]["b"], 8 * moved[LoRA]["b"])


def test_weight_decay_shrinks_updates_and_no_prompt_or_rotation(base):
    def shrunk(method, **optim):
        shapes = jax.eval_shape(method.init, jax.random.key(0), base.params)
        return {path.split("/")[-1] for path, on in paths(decay_mask(Optim(**optim), shapes, method)) if on}

    prompts = (Prompt(tokens=2), Prefix(tokens=2), peft.LLaMAAdapter(tokens=2))
    for method in (*prompts, peft.OFT(), peft.BOFT(), HRA(), peft.VeRA(rank=2), peft.RandLoRA(), IA3()):
        assert not shrunk(method), type(method).__name__
    assert shrunk(LoRA()) == shrunk(DoRA()) == shrunk(chain(Prompt(tokens=2), LoRA(rank=2))) == {"a", "b"}
    assert shrunk(peft.PTuning(tokens=2)) == {"w1", "w2", "w3"}
    assert shrunk(peft.PrefixMLP(tokens=2)) == {"w1", "w2"}
    assert shrunk(Subset()) == {"table", *"qkvo", "gate", "up", "down"}
    assert shrunk(Prompt(tokens=2), decay_where=".*") == {"prompt"}
    assert shrunk(LoRA(), decay_where=".*/b") == {"b"}


def test_a_table_is_replaced_before_it_is_adapted(base):
    """Else the earlier method trains in vain, or virtual ids are looked up in a table that has no row for them."""
    head, lookup, on_head = peft.Head(), peft.Lookup(), peft.LoRAHead()
    in_vain = [(on_head, head), (head, head), (LoRA(where="embed/table"), lookup), (Prompt(), lookup), (lookup, lookup)]
    for methods in in_vain:
        method = chain(*methods)
        with pytest.raises(InputError, match=rf"chain: {type(methods[1]).__name__.lower()} replaces .* put .* first"):
            jax.eval_shape(method.bind, base.params, jax.eval_shape(method.init, jax.random.key(0), base.params))
    for methods in ((head, on_head), (lookup, head), (head, lookup), (lookup, on_head), (lookup, Prompt())):
        method = chain(*methods)
        jax.eval_shape(method.bind, base.params, jax.eval_shape(method.init, jax.random.key(0), base.params))


def test_dora_of_a_matrix_with_columns_of_zeros():
    """HF PEFT divides 0 by 0 there. The factor of such a column is 1, so that B, and then m, can move it."""
    w = np.float32([[1, 0, 1e-4]] * 6)
    a, b, x = np.ones((1, 6, 2), np.float32), np.zeros((1, 2, 3), np.float32), np.float32([range(6), range(6, 12)])
    start = {"layers/attn/q": {"a": a, "b": b, "m": np.linalg.norm(w, axis=0)[None]}}

    @partial(jax.jit, static_argnums=1)
    def out(trainable, dtype=jnp.float32):
        bound = DoRA(where="layers/attn/q").bind({"layers": {"attn": {"q": w[None]}}}, trainable)["layers"]["attn"]["q"]
        return x.astype(dtype) @ jax.tree.map(lambda leaf: leaf[0].astype(dtype), bound)

    @jax.jit
    def step(trainable):
        slopes = jax.grad(lambda t: (out(t) - 1).var())(trainable)
        return jax.tree.map(lambda p, g: p - 0.01 * g, trainable, slopes), slopes["layers/attn/q"]

    for dtype in (jnp.float32, jnp.float16):  # in which the square of 1e-4 is 0
        close(out(start, dtype), x.astype(dtype) @ w.astype(dtype))
    first, slopes = step(start)
    assert (slopes["b"][..., 1] != 0).all()
    second, slopes = step(first)
    assert slopes["m"][0, 1] != 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((second, slopes)))
    cancelled = {"layers/attn/q": start["layers/attn/q"] | {"a": -a, "b": np.full_like(b, 1 / 16)}}  # w + a b = 0
    assert jnp.isfinite(out(cancelled)).all()


def test_pissa_trains_where_a_matrix_has_no_more_singular_values():
    for w in (jnp.zeros((6, 4)), jnp.zeros((6, 4)).at[0, 1].set(3)):
        a, b = principal(w, 2.0, 3)
        close(2 * a @ b, w)
        assert (jnp.linalg.norm(a, axis=0) > 0).all()


def test_dora_is_its_formula(base):
    """Lengths and directions of columns, on all layers and on one."""
    for where, layers in (("layers/attn/q", slice(0, 2)), ("layers/[1:]/attn/q", slice(1, 2))):
        method = DoRA(rank=2, alpha=4.0, where=where)
        trainable = shaken(method.init(jax.random.key(0), base.params))
        (t,), w = trainable.values(), named(base.params)["layers/attn/q"]
        v = w[layers] + 2 * t["a"] @ t["b"]
        expected = w.at[layers].set(t["m"][:, None] * v / jnp.linalg.norm(v, axis=1, keepdims=True))
        close(named(peft.merge(method, base.params, trainable))["layers/attn/q"], expected)


def test_rslora_scales_by_the_root(base):
    trainable = shaken(LoRA(rank=4).init(jax.random.key(0), base.params))
    ours = dense(base, RsLoRA(rank=4, alpha=3.0), trainable, "layers/attn/q")
    close(ours, dense(base, LoRA(rank=4, alpha=6.0), trainable, "layers/attn/q"))


def test_chains_keep_draws_penalties_and_transforms(base):
    """Each link's own: here LoRA+'s rates and dropout beside a mask."""
    method = chain(Subset("norms"), LoRAPlus(rank=2, dropout=0.5, ratio=4.0))
    frozen, state, step = stepper(base, method)
    after = step(state, frozen, make_batch())[0]
    assert not same(after.trainable, state.trainable)
    alone = jax.jit(make_loss(base.model, method))
    losses = [alone(state.trainable, frozen, make_batch(), jax.random.key(i))[0] for i in (1, 2)]
    assert losses[0] == losses[1]  # B is 0, so nothing is drawn from yet
    losses = [alone(after.trainable, frozen, make_batch(), jax.random.key(i))[0] for i in (1, 2)]
    assert losses[0] != losses[1]


def kron(t, m):
    k2 = t["k2"] if "k2" in t else t["a2"] @ t["b2"]
    return m.alpha / m.rank * jnp.kron(t["k1"], k2)


def reflections(t):
    H = jnp.eye(len(t["u"]))
    for u in t["u"].T:
        H = H @ (jnp.eye(len(u)) - 2 * jnp.outer(u, u) / (u @ u))
    return H


# Formulas of the linear methods: W' of one matrix w [D, F], given its arrays t and the method m.
AT = {"where": "layers/mlp/(up|down)"}
FORMULAS = {
    LoHa(rank=3, alpha=6.0, **AT): lambda w, t, m: w + 2 * (t["a1"] @ t["b1"]) * (t["a2"] @ t["b2"]),
    LoKr(rank=2, alpha=4.0, **AT): lambda w, t, m: w + kron(t, m),
    LoKr(rank=8, alpha=4.0, factor=4, **AT): lambda w, t, m: w + kron(t, m),
    HiRA(rank=3, **AT): lambda w, t, m: w * (1 + t["a"] @ t["b"]),
    HRA(rank=3, **AT): lambda w, t, m: reflections(t).T @ w,
    MiSS(rank=5, **AT): lambda w, t, m: w + jnp.tile(t["s"], (-(-len(w) // 5), 1))[: len(w)],
    IA3(where="layers/mlp/up", inner="layers/mlp/down"): lambda w, t, m: (
        w * t["after"] if "after" in t else w * t["before"][:, None]
    ),
}


@pytest.mark.parametrize("method", FORMULAS, ids=lambda m: type(m).__name__)
def test_linear_methods_are_their_formulas(base, method):
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.2)
    merged = named(peft.merge(method, base.params, trainable))
    for path, arrays in trainable.items():
        expected = [FORMULAS[method](w, jax.tree.map(lambda x, i=i: x[i], arrays), method)
                    for i, w in enumerate(named(base.params)[path])]  # fmt: skip
        close(merged[path], jnp.stack(expected))


def test_factors_of_lokr():
    assert [split(n, f) for n, f in ((12, -1), (7, -1), (48, 4), (48, 5), (36, -1), (10, 20))] == [
        (3, 4), (1, 7), (4, 12), (4, 12), (6, 6), (2, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "tied", "untied"), [
    (LoRA(rank=2), ((0, 0), (0, 0)), ((0, 0), (0, 0))),
    (LoRA(rank=2, where="linear, embed/table"), ((1, 1), (0, 0)), ((1, 1), (0, 0))),
    (Subset("all"), ((1, 1), (1, 1)), ((1, 1), (1, 1))),
    (peft.Tokens(ids=(9, 4)), ((1, 0), (1, 0)), ((1, 0), (0, 0))),
    (chain(LoRA(rank=2), peft.Tokens(ids=(4, 7))), ((1, 1), (1, 1)), ((1, 1), (0, 0))),
    (Prompt(tokens=3), ((0, 0), (0, 0)), ((0, 0), (0, 0))),
], ids=lambda m: type(m).__name__ if isinstance(m, peft.Method) else None)  # fmt: skip
def test_which_tokens_a_method_trains(method, tied, untied):
    """Of ids 4 and 7: their embeddings, and their logits."""
    for base, expected in ((make_base(), tied), (make_base(tied=False), untied)):
        assert tuple(tuple(map(int, x)) for x in trains_rows(method, base.params, [4, 7])) == expected
