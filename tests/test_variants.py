"""The laws over other architectures than the tiny base's: what the families of Hugging Face bring into the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws as laws
from graftax import InputError, peft
from graftax.model import Rope, Transformer, generate
from graftax.model.layout import restack
from graftax.model.tree import named
from graftax.peft import LoRA, Prefix, Prompt, Subset
from tiny import Base, close, make_base, make_batch, shaken, stepper

VARIANTS = {
    "gemma": {
        "windows": (5, 0), "rope_local": Rope(50.0), "rope": Rope(1e4, kind="linear", factor=2.0), "norm_at": "both",
        "norm_offset": 1.0, "qk_norm": "head", "query_scale": 0.3, "attn_cap": 4.0, "logit_cap": 3.0,
        "embed_scale": 5.0, "activation": "gelu_tanh", "qkv_bias": False,
    },
    "gpt2": {
        "rope": None, "learned_positions": True, "norm": "layer", "gated": False, "activation": "gelu_tanh",
        "o_bias": True, "mlp_bias": True, "fused_qkv": True, "H": 7, "K": 4,
    },
    "olmo2": {"norm_at": "post", "qk_norm": "full", "tied": False, "rope": Rope(width=6), "windows": (4,)},
}  # fmt: skip
METHODS = [LoRA(rank=2), Prompt(tokens=3), Prefix(tokens=3)]


@pytest.fixture(scope="module", params=VARIANTS)
def base(request):
    base = make_base(**VARIANTS[request.param])
    return Base(base.config, base.model, shaken(base.params, 0.1))


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_packed_and_cached(base, method):
    laws.test_7_packed_documents_equal_separate_ones(base, method)
    laws.test_8_cached_decoding_equals_recomputation(base, method)


def test_every_parameter_has_a_gradient_alike_in_every_layout(base):
    batch = make_batch()

    def gradients(config):
        loss = lambda p: Transformer(config).apply({"params": p}, *at).astype(jnp.float32).std()  # noqa: E731
        at = (batch["ids"], batch["positions"], batch["segments"])
        return restack(jax.jit(jax.grad(loss))(restack(base.params, config)), base.config)

    expected = gradients(base.config)
    # A bias of the keys moves all scores of a query alike, so no softmax, unless the keys turn or are normed.
    still = {"layers/attn/k_bias"} if base.config.rope is None else set()
    assert all(jnp.abs(g).max() > 1e-8 for path, g in named(expected).items() if path not in still)
    close(gradients(dataclasses.replace(base.config, scan=False)), expected, 1e-5)
    close(gradients(dataclasses.replace(base.config, remat="full")), expected, 1e-5)


def test_a_window_hides_what_is_behind_it(base):
    """By gradients: what the last token's state depends on is what the windows of its layers reach."""
    T, windows = 16, base.config.layer_windows
    embedded = {path: leaf for path, leaf in named(base.params).items() if path == "embed/table"}["embed/table"]

    def last(rows):
        params = {**base.params, "embed": {**base.params["embed"], "table": rows}}
        return base.model.apply({"params": params}, jnp.arange(T)[None], method="hidden")[0, -1].sum()

    seen = np.abs(jax.grad(last)(embedded))[:T].max(axis=1) > 0
    reach = T if not all(windows) else 1 + sum(w - 1 for w in windows)
    assert seen.tolist() == [t >= T - reach for t in range(T)]


def test_one_step_trains_and_freezes(base):
    frozen, state, step = stepper(base, Subset("norms"))
    new = step(state, frozen, make_batch())[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trainable, new.trainable)
    assert all(jax.tree.leaves(moved))
    assert any("q_norm" in key for key in new.trainable) == (base.config.qk_norm != "none")


def test_learned_positions_end():
    base = make_base(**VARIANTS["gpt2"], context=20)
    ids = jnp.zeros((1, 18), jnp.int32)
    for method in (Prompt(tokens=3), Prefix(tokens=3)):
        trainable = method.init(jax.random.key(0), base.params)
        peft.apply(base.model, base.params, method, trainable, ids[:, :17])
        with pytest.raises(InputError, match="a row of 21 positions, but the base has learned 20"):
            peft.apply(base.model, base.params, method, trainable, ids)
        bound, context = method.bind(base.params, trainable), method.context(trainable)
        with pytest.raises(InputError, match=r"10 tokens and 8 after it .* context of 17 \(less 3 virtual"):
            generate(base.model, bound, [[1] * 10], 8, context=context)
    with pytest.raises(InputError, match="a row of 21 positions"):
        base.model.apply({"params": base.params}, jnp.zeros((1, 21), jnp.int32))
