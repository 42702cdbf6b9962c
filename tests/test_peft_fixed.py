"""Updates of a fixed form against HF PEFT's formulas, in [out, in], with the tensors of its golden adapters."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import hf
from graftax.model.tree import named
from graftax.model.weight import matmul
from graftax.peft import C3A, FourierFT, LoRA, RandLoRA, SHiRA, Subset, VeRA, chain
from graftax.peft.methods import fourierft, randlora, shira, vera
from graftax.peft.methods.c3a import correlate
from graftax.peft.random_projections import dft_basis, hash_uniform
from graftax.peft.targets import FixedArrays
from graftax.train.step import make_loss
from safetensors.numpy import load_file
from tiny import CONFIG, close, make_base, make_batch, same, shaken

GOLDEN = Path(__file__).parent / "golden" / "peft"
LLAMA = {  # path in the base -> module in HF's
    "layers/attn/q": "self_attn.q_proj", "layers/attn/v": "self_attn.v_proj", "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}  # fmt: skip
GPT2 = {
    "layers/attn/qkv": "attn.c_attn", "layers/attn/o": "attn.c_proj", "layers/mlp/up": "mlp.c_fc",
    "layers/mlp/down": "mlp.c_proj",
}  # fmt: skip


def hf_vera(W, t, A, B):
    out, inn = W.shape
    return (t["vera_lambda_b"][:, None] * B[:out]) @ (t["vera_lambda_d"][:, None] * A[:, :inn])


def hf_randlora(W, t, c):
    low, high = min(W.shape), max(W.shape)
    n = -(-low // c["r"])
    a = t["randlora_lambda"][:, :, None] * t["randlora_A"][:, :, :low] * t["randlora_gamma"][None]
    product = t["randlora_B"][:high, :n].reshape(high, -1) @ a.reshape(-1, low)
    return c["randlora_alpha"] / c["r"] * (product if low == W.shape[1] else product.T)


def hf_fourierft(W, t, c, n):
    bits = np.random.MT19937()
    bits._legacy_seeding(c["random_loc_seed"])
    place, raw = list(range(W.size)), bits.random_raw(W.size)
    for i in range(W.size - 1):
        j = i + int(raw[i]) % (W.size - i)
        place[i], place[j] = place[j], place[i]
    dense = np.zeros(W.size)
    dense[place[:n]] = t["fourierft_spectrum"]
    return np.fft.ifft2(dense.reshape(W.shape)).real * c["scaling"]


def hf_shira(W, t):
    dense = np.zeros(W.shape)
    dense[tuple(t["shira_indices"])] = t["shira_weight"]
    return dense


def hf_c3a(W, t):
    k = t["c3a_kernel"]
    i = np.arange(k.shape[-1])
    blocks = k[:, :, (i[None, :] - i[:, None]) % len(i)]
    return blocks.transpose(0, 2, 1, 3).reshape(W.shape) / W.shape[1]


LEAVES = {"vera_lambda_b": "b", "vera_lambda_d": "d", "randlora_lambda": "lam", "randlora_gamma": "gamma",
          "fourierft_spectrum": "spectrum", "shira_weight": "values", "c3a_kernel": "kernel"}  # fmt: skip
CASES = {
    "vera": ("llama_vera", "gpt2_vera"),
    "randlora": ("llama_randlora", "llama_randlora_sparse", "gpt2_randlora"),
    "fourierft": ("llama_fourierft", "gpt2_fourierft"),
    "shira": ("llama_shira",),
    "c3a": ("llama_c3a",),
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in CASES.items() for case in cases])
def test_golden_adapters_of_hf(kind, case):
    """Every matrix of the adapter, merged. Logits and gradients of all files are in test_peft_hf.py."""
    c = json.loads((GOLDEN / case / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(GOLDEN / case / "adapter_model.safetensors")
    _, base = hf.load(GOLDEN / case.split("_")[0])
    names, prefix = (LLAMA, "model.layers") if case.startswith("llama") else (GPT2, "transformer.h")
    files = {path: [{k.removeprefix(start): np.float64(v) if v.dtype == np.float32 else v for k, v in tensors.items()
                     if k.startswith(start := f"base_model.model.{prefix}.{i}.{name}.")} for i in range(2)]
             for path, name in names.items()}  # fmt: skip
    files = {path: ts for path, ts in files.items() if ts[0]}
    trainable = {path: {ours: jnp.array(np.stack([t[name] for t in ts]), jnp.float32)
                        for name, ours in LEAVES.items() if name in ts[0]} for path, ts in files.items()}  # fmt: skip
    A, B = (np.float64(tensors.get(f"base_model.vera_{n}", 0)) for n in "AB")
    first = next(iter(files.values()))[0]
    method = {
        "vera": lambda: VeRA(rank=c["r"], given=FixedArrays(a=A, b=B)),
        "randlora": lambda: RandLoRA(rank=c["r"], alpha=c["randlora_alpha"],
                                     given=FixedArrays(a=first["randlora_A"], b=first["randlora_B"])),
        "fourierft": lambda: FourierFT(scale=c["scaling"], seed=c["random_loc_seed"]),
        "shira": lambda: SHiRA(given=FixedArrays(**{path: np.stack([t["shira_indices"].T for t in ts])
                                              for path, ts in files.items()})),
        "c3a": C3A,
    }[kind]()  # fmt: skip
    formula = {
        "vera": lambda W, t: hf_vera(W, t, A, B),
        "randlora": lambda W, t: hf_randlora(W, t, c),
        "fourierft": lambda W, t: hf_fourierft(W, t, c, len(t["fourierft_spectrum"])),
        "shira": hf_shira,
        "c3a": hf_c3a,
    }[kind]
    merged = named(peft.merge(method, base, trainable))
    for path, ts in files.items():
        for i, t in enumerate(ts):
            W = np.float64(named(base)[path][i]).T
            np.testing.assert_allclose(merged[path][i].T, W + formula(W, t), rtol=1e-5, atol=2e-6, err_msg=path)


SOME = "layers/(attn/[qk]|mlp/(up|down))"


def deltas(base, method, trainable):
    """{path: W' - W, [L, out, in]} of what a method changes."""
    merged = named(peft.merge(method, base.params, trainable))
    return {path: np.swapaxes(merged[path] - named(base.params)[path], 1, 2) for path in trainable}


def layers(arrays, names):
    return [{hf: np.float64(arrays[ours][i]) for hf, ours in names.items()} for i in range(2)]


def test_vera_makes_its_projections_from_the_seed(base):
    method = VeRA(rank=7, seed=3, where=SOME)
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    A, B = (np.float64(p) for p in vera.projections(method, 48, 48))
    for path, delta in deltas(base, method, trainable).items():
        for update, t in zip(delta, layers(trainable[path], {"vera_lambda_b": "b", "vera_lambda_d": "d"}), strict=True):
            np.testing.assert_allclose(update, hf_vera(update, t, A, B), atol=2e-6)
    for p, fan in ((A, 48), (B, 7)):
        assert abs(p).max() <= (6 / fan) ** 0.5
        assert abs(p.std() / (2 / fan) ** 0.5 - 1) < 0.05
    assert not same(A, vera.projections(VeRA(rank=7), 48, 48)[0])
    exported = dataclasses.replace(method, given=FixedArrays(a=A, b=B))
    close(deltas(base, exported, trainable), deltas(base, method, trainable))


@pytest.mark.parametrize("sparse", ["", "sparse", "very_sparse"])
def test_randlora_makes_its_projections_from_the_seed(base, sparse):
    method = RandLoRA(rank=5, alpha=2.0, sparse=sparse, where=SOME)
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.3)
    A, B = (np.float64(p) for p in randlora.projections(method, 48, 48))
    assert A.shape == (5, 1, 48)
    assert B.shape == (48, 10, 5)
    names = {"randlora_lambda": "lam", "randlora_gamma": "gamma"}
    for path, delta in deltas(base, method, trainable).items():
        for update, t in zip(delta, layers(trainable[path], names), strict=True):
            t |= {"randlora_A": A, "randlora_B": B}
            np.testing.assert_allclose(
                update, hf_randlora(update, t, {"r": 5, "randlora_alpha": 2.0}), rtol=1e-5, atol=2e-5
            )
    assert abs(B.std() - 1) < 0.06
    if sparse:
        odds = {"sparse": 3, "very_sparse": 48**0.5}[sparse]
        np.testing.assert_allclose(np.unique(B), [-(odds**0.5), 0, odds**0.5], rtol=1e-6)
    exported = dataclasses.replace(method, given=FixedArrays(a=A, b=B))
    close(deltas(base, exported, trainable), deltas(base, method, trainable), 2e-5)
    with pytest.raises(InputError, match="wanted '', 'sparse' or 'very_sparse'"):
        dataclasses.replace(method, sparse="spare").bind(base.params, trainable)


def test_numbers_from_a_seed_are_by_place():
    """These are the numbers of every VeRA and RandLoRA that was trained without files: a change breaks them all."""
    expected = [0.58303022, 0.81237078, 0.01355243]
    np.testing.assert_allclose(hash_uniform(0, "a", (2, 3))[1], expected, rtol=1e-6)
    assert same(hash_uniform(0, "a", (9, 8))[:2, :3], hash_uniform(0, "a", (2, 3)))
    assert same(hash_uniform(0, "b", (9, 4, 8))[:2, :3], hash_uniform(0, "b", (2, 3, 8)))


def test_waves_are_exact_for_large_sizes():
    at, i = np.array([1, 77_777, 128_255]), np.arange(128_256)
    angle = 2 * np.pi * (i[:, None] * at % len(i)) / len(i)
    np.testing.assert_allclose(dft_basis(len(i), at), (np.cos(angle), np.sin(angle)), atol=4e-7)


def test_fourierft_by_rules(base):
    """Layers of one stack with other n, few enough for the short cut; no more than a matrix has."""
    method = FourierFT(n=9, where="layers/(attn/[qk]|mlp/up)", ns=(("layers/[1:]/mlp/up", 4), ("layers/attn/q", 10**6)))
    trainable = shaken(method.init(jax.random.key(0), base.params))
    assert {k: t["spectrum"].shape for k, t in trainable.items()} == {
        "layers/attn/q": (2, 1024), "layers/attn/k": (2, 9), "layers/mlp/up[0:1]": (1, 9), "layers/mlp/up[1:2]": (1, 4),
    }  # fmt: skip
    c = {"random_loc_seed": 0, "scaling": 150.0}  # of a method outside a run
    merged = named(peft.merge(method, base.params, trainable))
    for path, i, n in (("attn/q", 0, 1024), ("attn/k", 1, 9), ("mlp/up", 0, 9), ("mlp/up", 1, 4)):
        w = named(base.params)[f"layers/{path}"][i]
        key = f"layers/{path}" + (f"[{i}:{i + 1}]" if path == "mlp/up" else "")
        spectrum = trainable[key]["spectrum"][0 if "[" in key else i]
        delta = hf_fourierft(w.T, {"fourierft_spectrum": spectrum}, c, n)
        np.testing.assert_allclose(merged[f"layers/{path}"][i], w + delta.T, atol=3e-6)
    assert sorted(fourierft.places(5, 60, 60)) == list(range(60))


@pytest.mark.full
def test_shira_places(base):
    """Distinct, sorted, other in each layer, the same in both layouts and for layers alone; or those that are given."""
    method, unrolled = SHiRA(rank=3, where=SOME), make_base(scan=False)
    trainable = shaken(method.init(jax.random.key(0), base.params))
    places = shira.places(method, base.params, trainable)
    for path, delta in deltas(base, method, trainable).items():
        flat = places[path][:, 0] * delta.shape[2] + places[path][:, 1]
        assert (np.diff(flat) > 0).all()
        assert not same(flat[0], flat[1])
        for update, values, where in zip(delta, trainable[path]["values"], places[path], strict=True):
            t = {"shira_weight": values, "shira_indices": np.asarray(where)}
            np.testing.assert_allclose(update, hf_shira(update, t), atol=1e-7)
    other = shira.places(method, unrolled.params, method.init(jax.random.key(0), unrolled.params))
    assert same(other["layers/1/mlp/up"], places["layers/mlp/up"][1])
    last = dataclasses.replace(method, where="layers/[1:]/mlp/up")
    part = last.init(jax.random.key(0), base.params)
    assert same(shira.places(last, base.params, part)["layers/mlp/up[1:2]"], places["layers/mlp/up"][1:])
    given = SHiRA(given=FixedArrays(**{k: np.swapaxes(p, 1, 2) for k, p in places.items()}))
    assert same(deltas(base, given, trainable), deltas(base, method, trainable))
    with pytest.raises(InputError, match="the given places have none of layers/mlp/up"):
        last.__class__(given=FixedArrays(x=np.zeros(1))).bind(base.params, part)


def test_c3a_blocks(base):
    """Even and odd blocks, of both layers or of each its own; what does not divide is the next divisor below."""
    method = C3A(block=20, where=SOME, blocks=(("layers/[1:]/mlp/up", 4), ("layers/attn/k", 1)))
    trainable = shaken(method.init(jax.random.key(0), base.params))
    assert {k: t["kernel"].shape[1:] for k, t in trainable.items()} == {
        "layers/attn/q": (2, 2, 16), "layers/attn/k": (16, 32, 1), "layers/mlp/down": (2, 3, 16),
        "layers/mlp/up[0:1]": (3, 2, 16), "layers/mlp/up[1:2]": (12, 8, 4),
    }  # fmt: skip
    merged = named(peft.merge(method, base.params, trainable))
    for key, t in trainable.items():
        path, i = key.split("[")[0], int("[1" in key)
        w = named(base.params)[path][i]
        np.testing.assert_allclose(merged[path][i], w + hf_c3a(w.T, {"c3a_kernel": np.float64(t["kernel"][0])}).T,
                                   atol=1e-6)  # fmt: skip
    x, kernel = jax.random.normal(jax.random.key(1), (3, 15)), jax.random.normal(jax.random.key(2), (2, 3, 5))
    np.testing.assert_allclose(
        correlate(x, kernel), x @ hf_c3a(np.zeros((10, 15)), {"c3a_kernel": kernel}).T, atol=1e-6
    )


ALL = (SHiRA(rank=1), VeRA(rank=64), RandLoRA(rank=8), FourierFT(n=60), C3A(block=8))


@pytest.mark.full
def test_updates_stack_and_skip_layers(base):
    """Methods stacked in one layer, on a LoRA, act as the sum of each alone; other layers have no update."""
    where, path, x = "layers/[1:]/mlp/up", "layers/mlp/up", jax.random.normal(jax.random.key(1), (4, CONFIG.D))
    w = named(base.params)[path]
    method = chain(LoRA(rank=2, where=where), *(dataclasses.replace(m, where=where) for m in ALL))
    trainable = shaken(method.init(jax.random.key(0), base.params), 0.2)
    total = w
    for name, m in method.methods:
        total = total + named(peft.merge(m, base.params, trainable[name]))[path] - w

        def out(t, i, m=m):
            return x @ jax.tree.map(lambda a: a[i], named(m.bind(base.params, t))[path])

        assert same(out(trainable[name], 0), x @ w[0])
        slopes = jax.grad(lambda t, out=out: (out(t, 0) + out(t, 1)).sum())(trainable[name])
        assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(slopes))
    close(named(peft.merge(method, base.params, trainable))[path], total, 2e-5)


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_half_precision(base, method):
    """x and the base in bfloat16, the method's arrays in float32."""
    method = dataclasses.replace(method, where="layers/mlp/up")
    bound = method.bind(base.params, shaken(method.init(jax.random.key(0), base.params), 0.1))
    weight = jax.tree.map(lambda a: a[0], bound["layers"]["mlp"]["up"])
    half = dataclasses.replace(weight, w=weight.w.astype(jnp.bfloat16))
    x = jax.random.normal(jax.random.key(1), (64, CONFIG.D), jnp.bfloat16)
    exact, rough = x.astype(jnp.float32) @ weight, matmul(x, half)
    assert rough.dtype == jnp.bfloat16
    assert jnp.abs(rough - exact).max() < 0.02 * jnp.abs(exact).max()


@pytest.mark.full
def test_no_layer_keeps_a_matrix():
    """A layer more takes the memory of its activations, as with norms alone: no projection and no update stays."""

    def growth(method):
        sizes = []
        for L in (2, 6):
            base = make_base(D=128, F=512, L=L, N=4, K=4, H=32)
            slopes = jax.jit(jax.grad(make_loss(base.model, method), has_aux=True))
            trainable = jax.eval_shape(lambda: method.init(jax.random.key(0), base.params))  # noqa: B023
            memory = slopes.lower(trainable, base.params, make_batch(B=1, T=8)).compile().memory_analysis()
            sizes.append(memory.temp_size_in_bytes)
        return (sizes[1] - sizes[0]) / 4

    method = chain(*(dataclasses.replace(m, where="layers/mlp/up") for m in ALL))
    assert growth(method) - growth(Subset("norms")) < 4 * 128 * 512 / 4  # bytes of the matrix
