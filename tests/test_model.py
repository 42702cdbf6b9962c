"""The decoder: kernels against the definition, initialisation, sampling, and config errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError
from graftax.model import (
    Sampling,
    Transformer,
    Weight,
    attention,
    generate,
    init,
    matmul,
    presets,
    restack,
    shapes_of,
    token_losses,
)
from graftax.model.attention import VIRTUAL, attend, attention_mask, causal_mask
from graftax.model.generate import sample
from graftax.model.tree import named
from tiny import CONFIG, close, make_base, make_batch, same


def qkv(B=2, T=192, S=192, N=4, K=2, H=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(k, shape) for k, shape in zip(keys, [(B, T, N, H), (B, S, K, H), (B, S, K, H)], strict=True)
    ]


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("T", "P"), [(192, 0), (192, 5), (7, 0)])
def test_blocked_attention_is_the_definition(T, P, long, monkeypatch):
    """In blocks of queries, packed, with and without keys before the row, values and gradients."""
    if long:  # as rows of 2,048 are
        monkeypatch.setattr(attention, "LONG_ROW", 1)
        monkeypatch.setattr(attention, "PART_QUERIES", 40)
    q, k, v = qkv(T=T, S=T + P)
    positions = jnp.tile(jnp.arange(T) % 80, (2, 1))
    segments = jnp.tile(jnp.arange(T) // 80 + 1, (2, 1)).at[0, -3:].set(0)
    packed = jnp.pad(
        attention_mask(positions, segments, positions, segments), ((0, 0), (0, 0), (P, 0)), constant_values=True
    )
    masks = [packed] if P else [packed, None]
    for mask in masks:

        def value(q, k, v, kernel, mask=mask):
            return (attend(q, k, v, mask, kernel, kv_offset=P) ** 2).sum()

        gradient = jax.value_and_grad(value, argnums=(0, 1, 2))
        close(gradient(q, k, v, "xla"), gradient(q, k, v, "reference"), 2e-4)


def test_attention_agrees_with_jax_nn():
    q, k, v = qkv(T=16, S=16)
    close(attend(q, k, v, None), jax.nn.dot_product_attention(q, k, v, is_causal=True))


def test_visible():
    """Causal inside a document, virtual keys for all, nothing across documents, no empty row."""
    positions, segments = jnp.array([[0, 1, 2, 3, 2, 3, 2]]), jnp.array([[-1, -1, 1, 1, 2, 2, 0]])
    mask = np.asarray(attention_mask(positions, segments, positions, segments))[0]
    expected = np.zeros((7, 7), bool)
    expected[:, :2] = True
    expected[0, 1] = False
    expected[2, 2] = expected[3, 2] = expected[3, 3] = expected[4, 4] = expected[5, 4] = expected[5, 5] = expected[
        6, 6
    ] = True
    assert (mask == expected).all()
    assert VIRTUAL == -1
    assert (causal_mask(2, 4) == jnp.array([[[1, 1, 1, 0], [1, 1, 1, 1]]], bool)).all()


def test_matmul_defers_to_a_weight():
    """`jax.Array @ weight` and `numpy @ weight` reach the weight, traced or not."""

    class Twice(Weight):
        w: jax.Array

        def __rmatmul__(self, x):
            return 2 * (x @ self.w)

    w = jnp.arange(6.0).reshape(3, 2)
    x = jnp.ones((2, 4, 3))
    close(x @ Twice(w), 2 * (x @ w))
    close(np.ones((4, 3), np.float32) @ Twice(w), 2 * (x[0] @ w))
    close(jax.jit(matmul)(x, Twice(w)), 2 * (x @ w))
    close(jax.grad(lambda w: (x @ Twice(w)).sum())(w), 2 * jnp.full((3, 2), 8.0))


def test_scan_equals_unrolled_and_seeds_are_by_name():
    stacked, unrolled = make_base(), make_base(scan=False)
    assert same(restack(unrolled.params, stacked.config), stacked.params)
    assert same(restack(stacked.params, unrolled.config), unrolled.params)
    batch = make_batch()
    args = (batch["ids"], batch["positions"], batch["segments"])
    out = [b.model.apply({"params": b.params}, *args) for b in (stacked, unrolled)]
    close(*out)
    without = init(dataclasses.replace(CONFIG, qkv_bias=False), jax.random.key(0))
    full = named(stacked.params)
    assert all(same(leaf, full[path]) for path, leaf in named(without).items()), "a parameter more reseeded the others"


@pytest.mark.parametrize(
    "changes",
    [{"norm": "layer", "gated": False, "activation": "gelu", "o_bias": True, "mlp_bias": True}, {"tied": False}],
)
def test_variants_train(changes):
    base = make_base(**changes)
    batch = make_batch()
    gradient = jax.grad(lambda p: base.model.apply({"params": p}, batch["ids"]).std())(base.params)
    assert all(jnp.abs(g).max() > 0 for path, g in named(gradient).items() if path != "layers/attn/k_bias")


def test_dtypes():
    """Parameters, products and logits each in their own dtype."""
    base = make_base(dtype="bfloat16", param_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(base.params)} == {"bfloat16"}
    batch = make_batch()
    out, states = (base.model.apply({"params": base.params}, batch["ids"], method=m) for m in ("__call__", "hidden"))
    assert (str(out.dtype), str(states.dtype)) == ("float32", "bfloat16")


def test_counts_of_presets():
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(shapes_of(presets[name]))) for name in ("llama-2-7b", "qwen2.5-0.5b")
    }
    assert sizes == {"llama-2-7b": 6_738_415_616, "qwen2.5-0.5b": 494_032_768}


def test_sampling():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4000))
    draw = lambda **how: np.asarray(sample(jax.random.key(0), logits, Sampling(**how)))  # noqa: E731
    share = lambda ids: np.bincount(ids, minlength=4) / len(ids)  # noqa: E731
    assert (draw() == 0).all()
    np.testing.assert_allclose(share(draw(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(share(draw(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(draw(temperature=1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(draw(temperature=0.5)), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)
    with pytest.raises(InputError, match=r"--top-p 0\.0: wanted above 0, at most 1"):
        Sampling(top_p=0.0)


def test_generation_stops_and_refuses(base):
    prompt = [[1, 2, 3]]
    free = generate(base.model, base.params, prompt, 6, pad_to=16)[0]
    assert generate(base.model, base.params, prompt, 6, stop=(free[2],), pad_to=16)[0] == free[: free.index(free[2])]
    with pytest.raises(InputError, match="60 tokens and 6 after it exceed the model's context of 64"):
        generate(base.model, base.params, [[1] * 60], 6)
    with pytest.raises(InputError, match="empty"):
        generate(base.model, base.params, [[]], 6)
    with pytest.raises(InputError, match="a prompt holds the token id 61, but the model has 61 rows"):
        generate(base.model, base.params, [[1, 61]], 6)
    allowed = np.arange(CONFIG.V) != free[0]
    assert free[0] not in generate(base.model, base.params, prompt, 6, allowed_V=allowed, pad_to=16)[0]
    few = jnp.arange(4) % 2 > 0
    drawn = sample(jax.random.key(0), jnp.zeros((99, 4)), Sampling(temperature=1.0, top_k=3), few)
    assert set(drawn.tolist()) == {1, 3}


def test_config_errors():
    with pytest.raises(InputError, match="N = 4 query heads do not divide into K = 3"):
        dataclasses.replace(CONFIG, K=3)
    with pytest.raises(InputError, match="rotary width 7 of heads of 7"):
        dataclasses.replace(CONFIG, H=7)
    with pytest.raises(InputError, match=r"--model\.L 0: wanted 1 or more"):
        dataclasses.replace(CONFIG, L=0)


def test_model_is_a_plain_flax_module():
    ids = jnp.ones((1, 4), jnp.int32)
    model = Transformer(CONFIG)
    variables = model.init(jax.random.key(0), ids)
    assert model.apply(variables, ids).shape == (1, 4, CONFIG.V)
    assert jnp.abs(variables["params"]["layers"]["mlp"]["up"]).max() > 0


def test_what_is_kept_for_the_backward_pass():
    """Every policy gives the same gradient, and the temporaries shrink from `none` to `full`."""

    def program(remat):
        base, batch = make_base(remat=remat, L=8), make_batch()
        loss = lambda params: token_losses(base.model, params, batch).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(base.params).compile()
        return compiled(base.params), compiled.memory_analysis().temp_size_in_bytes

    grads, bytes_ = zip(*map(program, ("none", "dots", "attention", "full")), strict=True)
    for other in grads[1:]:
        close(other, grads[0], 1e-4)
    assert bytes_[0] > bytes_[1] > bytes_[2] > bytes_[3], bytes_
    close(program("offload")[0], grads[0], 1e-4)
