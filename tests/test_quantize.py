"""int8 and nf4 bases: the numbers by themselves, and the laws over them."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws as laws
from graftax import InputError, peft
from graftax.model import presets, shapes_of
from graftax.model.quantize import LEVELS, Int8, Quantized, quantize
from graftax.model.sharding import make_mesh, put_batch, shardings
from graftax.model.tree import name_and_layers, named, nested
from graftax.model.weight import matmul
from graftax.peft.sharding import adapter_shardings, frozen_shardings
from graftax.train.optim import make_optimizer
from graftax.train.step import init_state, make_loss, make_train_step
from tiny import CASES, OPTIM, Base, close, evaluator, make_base, make_batch, same, shaken, stepper

KINDS = ("int8", "nf4")
LORA = peft.methods["lora"]()
W = np.random.default_rng(0).standard_normal((3, 128, 24)).astype(np.float32) * np.geomspace(0.1, 3, 24).astype("f")


def quantised(base, kind):
    """The base with its matrices quantised."""
    return Base(base.config, base.model, quantize(base.params, kind))


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    """The tiny base, its vocabulary one that divides over a mesh, quantised."""
    return quantised(make_base(V=62), request.param)


def plain(base):
    """The base of the matrices that a quantised one stands for."""
    return Base(base.config, base.model, peft.fold(base.params))


# The numbers


def reference(w):
    """(codes [D, F], maxima [D/64, F] in 8 bits, scales, mean, w again) of NF4, as the paper says it, in NumPy."""
    blocks = w.reshape(-1, 64, w.shape[1])
    largest = np.abs(blocks).max(1)
    mean = np.float32(jnp.bfloat16(largest.mean()))
    scales = np.abs(largest - mean).max(0) / np.float32(127)
    maxima = np.round((largest - mean) / scales).astype(np.int8)
    again = maxima * scales + mean
    levels = np.array(LEVELS, np.float32)
    codes = np.abs((blocks / again[:, None])[..., None] - levels).argmin(-1)
    return codes.reshape(w.shape), maxima, scales, mean, (levels[codes] * again[:, None]).reshape(w.shape)


def unpacked(codes, block=64):
    """One code a row of packed codes [D/2, F]."""
    halves = codes.reshape(-1, block // 2, codes.shape[-1])
    return np.concatenate([halves & 15, halves >> 4], axis=1).reshape(-1, codes.shape[-1])


def test_levels_are_quantiles_of_a_normal_distribution():
    """Appendix E: 8 negative and 9 positive quantiles, the two zeros one, scaled to +-1."""
    from statistics import NormalDist

    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    half = lambda n: [NormalDist().inv_cdf(p) for p in np.linspace(end, 0.5, n)[:-1]]  # noqa: E731
    found = np.array(sorted([-x for x in half(8)] + [0.0] + half(9)))
    np.testing.assert_allclose(LEVELS, found / found.max(), atol=1e-6)


def test_nf4_is_the_paper():
    made = quantize({"layers": {"mlp": {"up": jnp.asarray(W)}}}, "nf4")["layers"]["mlp"]["up"]
    assert (made.shape, made.dtype, made.ndim, made.size) == ((3, 128, 24), jnp.float32, 3, W.size)
    for i in range(len(W)):
        codes, maxima, scales, mean, again = reference(W[i])
        one = jax.tree.map(lambda x, i=i: x[i], made)
        assert (unpacked(np.asarray(one.codes)) == codes).mean() > 0.9999  # a tie may fall either way
        np.testing.assert_array_equal(one.maxima, maxima)
        np.testing.assert_allclose(one.scales[0], scales, rtol=1e-6)
        np.testing.assert_allclose(one.mean, mean)
        np.testing.assert_allclose(one.dense(), again, atol=1e-5)


@pytest.mark.parametrize("D", [128, 86, 48, 2])
def test_errors_are_bounded(D):
    w = W[0].repeat(2, 0)[:D] * np.random.default_rng(1).uniform(0, 1, (D, 24)).astype("f")
    w[:, 3], w[0, 5] = 0, 1000
    int8, nf4 = (quantize({"layers": {"0": {"mlp": {"up": w}}}}, kind)["layers"]["0"]["mlp"]["up"] for kind in KINDS)
    assert (np.abs(int8.dense() - w) <= int8.scale / 2 * (1 + 1e-5)).all()
    assert (int8.dense()[:, 3] == 0).all()
    assert (nf4.dense()[:, 3] == 0).all()
    block = D // len(nf4.maxima)
    assert block <= 64
    assert block % 2 == 0
    largest = np.abs(w).reshape(-1, block, 24).max(1)
    off = np.asarray(nf4.scales).repeat(len(largest) // len(nf4.scales), 0) / 2 * (1 + 1e-5) + 1e-6
    gap = max(b - a for a, b in itertools.pairwise(LEVELS)) / 2
    # Half a gap of a maximum that is itself wrong by `off`, and what is cut off where it is too small.
    bound = (gap * (largest + off) + off).repeat(block, 0)
    assert (np.abs(nf4.dense() - w) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_those_of_the_dense_matrix(kind, dtype):
    w = jax.tree.map(lambda x: x[0], quantize({"layers": {"mlp": {"up": jnp.asarray(W, jnp.bfloat16)}}}, kind))
    w, x = w["layers"]["mlp"]["up"], jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 128)), dtype)
    tol = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    dense = np.asarray(w.astype("float32").dense())
    y, back = jax.vjp(lambda x: matmul(x, w), x)
    assert y.dtype == x.dtype
    assert w.dense().dtype == jnp.bfloat16
    wanted = np.asarray(x, np.float32) @ dense
    assert np.abs(np.asarray(y, np.float32) - wanted).max() <= tol * np.abs(wanted).max()
    wanted = np.asarray(y, np.float32) @ dense.T
    assert np.abs(np.asarray(back(y)[0], np.float32) - wanted).max() <= tol * np.abs(wanted).max()
    cast = peft.methods["lora"].weight(w, jnp.zeros((128, 2)), jnp.zeros((2, 24))).astype(jnp.bfloat16)
    assert cast.a.dtype == jnp.bfloat16
    assert same(cast.w, w), "scales stay in fp32"
    with pytest.raises(TypeError, match="is no array"):
        w[0]


def test_layouts_are_the_same_bits():
    base = make_base()
    for kind in KINDS:
        stacked, unrolled = (named(quantize(make_base(scan=scan).params, kind)) for scan in (True, False))
        for path, w in unrolled.items():
            name, layers = name_and_layers(path)
            whole = stacked[name] if layers is None else jax.tree.map(lambda x, i=layers[0]: x[i], stacked[name])
            assert same(w, whole), path
        changed = [p for p, w in stacked.items() if isinstance(w, Quantized)]
        assert sorted(changed) == sorted(p for p in named(base.params) if p.split("/")[-1] in
                                         ("q", "k", "v", "o", "gate", "up", "down"))  # fmt: skip


def test_mistakes_are_named():
    odd = {"layers": {"mlp": {"up": jnp.ones((2, 33, 8)), "down": jnp.ones(3)}}}
    with pytest.raises(InputError, match=r"layers/mlp/up \[2, 33, 8\]: nf4 packs rows in pairs, and 33 is odd"):
        quantize(odd, "nf4")
    with pytest.raises(InputError, match="layers/mlp/down: only a plain matrix can be int8"):
        quantize(odd, "int8")
    with pytest.raises(InputError, match="quantize 'int4': wanted int8 or nf4"):
        quantize(odd, "int4")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2"])
def test_nf4_takes_a_quarter_of_bfloat16(name):
    """By count: 4 bits, an eighth of a bit for 8 bits a block of 64, and the second level. Embeddings stay."""
    shapes = shapes_of(presets[name])
    for kind, most in (("int8", 0.51), ("nf4", 0.27)):
        made = named(jax.eval_shape(partial(quantize, kind=kind), shapes))
        matrices = [w for w in made.values() if isinstance(w, Quantized)]
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(matrices))
        assert held <= most * sum(2 * w.size for w in matrices)
        assert sum(w.size for w in made.values()) == sum(x.size for x in jax.tree.leaves(shapes))
    assert "embed/table" in made
    assert not isinstance(made["embed/table"], Quantized)


def test_fold_gives_the_dense_matrices_in_their_dtype():
    base = make_base(param_dtype="bfloat16")
    for kind in KINDS:
        folded = peft.fold(quantize(base.params, kind))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), folded) == jax.tree.map(
            lambda x: (x.shape, x.dtype), base.params
        )
        assert same(folded["embed"], base.params["embed"])


# Memory


def residuals(base, method):
    """Shapes of all floating arrays that the backward pass keeps, the base's and the method's own among them."""
    trainable = jax.eval_shape(method.init, jax.random.key(0), base.params)
    frozen = jax.eval_shape(method.frozen_params, base.params)
    loss, batch = make_loss(base.model, method), make_batch(B=1, T=8)
    kept = jax.eval_shape(lambda f, t: jax.vjp(lambda t: loss(t, f, batch)[0], t)[1], frozen, trainable)
    return [x.size for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1]


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_every_method_binds_and_keeps_no_dense_matrix_or_refuses(method):
    """Init, bind and forward over nf4; what waits for the backward pass is less than over the plain base by all of its
    matrices, so none was made dense and kept."""
    base = make_base()
    nf4 = Base(base.config, base.model, jax.eval_shape(partial(quantize, kind="nf4"), base.params))
    if method in [CASES[name] for name in ("subset", "gradual", "layer_range", "pissa", "olora")]:
        key, params = jax.random.key(0), nf4.params
        refusing = (
            partial(residuals, nf4, method),
            partial(method.frozen_params, params),
            partial(method.init, key, params),
            partial(peft.partition, method, params, key),
        )
        for refused in refusing:
            with pytest.raises(InputError, match=r"^\w+: layers/(attn|mlp)/\w+ is NF4"):
                refused()
        return
    kept, before = residuals(nf4, method), residuals(base, method)
    matrices = [w for w in named(nf4.params).values() if isinstance(w, Quantized)]
    scales = sum(w.scales.size for w in matrices)
    if base.params["layers"]["mlp"]["up"].size in before:  # not if nothing trains below the head
        assert sum(kept) <= sum(before) - sum(w.size for w in matrices) + scales
    trainable = jax.eval_shape(method.init, jax.random.key(0), nf4.params)
    ids = make_batch()["ids"]
    logits = jax.eval_shape(lambda p, t: peft.apply(nf4.model, p, method, t, ids), nf4.params, trainable)
    assert logits.shape == (*ids.shape, base.config.V)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_needs_the_packed_base_and_one_layer(kind):
    """Compiled memory of a LoRA step: temporaries as over the plain base and one matrix more, arguments the bits."""
    base = make_base(D=128, F=256, H=32, L=8)

    def memory(params):
        frozen, trainable = peft.partition(LORA, params, jax.random.key(1))
        tx = make_optimizer(OPTIM, trainable, 20)
        step = jax.jit(make_train_step(base.model, LORA, tx), donate_argnums=0)
        return step.lower(init_state(trainable, tx), frozen, make_batch(B=1, T=8)).compile().memory_analysis()

    before, after = memory(base.params), memory(quantize(base.params, kind))
    layers = sum(x.nbytes for x in jax.tree.leaves(base.params["layers"]))
    assert after.temp_size_in_bytes - before.temp_size_in_bytes <= layers / 8  # one layer
    saved = before.argument_size_in_bytes - after.argument_size_in_bytes
    assert saved >= {"int8": 0.7, "nf4": 0.8}[kind] * layers


# The laws


def test_1_identity_at_init(base):
    laws.test_1_identity_at_init(base, LORA)


def test_2_frozen_stays_and_trainable_moves(base):
    laws.test_2_frozen_stays_and_trainable_moves(base, LORA)
    laws.test_2_training_computes_what_evaluation_does(base, LORA)


def test_3_trees_follow_the_trainable_tree(base):
    laws.test_3_trees_follow_the_trainable_tree(base, LORA)


def test_4_fold_gives_the_same_logits(base):
    """And the structure of the base before it was quantised."""
    trainable = laws.moved(base, LORA)
    folded = jax.jit(partial(peft.merge, LORA))(base.params, trainable)
    assert jax.tree.structure(folded) == jax.tree.structure(make_base().params)
    close(laws.plain(base.model, folded), laws.outputs(base, LORA, trainable)[0])


def test_5_vmapped_adapters_equal_separate_runs(base):
    laws.test_5_vmapped_adapters_equal_separate_runs(base, LORA)


def test_6_one_device_and_eight_give_the_same_losses(base):
    """The bits are the same, and split as the matrices are, where their axes divide."""
    before = make_base(V=62).params
    kind = "int8" if isinstance(base.params["layers"]["mlp"]["up"], Int8) else "nf4"
    frozen, state, step = stepper(base, LORA)
    one = [float(metrics["loss"]) for metrics in steps(step, frozen, state)]
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        split = shardings(mesh, base.params)
        make = jax.jit(partial(quantize, kind=kind), out_shardings=split)
        params = make(jax.device_put(before, shardings(mesh, before)))
        assert same(params, base.params)
        tx = make_optimizer(OPTIM, state.trainable, 20, LORA)

        def begin(params):
            frozen, trainable = peft.partition(LORA, params, jax.random.key(1))
            return frozen, init_state(trainable, tx)

        def layout(base, base_shardings):
            frozen, state = jax.eval_shape(begin, base)
            return (frozen_shardings(mesh, frozen, base, base_shardings),
                    adapter_shardings(mesh, LORA, state, base, base_shardings))  # fmt: skip

        where = layout(jax.eval_shape(lambda: params), split)
        held = [[w for w in named(t).values() if isinstance(w, Quantized)] for t in (where[0], split)]
        assert jax.tree.leaves(held[0]) == jax.tree.leaves(held[1])
        assert where[1] == layout(before, shardings(mesh, before))[1], "adapters lie as over a plain base"
        first = jax.tree.leaves(where[0]["layers"]["mlp"]["up"])[0]
        assert tuple(first.spec) == (None, "fsdp", "tensor")
        frozen, state = jax.jit(begin, out_shardings=where)(params)
        eight = jax.jit(make_train_step(base.model, LORA, tx), out_shardings=(where[1], None))
        found = [float(metrics["loss"]) for metrics in steps(eight, frozen, state, put_batch(mesh))]
        text = eight.lower(state, frozen, put_batch(mesh)(jax.device_get(make_batch()))).compile().as_text()
    sent = re.findall(r"= \(?(\w+\[[\d,]+\])\S* all-gather", text)
    assert "u8[1,16,24]" in sent if kind == "nf4" else "s8[1,32,24]" in sent, f"the bits are gathered, not {sent}"
    assert not {"f32[32,24]", "f32[1,32,24]"} & set(sent), "and not the matrix"
    np.testing.assert_allclose(found, one, rtol=1e-5)


def steps(step, frozen, state, put=lambda batch: batch):
    """The metrics of six steps."""
    for i in range(6):
        state, metrics = step(state, frozen, put({k: np.asarray(v) for k, v in make_batch(i).items()}))
        yield metrics


def test_7_packed_documents_equal_separate_ones(base):
    laws.test_7_packed_documents_equal_separate_ones(base, LORA)


def test_8_cached_decoding_equals_recomputation(base):
    laws.test_8_cached_decoding_equals_recomputation(base, LORA)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{"scan": False}, {"remat": "full"}, {"accumulate": 2}, {"chunk": 8}], ids=str)
def test_10_layouts_remat_chunks_and_accumulation_change_nothing(kind, changes):
    def metrics(chunk=8192, accumulate=1, **config):
        frozen, state, step = stepper(quantised(make_base(**config), kind), LORA, chunk=chunk, accumulate=accumulate)
        return {k: v for k, v in step(state, frozen, make_batch())[1].items() if k in ("loss", "grad_norm")}

    close(metrics(**changes), metrics(), 2e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "norms", "hira"])
def test_11_training_is_that_over_the_dense_matrices(base, name):
    """Step by step the same losses as over the plain base that the quantised one stands for."""
    other, found = plain(base), []
    for over in (base, other):
        frozen, state, step = stepper(over, CASES[name])
        found.append([float(metrics["loss"]) for metrics in steps(step, frozen, state)])
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5)


def test_12_causality_by_gradients(base):
    laws.test_12_causality_by_gradients(base, LORA)


def test_half_precision_bases_are_multiplied_in_the_compute_dtype():
    """A bfloat16 base under nf4 and fp32 compute: the matrix is dequantised in fp32, never rounded to bfloat16."""
    base = make_base(param_dtype="bfloat16")
    nf4 = quantised(base, "nf4")
    assert nf4.params["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    wide = {p: jax.lax.map(lambda w: w.astype("float32").dense(), w) if isinstance(w, Quantized) else w
            for p, w in named(nf4.params).items()}  # fmt: skip
    batch, trainable = make_batch(), shaken(LORA.init(jax.random.key(1), nf4.params))
    run = evaluator(base.model, LORA)
    close(run(nf4.params, trainable, batch)[0], run(nested(wide), trainable, batch)[0], 1e-5)
