"""Methods beyond the laws: counts, partition, chains, and errors."""

import jax
import jax.numpy as jnp
import pytest
from graftax import InputError, peft
from graftax.model import presets
from graftax.model.tree import named
from graftax.peft import Houlsby, LoRA, Prefix, Prompt, Subset, chain
from tiny import CONFIG, close, make_base, make_batch, same, shaken


def test_counts_equal_published_ones():
    qv = "layers/attn/[qv]"
    expected = {
        "llama-2-7b": (4_194_304, 39_976_960, 81_920, 7_864_320),
        "qwen2.5-0.5b": (540_672, 8_798_208, 17_920, 184_320),
    }
    for name, counts in expected.items():
        methods = (LoRA(rank=8, where=qv), LoRA(rank=16), Prompt(tokens=20), Prefix(tokens=30))
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
    got = peft.apply(base.model, base.params, method, trainable, batch["ids"])
    close(got, base.model.apply({"params": by_hand}, batch["ids"]))


def test_chain_refuses_what_has_no_order(base):
    wrong = chain(LoRA(), Subset("attention"))
    with pytest.raises(InputError, match="put Subset first"):
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
