"""Prompts, prefixes, tokens and parallel adapters against their formulas and HF PEFT (tests/golden/peft)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws as laws
from graftax import InputError, peft
from graftax.model import Transformer, forward, generate, presets
from graftax.model.layers import MLP, Attention, LayerInputs
from graftax.model.layout import restack
from graftax.model.rope import rope_table
from graftax.model.tree import named
from graftax.peft import (
    LLaMAAdapter,
    LoRA,
    Parallel,
    Prefix,
    PrefixMLP,
    Prompt,
    PTuning,
    Subset,
    Tokens,
    chain,
)  # fmt: skip
from test_variants import VARIANTS
from tiny import CONFIG, Base, close, make_base, make_batch, same, shaken

GOLDEN = Path(__file__).parent / "golden" / "peft"
COUNTS = json.loads((GOLDEN / "counts.json").read_text())
BATCH = make_batch()
IDS = BATCH["ids"]


def logits(base, method, trainable, ids=IDS):
    return peft.apply(base.model, base.params, method, trainable, ids)


def variant(name, **changes):
    base = make_base(**VARIANTS[name], **changes)
    return Base(base.config, base.model, shaken(base.params, 0.1))


# Counts


@pytest.mark.parametrize("model", COUNTS)
def test_counts_are_those_of_hf_peft(model):
    methods = {
        "p_tuning 20": PTuning(tokens=20),
        "prefix 30 projection": PrefixMLP(tokens=30),
        "adaption_prompt 10x30": LLaMAAdapter(tokens=10, layers=30),
        "tokens 8": Tokens(ids=tuple(range(8))),
    }
    counts = {name: peft.count(method, presets[model]) for name, method in methods.items() if name in COUNTS[model]}
    assert counts == {name: COUNTS[model][name] for name in counts}
    assert len(counts) >= 3


# Prompt, P-tuning, prefix tuning by an MLP


def test_a_prompt_starts_as_asked(base):
    def start(**fields):
        return Prompt(tokens=5, **fields).init(jax.random.key(0), base.params)["embed/table"]["prompt"]

    table = base.params["embed"]["table"]
    assert same(start(ids=(7, 3)), table[jnp.array([7, 3, 7, 3, 7])])
    assert same(start(init_from="ids", ids=(9, 8, 7, 6, 5, 4)), table[jnp.array([9, 8, 7, 6, 5])])
    assert all((table == row).all(axis=1).any() for row in start())
    random = Prompt(tokens=500, init_from="random").init(jax.random.key(0), base.params)["embed/table"]["prompt"]
    np.testing.assert_allclose([random.mean(), random.std()], [0, 1], atol=0.03)
    for wrong in ({"init_from": "ids"}, {"text": "Classify the intent:"}):
        with pytest.raises(InputError, match="prompt: no ids; give ids="):
            start(**wrong)
    with pytest.raises(InputError, match="prompt: id 61 is no row of embed/table; wanted ids from 0 to 60"):
        start(ids=(60, 61))


def linear(arrays, i, x):
    return jnp.einsum("pd,df->pf", x, arrays[f"w{i}"]) + arrays[f"b{i}"]


@pytest.mark.full
def test_p_tuning_is_a_prompt_that_an_mlp_makes(base):
    method = PTuning(tokens=3, hidden=12)
    trainable = shaken(method.init(jax.random.key(0), base.params))
    t = trainable["embed/table"]
    assert {n: x.shape for n, x in t.items()} == {
        "prompt": (3, 32), "w1": (32, 12), "b1": (12,), "w2": (12, 12), "b2": (12,), "w3": (12, 32), "b3": (32,),
    }  # fmt: skip
    rows = linear(t, 3, jnp.maximum(linear(t, 2, jnp.maximum(linear(t, 1, t["prompt"]), 0)), 0))
    close(logits(base, method, trainable), logits(base, Prompt(tokens=3), {"embed/table": {"prompt": rows}}))


def test_an_encoder_begins_as_torch_begins_it(base):
    t = PTuning(tokens=400, hidden=300).init(jax.random.key(0), base.params)["embed/table"]
    np.testing.assert_allclose([t["prompt"].mean(), t["prompt"].std()], [0, 1], atol=0.03)
    for i, fan in ((1, 32), (2, 300), (3, 300)):
        for x in (t[f"w{i}"], t[f"b{i}"]):
            assert 0.8 < jnp.abs(x).max() * fan**0.5 <= 1
        np.testing.assert_allclose(t[f"w{i}"].std(), (3 * fan) ** -0.5, rtol=0.05)


@pytest.mark.full
@pytest.mark.parametrize("scan", [True, False])
def test_prefix_mlp_is_a_prefix_that_an_mlp_makes(scan):
    base, method = make_base(scan=scan), PrefixMLP(tokens=3, hidden=5)
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    assert same(trainable, shaken(method.init(jax.random.key(0), make_base(scan=not scan).params), 0.3))
    t = trainable["prefix/mlp"]
    out = linear(t, 2, jnp.tanh(linear(t, 1, t["prompt"])))  # [P, L 2 K H]
    width = CONFIG.K * CONFIG.H
    past = {f"layers/{i}/attn/{n}": out[:, (2 * i + j) * width : (2 * i + j + 1) * width]
            for i in range(CONFIG.L) for j, n in enumerate("kv")}  # fmt: skip
    unrolled = make_base(scan=False)
    close(logits(base, method, trainable), logits(unrolled, Prefix(tokens=3), past))


def test_prefix_mlp_over_a_fused_matrix():
    base = variant("gpt2")
    trainable = PrefixMLP(tokens=3).init(jax.random.key(0), base.params)
    width = base.config.K * base.config.H
    assert trainable["prefix/mlp"]["w2"].shape == (width, 2 * base.config.L * width)
    assert logits(base, PrefixMLP(tokens=3), trainable).shape == (*IDS.shape, base.config.V)


# LLaMA-Adapter


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
def test_llama_adapter_over_other_architectures(name):
    """Packed, cached, stacked and unrolled, recomputed; and nothing changes while the gate is shut."""
    base, method = variant(name), LLaMAAdapter(tokens=3, layers=1)
    laws.test_7_packed_documents_equal_separate_ones(base, method)
    laws.test_8_cached_decoding_equals_recomputation(base, method)
    start = method.init(jax.random.key(1), base.params)
    assert same(logits(base, method, start), base.model.apply({"params": base.params}, IDS))
    open_ = {key: {"prompt": t["prompt"], "gate": t["gate"] + 0.7} for key, t in start.items()}
    expected = logits(base, method, open_)
    assert jnp.abs(expected - logits(base, method, start)).max() > 1e-2
    for change in ({"scan": False}, {"remat": "full"}):
        config = dataclasses.replace(base.config, **change)
        params = restack(base.params, config)
        other = method.init(jax.random.key(1), params)
        other = {key: {"prompt": t["prompt"], "gate": t["gate"] + 0.7} for key, t in other.items()}
        close(peft.apply(Transformer(config), params, method, other, IDS), expected)


def test_a_prompt_s_keys_are_normed_and_do_not_turn():
    """One layer's attention, written out: with norms of heads, capped scores and a scale of its own."""
    base = variant("gemma", L=1)
    c, method = base.config, LLaMAAdapter(tokens=3)
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.5)
    bound = method.bind(base.params, trainable)
    p = {path[len("layers/attn/") :]: x[0] for path, x in named(base.params).items() if "layers/attn/" in path}
    t = {n: x[0] for n, x in trainable["layers/attn/o"].items()}
    x = jax.random.normal(jax.random.key(2), (2, 5, c.D))
    turn = rope_table(jnp.arange(5)[None].repeat(2, 0), c.rope, c.H, jnp.array([5, 5]))

    def run(params):
        layer = jax.tree.map(lambda x: x[0], params["layers"]["attn"])
        return Attention(c).apply({"params": layer}, x, LayerInputs(None, turn), None)

    def rms(y, s):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm_eps) * (1 + s)

    k = rms((t["prompt"] @ p["k"]).reshape(3, c.K, c.H), p["k_norm/scale"])
    v = (t["prompt"] @ p["v"]).reshape(3, c.K, c.H)
    q = rms((x @ p["q"]).reshape(2, 5, c.N, c.H), p["q_norm/scale"])
    sin, cos = (s for s in turn)
    a, b = q[..., : c.H // 2], q[..., c.H // 2 :]
    q = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    heads = []
    for n in range(c.N):
        g = n // (c.N // c.K)
        scores = c.attn_cap * np.tanh(q[:, :, n] @ k[:, g].T * c.query_scale / c.attn_cap)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        heads.append(weights @ v[:, g])
    added = t["gate"] * jnp.stack(heads, 2).reshape(2, 5, -1) @ p["o"]
    close(run(bound) - run(base.params), added, 1e-5)


def test_llama_adapter_with_lora_reads_its_prompt_through_the_bound_matrices(base):
    method = chain(LLaMAAdapter(tokens=3), LoRA(rank=2))
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.2)
    merged = Base(base.config, base.model, peft.merge(LoRA(rank=2), base.params, trainable["lora"]))
    close(logits(base, method, trainable), logits(merged, LLaMAAdapter(tokens=3), trainable["llamaadapter"]), 2e-5)


def test_llama_adapter_stands_beside_a_prompt(base):
    """It takes no positions, so a chain may hold a prompt too."""
    method = chain(LLaMAAdapter(tokens=3), Prompt(tokens=2))
    trainable = method.init(jax.random.key(0), base.params)
    close(logits(base, method, trainable), logits(base, Prompt(tokens=2), trainable["prompt"]))
    bound, context = method.bind(base.params, trainable), method.context(trainable)
    assert len(generate(base.model, bound, [[1, 2, 3]], 4, context=context)[0]) == 4


def test_llama_adapter_refuses(base):
    def init(method, params=base.params):
        return method.init(jax.random.key(0), params)

    with pytest.raises(InputError, match=r"layers/attn/prompt: GatedPrompt is not linear in x"):
        peft.merge(LLaMAAdapter(), base.params, init(LLaMAAdapter()))
    with pytest.raises(InputError, match=r"--method\.layers 0: wanted 1 or more"):
        init(LLaMAAdapter(layers=0))
    with pytest.raises(InputError, match="after_output_proj=True wants heads of 32 together, this base's have 28"):
        init(LLaMAAdapter(after_output_proj=True), variant("gpt2").params)
    twice = chain(LLaMAAdapter(), LLaMAAdapter())
    with pytest.raises(InputError, match="layers/attn/prompt has a prompt of an earlier method"):
        twice.bind(base.params, init(twice))


# Tokens


def test_tokens_replace_rows_alone(base):
    method = Tokens(ids=(40, 3, 17))
    trainable = method.init(jax.random.key(0), base.params)
    table, rows = named(base.params)["embed/table"], trainable["embed/table"]["rows"]
    assert same(rows, table[jnp.array(method.ids)])
    rows = shaken(trainable, 0.3)["embed/table"]["rows"]
    weight = method.bind(base.params, {"embed/table": {"rows": rows}})["embed"]["table"]
    expected = table.at[jnp.array(method.ids)].set(rows)
    assert same(weight[IDS], expected[IDS])
    x = jax.random.normal(jax.random.key(1), (2, 3, CONFIG.D))
    close(x @ weight.T, x @ expected.T)
    folded = peft.merge(method, base.params, {"embed/table": {"rows": rows}})
    assert same(folded["embed"]["table"], expected)


def test_tokens_of_an_untied_base_leave_its_head():
    base, method = make_base(tied=False), Tokens(ids=(2, 5))
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    folded = peft.merge(method, base.params, trainable)
    assert same(folded["head"], base.params["head"])
    close(base.model.apply({"params": folded}, IDS), logits(base, method, trainable))


def test_tokens_nest_with_other_tables(base):
    """A prompt over the table of another method looks up that table's rows, and the prompt."""
    prompt = Prompt(tokens=2)
    for method in (Tokens(), LoRA(rank=2, where="embed/table")):
        both = chain(method, prompt)
        trainable = shaken(both.init(jax.random.key(0), base.params), 0.1)
        weight = method.bind(base.params, trainable[type(method).__name__.lower()])["embed"]["table"]
        table = {**base.params, "embed": {"table": weight[jnp.arange(CONFIG.V)]}}
        over = (both.bind(base.params, trainable), prompt.bind(table, trainable["prompt"]))
        hidden = [forward(base.model, b, IDS, context=prompt.context({}), method="hidden")[0] for b in over]
        close(*hidden)
    both = chain(LoRA(rank=2, where="embed/table"), Tokens())
    with pytest.raises(InputError, match="embed/table: the output projection is tied"):
        peft.merge(both, base.params, both.init(jax.random.key(0), base.params))


def test_tokens_refuse(base):
    for ids, message in (((3, 61), "id 61 is no row"), ((), "no ids"), ((4, 4), "an id is twice")):
        with pytest.raises(InputError, match=f"tokens: {message}"):
            Tokens(ids=ids).init(jax.random.key(0), base.params)


# Parallel adapters


def test_parallel_adds_to_its_sublayer(base):
    """f(x) + 4 (relu(x down + b) up + b) of the MLP, from what the MLP reads."""
    method = Parallel(rank=3)
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    t = {n: x[0] for n, x in trainable["layers/mlp/down"].items()}
    x = jax.random.normal(jax.random.key(1), (2, 5, CONFIG.D))

    def run(params):
        return MLP(CONFIG).apply({"params": jax.tree.map(lambda x: x[0], params["layers"]["mlp"])}, x)

    added = 4 * (jnp.maximum(x @ t["down"] + t["down_bias"], 0) @ t["up"] + t["up_bias"])
    close(run(method.bind(base.params, trainable)), run(base.params) + added)


def test_parallel_of_both_sublayers_and_some_layers(base):
    start = logits(base, Subset("norms"), {})
    for where in ("layers/(attn/o|mlp/down)", "layers/[1:]/attn/o"):
        method = Parallel(rank=3, where=where)
        trainable = method.init(jax.random.key(0), base.params)
        assert same(logits(base, method, trainable), start)
        assert jnp.abs(logits(base, method, shaken(trainable, 0.3)) - start).max() > 1e-2
    trainable = shaken(trainable, 0.3)
    unrolled = {"layers/1/attn/o": jax.tree.map(lambda x: x[0], trainable["layers/attn/o[1:2]"])}
    close(logits(base, method, trainable), logits(make_base(scan=False), method, unrolled))
    two = chain(Parallel(rank=3), Parallel(rank=2, scale=1.0))
    trainable = shaken(two.init(jax.random.key(0), base.params), 0.3)
    first = logits(base, Parallel(rank=3), trainable["parallel"])
    assert jnp.abs(logits(base, two, trainable) - first).max() > 1e-3
    silent = trainable | {"parallel_2": jax.tree.map(jnp.zeros_like, trainable["parallel_2"])}
    close(logits(base, two, silent), first)


def test_parallel_refuses(base):
    with pytest.raises(InputError, match="layers/mlp/up ends no sublayer"):
        Parallel(where="layers/mlp/(up|down)").init(jax.random.key(0), base.params)
    with pytest.raises(InputError, match="layers/mlp/parallel_adapter: ParallelAdapterWeight is not linear in x"):
        peft.merge(Parallel(), base.params, Parallel().init(jax.random.key(0), base.params))


# Half precision

HALF = [PTuning(), PrefixMLP(), LLaMAAdapter(), Tokens(), Parallel()]


@pytest.mark.full
@pytest.mark.parametrize("method", HALF, ids=lambda m: type(m).__name__)
def test_a_half_precision_base(method):
    base = make_base(param_dtype="bfloat16", dtype="bfloat16")
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.1)
    assert {str(x.dtype) for x in jax.tree.leaves(trainable)} == {"float32"}
    full = make_base()
    full = Base(full.config, full.model, jax.tree.map(lambda x: x.astype(jnp.float32), base.params))
    gap = jnp.abs(logits(base, method, trainable) - logits(full, method, trainable))
    assert gap.max() < 0.1
    gradient = jax.grad(lambda t: logits(base, method, t).std())(trainable)
    assert all(jnp.isfinite(g).all() and jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
