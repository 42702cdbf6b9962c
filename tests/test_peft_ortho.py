"""Rotations, reflections and variants of LoRA against NumPy formulas of HF PEFT's card, HF's numbers, and by hand."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import Transformer, hf, presets
from graftax.model.tree import named
from graftax.peft import BOFT, HRA, OFT, AdaLoRA, LoKr, LoRA, LoRAFA, MiSS, MiSSBat, OLoRA, PiSSA, RoAd, chain
from graftax.peft.methods.oft import cayley, nearest_divisor
from graftax.train.config import Optim
from safetensors.numpy import load_file
from tiny import Base, close, make_base, make_batch, same, shaken, stepper

GOLDEN = Path(__file__).parent / "golden" / "peft"
CARD: dict = {}  # the card's functions: (W [out, in], bias, tensors, config, module) -> (W', bias')
exec(re.search(r"```python\n(.*?)```", (GOLDEN / "README.md").read_text("utf-8"), re.S)[1], CARD)

PATHS = {
    **{f"{name}_proj": f"layers/attn/{name}" for name in "qkvo"},
    **{f"{name}_proj": f"layers/mlp/{name}" for name in ("gate", "up", "down")},
    **{"attn.c_attn": "layers/attn/qkv", "attn.c_proj": "layers/attn/o"},
    **{"mlp.c_fc": "layers/mlp/up", "mlp.c_proj": "layers/mlp/down"},
}
# A tensor of a file: its name here, and how it turns into ours.
LEAVES = {
    "oft_R.weight": ("r", np.asarray), "boft_R": ("r", np.asarray), "boft_s": ("s", lambda x: x[:, 0]),
    "hra_u": ("u", np.asarray), "miss_block": ("s", np.asarray), "road_theta": ("theta", np.asarray),
    "road_alpha": ("alpha", np.asarray), "lokr_w1": ("k1", np.transpose), "lokr_w2": ("k2", np.transpose),
    "lokr_w1_a": ("b1", np.transpose), "lokr_w1_b": ("a1", np.transpose), "lokr_w2_a": ("b2", np.transpose),
    "lokr_w2_b": ("a2", np.transpose), "lora_A.weight": ("a", np.transpose), "lora_B.weight": ("b", np.transpose),
    "lora_A": ("a", np.transpose), "lora_B": ("b", np.transpose), "lora_E": ("e", lambda x: x[:, 0]),
}  # fmt: skip
ADA = {"rank": 2, "alpha": 7.0, "init_rank": 4}
CASES = {
    "llama_oft": ("oft", OFT(block=4)),
    "llama_oft_exact": ("oft", OFT(block=8, terms=0)),
    "llama_oft_terms": ("oft", OFT(block=0, blocks=2, terms=8)),
    "llama_oft_share": ("oft", OFT(block=5, share=True, terms=3)),
    "llama_oft_coft": ("oft", OFT(block=4, coft=True, eps=0.5, terms=0)),
    "llama_boft": ("boft", BOFT(block=4)),
    "llama_boft_butterfly": ("boft", BOFT(block=2, factors=3)),
    "llama_hra": ("hra", HRA(rank=4)),
    "llama_hra_gs": ("hra", HRA(rank=3, gram_schmidt=True)),
    "llama_miss": ("miss", MiSS(rank=4)),
    "llama_miss_rest": ("miss", MiSS(rank=5)),
    "llama_miss_bat": ("miss", MiSSBat(rank=4)),
    "llama_miss_mini": ("miss", MiSS(rank=4, mini=2)),
    "llama_lokr_both": ("lokr", LoKr(rank=1, alpha=3.0, both=True, factor=5)),
    "llama_road_1": ("road", RoAd(group=4)),
    "llama_road_2": ("road", RoAd(variant=2, group=4)),
    "llama_road_4": ("road", RoAd(variant=4, group=4)),
    "llama_pissa": ("lora", PiSSA(rank=2, alpha=3.0)),
    "llama_olora": ("lora", OLoRA(rank=2, alpha=3.0)),
    "gpt2_pissa": ("lora", PiSSA(rank=2, alpha=3.0)),
    "llama_adalora": ("adalora", AdaLoRA(**ADA)),
    "llama_adalora_pruned": ("adalora", AdaLoRA(**ADA)),
    "gpt2_adalora_pruned": ("adalora", AdaLoRA(**ADA)),
}


@functools.cache
def golden_base(name):
    config, params = hf.load(GOLDEN / name)
    config = dataclasses.replace(config, dtype="float32")
    return Base(config, Transformer(config), params)


def read(tensors):
    """{module: tensors of it} of a file, and our tree of it: a key for each layer."""
    modules, tree = {}, {}
    for name, x in tensors.items():
        module, leaf = re.fullmatch(
            r"base_model\.model\.(.*?)\.((?:lora|oft|boft|hra|miss|road|lokr)_.*)", name
        ).groups()
        modules.setdefault(module, {})[leaf] = x
        layer = int(re.search(r"\.(\d+)\.", module)[1])
        path = next(ours for theirs, ours in PATHS.items() if module.endswith(theirs))
        ours, turn = LEAVES[leaf]
        tree.setdefault(f"{path}[{layer}:{layer + 1}]", {})[ours] = jnp.asarray(turn(x))[None]
    return modules, tree


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_hf_peft_means_what_it_means_there(case):
    """Merged matrices as the card's NumPy has them. Logits and gradients of all files are in test_peft_hf.py."""
    kind, method = CASES[case]
    base, config = golden_base(case.split("_")[0]), json.loads((GOLDEN / case / "adapter_config.json").read_text())
    modules, trainable = read(load_file(GOLDEN / case / "adapter_model.safetensors"))
    merged, flat = named(peft.merge(method, base.params, trainable)), named(base.params)
    for (module, t), key in zip(modules.items(), trainable, strict=True):
        path, layer = key.split("[")[0], int(key[-4])
        w = np.asarray(flat[path][layer], np.float64).T
        expected, _ = CARD[kind](w, None, {k: np.float64(x) for k, x in t.items()}, config, module)
        np.testing.assert_allclose(merged[path][layer], expected.T, rtol=1e-4, atol=3e-6)


VARIANTS = {
    "oft": OFT(block=8), "oft_exact": OFT(block=0, blocks=4, terms=0), "oft_share": OFT(block=8, share=True),
    "coft": OFT(block=8, coft=True, eps=0.2), "boft": BOFT(block=8), "butterfly": BOFT(block=2, factors=3),
    "hra": HRA(rank=4), "hra_gs": HRA(rank=3, gram_schmidt=True), "bat": MiSSBat(rank=16),
    "mini": MiSS(rank=7, mini=4), "lokr": LoKr(rank=1, both=True), "road_1": RoAd(),
    "road_2": RoAd(variant=2, group=10), "road_4": RoAd(variant=4, group=8), "pissa": PiSSA(rank=3),
    "olora": OLoRA(rank=3), "lorafa": LoRAFA(rank=3), "adalora": AdaLoRA(),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS.keys())
def test_layers_apart(base, method):
    """Training one layer leaves the others bit for bit as they are, without NaN, in every layout and dtype."""
    base = base._replace(params=shaken(base.params))
    method = dataclasses.replace(method, where="layers/[1:]/(attn/[qk]|mlp/up)")
    trainable = method.init(jax.random.key(3), base.params)
    whole = dataclasses.replace(method, where="layers/(attn/[qk]|mlp/up)").init(jax.random.key(3), base.params)
    close({k: jax.tree.map(lambda x: x[1:], whole[k[:-5]]) for k in trainable}, trainable)
    bound, batch, x = method.bind(base.params, shaken(trainable)), make_batch(), jnp.linspace(-1, 1, 96).reshape(3, 32)
    for path in ("layers/attn/q", "layers/attn/q_bias", "layers/mlp/up"):
        ours, plain = (jax.tree.map(lambda x: x[0], named(p)[path]) for p in (bound, base.params))
        assert same(x @ ours, x @ plain) if plain.ndim == 2 else same(ours, plain)

    def loss(trainable, params, model=base.model):
        return model.apply({"params": method.bind(params, trainable)}, batch["ids"]).astype(jnp.float32).std()

    for tree in (trainable, jax.tree.map(jnp.zeros_like, trainable), shaken(trainable)):
        gradients = jax.jit(jax.grad(loss, (0, 1)))(tree, base.params)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    half = make_base(param_dtype="bfloat16", dtype="bfloat16").model
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    rounded = jax.jit(jax.value_and_grad(lambda *at: loss(*at, half)))(shaken(trainable), params)
    np.testing.assert_allclose(rounded[0], loss(shaken(trainable), base.params), rtol=0.02)
    assert all(x.dtype == jnp.float32 and jnp.isfinite(x).all() for x in jax.tree.leaves(rounded[1]))
    assert {str(x.dtype) for x in named(peft.merge(method, params, shaken(trainable))).values()} == {"bfloat16"}


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen2.5-0.5b"])
def test_counts_are_those_of_hf_peft(model):
    two, counts = "layers/attn/[qv]", json.loads((GOLDEN / "counts.json").read_text())[model]
    methods = {
        "oft b32 all-linear": OFT(), "oft b32 block_share all-linear": OFT(share=True), "boft b4 q,v": BOFT(where=two),
        "boft b4 all-linear": BOFT(), "lokr r8 decompose_both all-linear": LoKr(both=True),
        "miss r64 bat q,v": MiSSBat(rank=64, where=two), "road_1 g64 q,v": RoAd(where=two),
        "adalora init_r12 all-linear": AdaLoRA(),
    }  # fmt: skip
    assert {name: peft.count(m, presets[model]) for name, m in methods.items()} == {n: counts[n] for n in methods}


def test_blocks():
    """Block sizes as HF PEFT adjusts them: the nearest divisor, the lower of two."""
    expected = {(32, 8): 8, (32, 5): 4, (48, 5): 4, (48, 7): 6, (16, 32): 16, (37, 20): 37, (37, 19): 1, (1, 4): 1}
    assert {at: nearest_divisor(*at) for at in expected} == expected
    q = shaken(jnp.zeros((3, 6, 6)), 1.0)
    r = cayley(q - q.mT)
    close(r @ r.mT, jnp.broadcast_to(jnp.eye(6), r.shape))


def test_coft_stays_near_without_losing_its_gradient(base):
    method = OFT(block=8, coft=True, eps=1e-3, terms=0, where="layers/attn/q")
    far = jax.tree.map(lambda x: x + 3.0, method.init(jax.random.key(0), base.params))
    moved = named(peft.merge(method, base.params, far))["layers/attn/q"] - named(base.params)["layers/attn/q"]
    assert 0 < jnp.linalg.norm(moved[0]) < 2e-3 * jnp.linalg.norm(named(base.params)["layers/attn/q"][0])
    gradient = jax.grad(lambda t: named(peft.merge(method, base.params, t))["layers/attn/q"][0, 0, 0])(far)
    assert jnp.abs(gradient["layers/attn/q"]["r"]).max() > 1e-3


def test_road_turns_biases_too(base):
    params = shaken(base.params)
    for variant, where in ((1, "layers/attn/v"), (2, "layers/[1:]/attn/v"), (4, "layers/attn/[vo]")):
        method = RoAd(variant=variant, group=4, where=where)
        trainable = shaken(method.init(jax.random.key(0), params), 0.3)
        merged, flat, t = named(peft.merge(method, params, trainable)), named(params), [*trainable.values()][-1]
        config = {"group_size": 4, "variant": f"road_{variant}"}
        tensors = {f"road_{name}": np.asarray(x[-1]) for name, x in t.items()}
        w, b = CARD["road"](*(np.asarray(flat[f"layers/attn/{n}"][1].T) for n in ("v", "v_bias")), tensors, config, "")
        close((merged["layers/attn/v"][1], merged["layers/attn/v_bias"][1]), (jnp.asarray(w.T), jnp.asarray(b)))
    assert same(merged["layers/attn/q_bias"], flat["layers/attn/q_bias"])


@pytest.mark.parametrize("kind", [PiSSA, OLoRA])
def test_what_begins_as_a_part_of_the_base(base, kind):
    """The same from the whole base and from `frozen_params`, which is not decomposed again; some ranks by rules."""
    rules = {"ranks": (("layers/[1:]/attn/q", 2), ("layers/attn/k", 40)), "alphas": (("layers/[1:]/.*", 3.0),)}
    method = kind(rank=4, alpha=6.0, where="layers/attn/[qkv]", **rules)
    frozen, trainable = peft.partition(method, base.params, jax.random.key(0))
    flat = named(base.params)
    close(named(peft.fold(method.bind(frozen, trainable))), flat)
    moved = shaken(trainable)
    assert {k: t["a"].shape[-1] for k, t in moved.items()} == {
        "layers/attn/q[0:1]": 4, "layers/attn/q[1:2]": 2, "layers/attn/k": 16, "layers/attn/v": 4,
    }  # fmt: skip
    merged = named(peft.merge(method, base.params, moved))
    close(named(peft.fold(method.bind(frozen, moved))), merged)
    for key, layer, scale in (("q[0:1]", 0, 6 / 4), ("q[1:2]", 1, 3 / 2), ("k", 1, 3 / 40), ("v", 0, 6 / 4)):
        path, t = f"layers/attn/{key[0]}", jax.tree.map(lambda x, i=layer: x[i % len(x)], moved[f"layers/attn/{key}"])
        R = t["a"].shape[1]
        config = {"init_lora_weights": kind.__name__.lower(), "r": R, "lora_alpha": scale * R, "use_rslora": False}
        tensors = {"lora_A.weight": np.asarray(t["a"].T), "lora_B.weight": np.asarray(t["b"].T)}
        w, _ = CARD["lora"](np.asarray(flat[path][layer].T), None, tensors, config, "")
        close(merged[path][layer], jnp.asarray(w.T))
    program = str(jax.make_jaxpr(method.bind)(frozen, trainable))
    assert not re.search("svd|qr", program), "the frozen base is not taken apart in a step"
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (frozen, base.params)]
    assert sizes[0] == sizes[1]
    both = chain(LoRA(rank=2, where="layers/attn/q"), method)
    frozen, trainable = peft.partition(both, base.params, jax.random.key(0))
    close(*(named(peft.fold(both.bind(p, shaken(trainable)))) for p in (frozen, base.params)))
    assert "Residual" in str(jax.tree.structure(both.bind(frozen, trainable)))
    with pytest.raises(InputError, match="embed/table is no matrix but a table"):
        kind(where="embed/table").init(jax.random.key(0), base.params)


def test_lorafa_trains_b_alone(base):
    method = LoRAFA(rank=4, alpha=8.0, seed=5, where="layers/attn/[qkvo]")
    trainable = shaken(method.init(jax.random.key(0), base.params))
    assert {name for t in trainable.values() for name in t} == {"b"}
    a = LoRA(rank=4, where="layers/attn/[qkvo]").init(jax.random.key(5), base.params)  # draws as LoRA does
    merged, q = named(peft.merge(method, base.params, trainable)), "layers/attn/q"
    close(merged[q], named(base.params)[q] + 2 * a[q]["a"] @ trainable[q]["b"])
    unrolled = make_base(scan=False).params
    parts = {f"layers/{i}/attn/{k[-1]}": {"b": t["b"][i]} for k, t in trainable.items() for i in range(2)}
    close(named(peft.merge(method, unrolled, parts))["layers/1/attn/q"], merged[q][1])
    other = dataclasses.replace(method, seed=6)
    assert not same(named(peft.merge(other, base.params, trainable))[q], merged[q])
    with pytest.raises(InputError, match="belongs to another base"):
        method.bind({"embed": base.params["embed"]}, trainable)


def simulated(method, steps, trainable, moves, grads):
    """The card's allocator over whole runs, by matrices: which e are 0 after each step."""
    p = {k: {n: np.array(x, np.float64) for n, x in t.items()} for k, t in trainable.items()}
    ipt, unc = ({k: {n: 0 * x for n, x in t.items()} for k, t in p.items()} for _ in range(2))
    init = sum(len(t["e"].ravel()) for t in p.values())
    target = method.rank * sum(t["e"].size // t["e"].shape[-1] for t in p.values())
    tinit, tfinal, stored, masks = int(method.tinit), int(method.tfinal), {}, []
    for t in range(1, steps + 1):
        end = steps - tfinal
        p = jax.tree.map(np.add, p, moves[t - 1])
        if t < end:
            size = jax.tree.map(lambda x, g: np.abs(x * g), p, grads[t - 1])
            ipt = jax.tree.map(lambda a, b: method.b1 * a + (1 - method.b1) * b, ipt, size)
            unc = jax.tree.map(lambda a, b, c: method.b2 * a + (1 - method.b2) * np.abs(b - c), unc, size, ipt)
        left = init if t <= tinit else target
        if tinit < t < end:
            left = int((init - target) * (1 - (t - tinit) / (end - tinit)) ** 3 + target)
        chosen = t == end or (tinit < t < end and t % method.every == 0)
        if chosen:
            element = jax.tree.map(np.multiply, ipt, unc)
            score = {k: s["e"] + s["a"].mean(-2) + s["b"].mean(-1) for k, s in element.items()}
            least = np.sort(np.concatenate([s.ravel() for s in score.values()]))[init - left - 1]
            stored = {k: s <= least for k, s in score.items()}
        if chosen or t > end:
            for k, gone in stored.items():
                p[k]["e"][gone] = 0
        masks.append({k: x["e"] == 0 for k, x in p.items()})
    return masks


@pytest.mark.parametrize("times", [{"tinit": 2, "tfinal": 3, "every": 2}, {}, {"tinit": 1.0, "tfinal": 0.25}], ids=str)
def test_ranks_end_as_in_the_card(base, times):
    steps, rng = 12, np.random.default_rng(0)
    method = AdaLoRA(rank=2, init_rank=5, b1=0.7, b2=0.9, where="layers/(attn/q|mlp/.*)", **times)
    trainable = shaken(method.init(jax.random.key(0), base.params))

    def fake():
        return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * rng.random()), trainable)

    moves, grads = [fake() for _ in range(steps)], [fake() for _ in range(steps)]
    plain = dataclasses.replace(method, tfinal=3 if method.tfinal else 0)
    expected = simulated(plain, steps, trainable, moves, grads)
    tx, p, gone = method.update_transform(steps), trainable, []
    state, update = tx.init(p), jax.jit(tx.update)
    for move, grad, masks in zip(moves, grads, expected, strict=True):
        updates, state = update(move, state, p, grads=grad)
        p = jax.tree.map(jnp.add, p, updates)
        assert same({k: t["e"] == 0 for k, t in p.items()}, masks)
        gone.append(sum(int(m.sum()) for m in masks.values()))
    assert gone[-1] == 8 * (5 - 2)
    assert len(set(gone)) > 2
    with pytest.raises(InputError, match="leave none of 4 steps"):
        AdaLoRA(tinit=3, tfinal=0.25).update_transform(4)


@pytest.mark.full
def test_adalora_ends_with_its_budget(base):
    method, steps = AdaLoRA(rank=3, init_rank=6, tinit=2, tfinal=4), 20
    frozen, state, step = stepper(base, method, Optim(lr=1e-2, warmup=2))

    def left():
        return sum(int((t["e"] != 0).sum()) for t in state.trainable.values())

    assert left() == 0
    for i in range(steps):
        state, _ = step(state, frozen, make_batch(i % 4))
        assert left() == 14 * 6 if i < 2 else left() >= 14 * 3
        assert left() == 14 * 3 or i + 1 < steps - 4
    pruned = AdaLoRA(
        rank=3, init_rank=6, where="layers/attn/[qkvo]", ranks=(("layers/[1:]/attn/q", 0), ("layers/attn/k", 2))
    )
    trainable = shaken(pruned.init(jax.random.key(0), base.params))
    assert [trainable[f"layers/attn/{n}"]["a"].shape for n in ("q[0:1]", "q[1:2]", "k")] == [
        (1, 32, 6), (1, 32, 0), (2, 32, 2),
    ]  # fmt: skip
    merged, q = named(peft.merge(pruned, base.params, trainable)), trainable["layers/attn/q[0:1]"]
    delta = 8 / (6 + 1e-5) * (q["a"] * q["e"][:, None]) @ q["b"]
    close(merged["layers/attn/q"], named(base.params)["layers/attn/q"].at[:1].add(delta))
    frozen, state, step = stepper(base, pruned)
    assert step(state, frozen, make_batch())[1]["ok"]


def test_the_penalty_of_adalora(base):
    """A mean over matrices, each layer's by itself; it has a slope where a matrix is orthonormal, or has no rank."""
    method = AdaLoRA(init_rank=3, orthogonality=0.4, ranks=(("layers/[1:]/mlp/up", 0),), where="layers/mlp/(up|down)")
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    trainable["layers/mlp/down"]["a"] = jnp.broadcast_to(jnp.eye(48, 3), (2, 48, 3))
    factors = [x for t in trainable.values() for x in (*t["a"], *(b.T for b in t["b"]))]
    lengths = [np.linalg.norm(x.T @ x - np.eye(x.shape[1])) for x in factors]
    assert len(lengths) == 8
    np.testing.assert_allclose(method.aux_loss(trainable), 0.4 * np.mean(lengths), rtol=1e-5)
    gradients = jax.grad(method.aux_loss)(trainable)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert not gradients["layers/mlp/down"]["a"].any()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (OFT(block=8, blocks=2), "give one of the two"),
        (BOFT(block=5), "layers/attn/k has 32 inputs, wanted a multiple of block"),
        (BOFT(block=3, factors=2), "no halves to exchange"),
        (MiSSBat(rank=64), r"layers/attn/k is \[32, 16\], wanted multiples of rank=64"),
        (MiSS(mini=7), "layers/attn/k has 16 outputs, wanted a multiple of mini=7"),
        (RoAd(variant=3), "no variant 3"),
        (RoAd(group=1), "layers/attn/k has 16 outputs, wanted an even divisor of at most group=1"),
    ],
    ids=str,
)
def test_mistakes(base, method, message):
    with pytest.raises(InputError, match=message):
        method.init(jax.random.key(0), base.params)


@pytest.mark.full
def test_hra_says_when_it_does_not_begin_as_the_base(base):
    for method in (HRA(rank=3), HRA(rank=4), HRA(rank=4, gram_schmidt=True)):
        merged = named(peft.merge(method, base.params, method.init(jax.random.key(0), base.params)))
        moved = max(float(jnp.abs(x - merged[path]).max()) for path, x in named(base.params).items())
        assert (moved < 1e-5) == method.identity
