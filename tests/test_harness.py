"""Runs in lm-evaluation-harness: log-likelihoods, windows, stops, and the harness itself where it is installed."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from faulty import programs, runs  # noqa: F401
from graftax import InputError
from graftax.data.sft import render_prompt
from graftax.model import generate
from graftax.train import harness
from graftax.train.harness import Harness
from graftax.train.runs.train import train
from test_choices import table

TEXT = "The with statement wraps a block. The if statement is used for conditional execution, and so on: "


@pytest.fixture(scope="module")
def folder(runs):  # noqa: F811
    """A prompt-tuned run: what stands before the text must be there too."""
    return str(train(dataclasses.replace(runs["prompt"], resume="auto")))


@pytest.fixture(scope="module")
def model(folder):
    """It as a model of the harness, in windows of 16."""
    return Harness(folder, batch_size=2, max_length=16)


def asked(*args):
    """A request."""
    return SimpleNamespace(args=args)


def logp(model, ids, start):
    """log p of ids[start:] behind those before them, and whether each is the likeliest: one row, padded behind."""
    one, params, context = model.bound
    padded = np.zeros(32, np.int32)
    padded[: len(ids) - 1] = ids[:-1]
    found = np.asarray(table(one, params, context.past, padded, context.tokens))
    at = range(start - 1, len(ids) - 1)
    return sum(float(found[i, ids[i + 1]]) for i in at), all(found[i].argmax() == ids[i + 1] for i in at)


@pytest.mark.full
def test_loglikelihood(model):
    pairs = [("The with", " statement"), ("The ", "if"), ("", "The"), (TEXT * 2, "block")]
    found = model.loglikelihood([asked(*pair) for pair in pairs])
    for (context, continuation), (loss, greedy) in zip(pairs, found, strict=True):
        whole, head = model.tokenizer.prompt(context + continuation), model.tokenizer.prompt(context.rstrip())
        cut = whole[-17:]  # from the left, to what the model holds
        wanted = logp(model, cut, len(cut) - (len(whole) - len(head)))
        assert loss == pytest.approx(wanted[0], rel=1e-4)
        assert greedy == wanted[1]


@pytest.mark.full
def test_windows_are_not_longer_than_the_context(folder):
    with pytest.raises(InputError, match="max_length=65: a whole number from 2 to 64 is wanted"):
        Harness(folder, max_length=65)


@pytest.mark.full
def test_rolling_windows_count_each_token_once(model):
    ids = list(range(30, 71))
    windows = list(model._windows(ids))
    assert [token for _, tail in windows for token in tail] == ids
    assert [len(prompt) + len(tail) - 1 for prompt, tail in windows] == [16, 16, 16]
    assert windows[0][0] == [model.tokenizer.bos]
    assert windows[1][0] == [ids[15]]
    assert windows[2][0] == ids[24:32], "the last window is full of what stands before it"
    text = TEXT[:60]
    whole = [model.tokenizer.bos, *model.tokenizer.encode(text)]
    by_hand = sum(logp(model, [*prompt, *tail], len(prompt))[0] for prompt, tail in model._windows(whole[1:]))
    assert model.loglikelihood_rolling([asked(text)])[0] == pytest.approx(by_hand, rel=1e-4)
    assert model.loglikelihood_rolling([asked("")]) == [0]


@pytest.mark.full
def test_generation_ends_at_its_stops(model):
    how = {"max_gen_toks": 8, "until": []}
    (text,) = model.generate_until([asked("The with", how)])
    one, params, context = model.bound
    ids = generate(one, params, [model.tokenizer.prompt("The with")], 8, stop=model.tokenizer.stops, context=context)
    assert text == model.tokenizer.decode(ids[0])
    stop = text[2:4]
    cut = model.generate_until([asked("The with", how | {"until": [stop]}), asked("An if", how)])
    assert cut[0] == text[: text.index(stop)]
    assert model.generate_until([asked(TEXT * 3, {"max_gen_toks": 99, "until": "\n"})]), "cut from the left"


@pytest.mark.full
def test_a_chat_goes_through_the_template(model):
    turns = [{"role": "user", "content": "red 1"}]
    text = model.apply_chat_template(turns)
    assert model._ids(text) == render_prompt(turns, model.tokenizer)
    assert model._ids(text + "so") == render_prompt(turns, model.tokenizer) + model.tokenizer.encode("so")
    begun = model.apply_chat_template([*turns, {"role": "assistant", "content": "de"}], add_generation_prompt=False)
    assert model._ids(begun) == render_prompt(turns, model.tokenizer) + model.tokenizer.encode("de")
    (prompt, tail) = model._pair(text, "der")
    assert (prompt, tail) == (render_prompt(turns, model.tokenizer)[-(17 - len(tail)) :], model.tokenizer.encode("der"))


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness_it_says_so():
    with pytest.raises(InputError, match="pip install 'graftax\\[lm_eval\\]'"):
        harness.model("x")


@pytest.mark.full
def test_a_local_task_in_the_harness_itself(folder, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"{word} {i}", "answer": word[::-1], "wrong": "x"} for i in range(4) for word in ("red", "blue")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    kinds = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: 0\n"
        "doc_to_choice: ['{{answer}}', '{{wrong}}']\nmetric_list: [{metric: acc}]\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "write": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, text in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = harness.model(folder, batch_size=4)
    found = lm_eval.simple_evaluate(model=model, tasks=list(kinds), task_manager=tasks, bootstrap_iters=0)["results"]
    right = [a > b for a, b in zip(*(model.loglikelihood([asked(row["question"], f" {row[key]}") for row in rows])
                                     for key in ("answer", "wrong")), strict=True)]  # fmt: skip
    assert found["choice"]["acc,none"] == pytest.approx(np.mean(right))
    assert 0 < found["rolling"]["bits_per_byte,none"] < 20
    assert 0 <= found["write"]["exact_match,none"] <= 1
