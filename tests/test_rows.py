"""Rows of one batch with an adapter each: logits, losses and text are those of each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import generate, token_losses
from graftax.peft import IA3, DoRA, Houlsby, LoRA, Prefix, Prompt, Subset, chain, rows
from tiny import make_base, make_batch, shaken

METHODS = {
    "lora": LoRA(rank=3),
    "dora": DoRA(rank=2),
    "ia3": IA3(),
    "houlsby": Houlsby(rank=4),
    "prompt": Prompt(tokens=3),
    "prefix": Prefix(tokens=3),
    "norms": Subset("norms"),
    "chain": chain(LoRA(rank=2), Prompt(tokens=2)),
}
WHICH = np.array([3, 0, 7, 1, 6, 2, 5, 4])


@pytest.fixture(scope="module")
def base():
    return make_base()


def eight(base, method):
    """Eight adapters, each away from its beginning in another direction."""
    trees = [method.init(jax.random.key(i), base.params) for i in range(8)]
    return [jax.tree.map(lambda x, i=i: x * (1 + i / 8), shaken(tree, 0.2)) for i, tree in enumerate(trees)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_eight_rows_with_eight_adapters(base, method):
    trainables, batch = eight(base, method), make_batch(B=8)
    mixed = jax.jit(lambda t: rows.apply(base.model, base.params, method, t, WHICH, batch["ids"]))(trainables)
    single = jax.jit(lambda t, ids: peft.apply(base.model, base.params, method, t, ids))
    alone = [single(trainables[k], batch["ids"][i : i + 1])[0] for i, k in enumerate(WHICH)]
    np.testing.assert_allclose(mixed, alone, rtol=1e-5, atol=3e-5)  # rounding: up to 1.3e-5, by the processor
    assert float(jnp.abs(mixed[0] - single(trainables[0], batch["ids"][:1])[0]).max()) > 1e-3, "the adapters differ"


@pytest.mark.full
def test_losses_of_packed_rows(base):
    method, batch = LoRA(rank=3), make_batch(B=8)
    trainables = eight(base, method)
    mixed = rows.losses(base.model, base.params, method, trainables, WHICH, batch)
    for i, k in enumerate(WHICH):
        row = {name: x[i : i + 1] for name, x in batch.items() if x.ndim == 2}
        alone = token_losses(base.model, method.bind(base.params, trainables[k]), row)
        np.testing.assert_allclose(mixed[i], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_text_of_each_is_its_own(base, name):
    """Prompts of different lengths, some rows ended early by a stop token."""
    method, prompts = METHODS[name], [[i + 2] * (i % 4 + 1) for i in range(8)]
    trainables = eight(base, method)
    allowed = np.arange(base.config.V) % 7 != 0
    how = {"stop": (5,), "pad_to": 8, "allowed_V": allowed}
    mixed = rows.generate(base.model, base.params, method, trainables, WHICH, prompts, 6, **how)
    assert allowed[np.concatenate(mixed).astype(int)].all()
    for k, prompt, text in zip(WHICH, prompts, mixed, strict=True):
        bound, context = method.bind(base.params, trainables[k]), method.context(trainables[k])
        assert generate(base.model, bound, [prompt], 6, context=context, **how) == [text]
    assert len({tuple(text) for text in mixed}) > 2


def test_adapters_that_do_not_go_together(base):
    two = [LoRA(rank=r).init(jax.random.key(0), base.params) for r in (2, 3)]
    ids = make_batch(B=2)["ids"]
    with pytest.raises(InputError, match=r"adapter 1 is of other shapes than adapter 0; .*rerank"):
        rows.apply(base.model, base.params, LoRA(), two, [0, 1], ids)
    with pytest.raises(InputError, match="which: 0 to 1, and there are 1 adapters, from 0 on"):
        rows.apply(base.model, base.params, LoRA(), two[:1], [0, 1], ids)
    with pytest.raises(InputError, match="which: 1 numbers for 2 prompts"):
        rows.generate(base.model, base.params, LoRA(), two[:1], [0], [[1], [2]], 3)
