"""Continuations of a prompt that is read once have the losses that each has alone."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from graftax import InputError
from graftax.model import Context, Transformer, forward, generate
from graftax.peft import LoRA, Prefix, Prompt, Subset
from graftax.train import choices
from graftax.train.evaluate import generate_texts
from tiny import CONFIG, make_base, shaken

PROMPTS = [[5, 6, 7, 8, 9], [3], [11, 12, 13]]
TAILS = [[20, 21], [22], [20, 23, 24, 25], [26, 27], [28, 29, 30]]


@partial(jax.jit, static_argnames=("model", "tokens"))
def table(model, bound, past, ids, tokens):
    """log p of every token behind each of ids, which end with padding [16, V]."""
    return jax.nn.log_softmax(forward(model, bound, ids[None], context=Context(tokens, past))[0][0])


def alone(model, bound, context, prompt, tail):
    """-log p of a tail, in a row of its own."""
    ids = np.zeros(16, np.int32)
    ids[: len(prompt) + len(tail) - 1] = [*prompt, *tail[:-1]]
    logp = np.asarray(table(model, bound, context.past, ids, context.tokens))
    return -sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(tail))


@pytest.mark.parametrize("width", [1024, 12])
@pytest.mark.parametrize("method", [Subset("all"), LoRA(rank=2), Prompt(tokens=3), Prefix(tokens=3)],
                         ids=("mask", "lora", "prompts", "prefixes"))  # fmt: skip  # lora is in the fast tier
def test_many_are_as_each_alone(method, width, monkeypatch):
    monkeypatch.setattr(choices, "WIDTH", width)
    base = make_base()
    trainable = shaken(method.init(jax.random.key(1), base.params))
    args = (base.model, method.bind(base.params, trainable), method.context(trainable))
    found = choices.continuation_losses(*args, PROMPTS, TAILS, batch=2)
    wanted = [[alone(*args, prompt, tail) for tail in TAILS] for prompt in PROMPTS]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    pairs = [(PROMPTS[0], TAILS[2]), (PROMPTS[1], TAILS[1])]
    losses, greedy = choices.pair_scores(*args, pairs)
    np.testing.assert_allclose(losses, [wanted[0][2], wanted[1][1]], rtol=1e-5, atol=1e-5)
    written = generate(args[0], args[1], PROMPTS, 3, context=args[2])
    likely = [(prompt, tail) for prompt, tail in zip(PROMPTS, written, strict=True)]
    assert choices.pair_scores(*args, likely)[1].all()
    other = [(prompt, [*tail[:2], (tail[2] + 1) % 60]) for prompt, tail in likely]
    assert not choices.pair_scores(*args, other)[1].any()
    assert not greedy.any()


def test_a_window_sees_no_more_than_it_should():
    base = make_base()
    model = Transformer(dataclasses.replace(CONFIG, windows=(2, 0)))
    method = Subset("all")
    args = (model, base.params, method.context({}))
    found = choices.continuation_losses(*args, PROMPTS, TAILS)
    np.testing.assert_allclose(found, [[alone(*args, p, t) for t in TAILS] for p in PROMPTS], rtol=1e-5, atol=1e-5)


def test_no_position_is_behind_the_context(monkeypatch):
    """Scoring, as generation, refuses what the model was not made for, and names it; the last token is not read."""
    base = make_base()
    args = (base.model, base.params, Subset("all").context({}))
    where, prompts = ["a:1", "a:2"], [[1], [1] * 62]

    def scored(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(choices, "_segment_scores", scored)
    long = r"^(a:2|pair 2): a prompt of 62 tokens and 3 after it exceed"
    for tail, error, words in (([1, 2, 3], ZeroDivisionError, None), ([1, 2, 3, 4], InputError, long)):
        with pytest.raises(error, match=words):
            choices.continuation_losses(*args, prompts, [[1], tail], 4, where)
        with pytest.raises(error, match=words):
            choices.pair_scores(*args, [([1], [2]), (prompts[1], tail)])
    tokenizer = SimpleNamespace(stops=(2,), decode=str)
    with pytest.raises(InputError, match=r"^prompt 2: a prompt of 62 tokens and 3 after it exceed"):
        generate_texts(*args, tokenizer, prompts, 3)


def test_nothing_is_no_prompt_and_no_choice():
    base = make_base()
    for prompts, tails in (([[]], TAILS), (PROMPTS, [[]])):
        with pytest.raises(InputError, match="is empty"):
            choices.continuation_losses(base.model, base.params, Subset("all").context({}), prompts, tails)
