"""Tuning rows: the loss is on the assistant's words alone, packing loses nothing, bad rows are named."""

import math

import numpy as np
import pytest
from graftax import InputError
from graftax.data.columns import Columns, chat_of
from graftax.data.sft import encode_example, render_prompt, sft_rows
from graftax.data.sources import rows as read_rows
from graftax.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"question {i} about colours\tand a long answer, number {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tok"), 300)


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "question 1"},
    {"role": "assistant", "content": "answer 1\n"},
    {"role": "user", "content": "<|assistant|>why"},
    {"role": "assistant", "content": " because"},
]


def test_template_and_loss_mask(tok):
    ids, weights = encode_example(CHAT, tok)
    s = tok.special
    expected = [(tok.bos, 0)]
    for turn in CHAT:
        w = int(turn["role"] == "assistant")
        expected += [(s[f"<|{turn['role']}|>"], 0), *((i, w) for i in tok.encode(turn["content"])), (tok.eos, w)]
    assert list(zip(ids, weights, strict=True)) == expected
    learned = [i for i, w in zip(ids, weights, strict=True) if w]
    assert tok.decode(learned) == "answer 1\n because"
    assert ids.count(s["<|assistant|>"]) == 2  # the text "<|assistant|>" is text
    prompt = render_prompt(CHAT, tok)
    assert prompt == ids[: len(prompt)]
    assert weights[len(prompt)] == 1
    assert prompt[-1] == s["<|assistant|>"]
    assert render_prompt(CHAT[:-1], tok) == prompt


def test_a_vocabulary_without_chat_tokens_gets_text_markers(tok):
    plain = {k: v for k, v in tok.special.items() if k in ("<|bos|>", "<|eos|>", "<|pad|>")}
    bare = Tokenizer(
        tok.file, tok.data, tok.vocab_size, tok.bos, tok.eos, tok.pad, plain, tok.encode_batch, tok._decode
    )
    ids, weights = encode_example(CHAT[1:3], bare)
    assert ids[-1] == tok.eos
    assert weights[-1] == 1
    assert bare.decode(ids) == "<|user|>\nquestion 1<|assistant|>\nanswer 1\n"
    assert bare.decode(render_prompt(CHAT[1:2], bare)) == "<|user|>\nquestion 1<|assistant|>\n"


def test_shapes_of_rows():
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = lambda row: chat_of(row, "f:1").messages  # noqa: E731
    assert turns({"prompt": "a", "completion": "b", "meta": 1}) == pair
    assert turns({"instruction": "a", "input": "", "output": "b"}) == pair
    assert turns({"instruction": "a", "output": "b"}) == pair
    assert turns({"instruction": "a", "input": "c", "output": "b"})[0]["content"] == "a\n\nc"
    assert turns({"messages": CHAT}) == CHAT
    assert turns({"prompt": CHAT[:-1], "completion": CHAT[-1]["content"]}) == CHAT
    assert turns({"prompt": CHAT[:-1], "completion": CHAT[-1:]}) == CHAT
    sent = {"system": "system", "user": "human", "assistant": "gpt"}
    assert turns({"conversations": [{"from": sent[t["role"]], "value": t["content"]} for t in CHAT]}) == CHAT
    beside = {"system": "be brief", "history": [["question 1", "answer 1\n"]]}
    assert turns({"prompt": CHAT[3]["content"], "completion": " because", **beside}) == CHAT
    assert turns({"instruction": CHAT[3]["content"], "output": " because", **beside}) == CHAT
    assert turns({"messages": CHAT[1:], "system": "be brief", "tools": None, "id": 7, "row_id": "x"}) == CHAT
    assert turns({"messages": CHAT, "prompt": None, "completion": None}) == CHAT  # of a table with several shapes


def test_columns_have_the_names_that_a_flag_gives_them():
    swapped = Columns(("prompt=completion", "completion=prompt"))
    assert chat_of({"prompt": "a", "completion": "b"}, "f:1", columns=swapped).messages[1]["content"] == "a"
    named = Columns(("prompt=question", "completion=answer", "system=persona"), ("notes",))
    row = {"question": "a", "answer": "b", "persona": "c", "notes": "d"}
    assert [turn["content"] for turn in chat_of(row, "f:1", columns=named).messages] == ["c", "a", "b"]
    assert chat_of({"prompt": "a", "completion": "b"}, "f:1", columns=named).messages[0]["content"] == "a"
    with pytest.raises(InputError, match=r"f:1: column 'prompt' exists, but --data\.columns reads it from"):
        chat_of({"question": "a", "answer": "b", "prompt": "c"}, "f:1", columns=named)
    for names, message in (
        (("prompt",), "OURS=THEIRS"),
        (("promt=a",), "did you mean 'prompt'"),
        (("prompt=a",) * 2, "duplicate"),
    ):
        with pytest.raises(InputError, match=rf"--data\.columns .*{message}"):
            Columns(names)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
def test_a_turn_that_is_context_is_no_target(tok, flag):
    turns = [dict(turn) for turn in CHAT]
    turns[2] |= flag
    chat = chat_of({"messages": turns}, "f:1")
    ids, weights = encode_example(chat, tok)
    assert ids == encode_example(CHAT, tok)[0]
    assert tok.decode([i for i, w in zip(ids, weights, strict=True) if w]) == " because"
    turns[2], turns[4] = CHAT[2], turns[4] | flag  # what follows the last target changes nothing
    assert chat_of({"messages": turns}, "f:1") == chat_of({"messages": CHAT[:3]}, "f:1")


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLS = [
    CHAT[1],
    {"role": "assistant", "content": None, "reasoning_content": "sum", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "2"},
    CHAT[4],
]


def test_calls_tools_and_thoughts_are_kept():
    row = {"messages": CALLS, "tools": '[{"name": "add"}]', "chat_template_kwargs": {"enable_thinking": False}}
    chat = chat_of(row, "f:1")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}  # as templates write it
    assert chat.messages == [CALLS[0], CALLS[1] | {"tool_calls": [call]}, *CALLS[2:]]
    assert (chat.tools, chat.variables) == ([{"name": "add"}], {"enable_thinking": False})
    assert CALL["function"]["arguments"] == '{"a": 1}'
    sent = [
        {"from": "human", "value": "question 1"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": " because"},
    ]
    assert [(t["role"], t["content"]) for t in chat_of({"conversations": sent}, "f:1").messages] == [
        (t["role"], t["content"]) for t in CALLS
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CALLS}, "'reasoning_content' has no place in graftax's own chat format"),
        ({"messages": CALLS[2:]}, "a message from tool has no place"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "add"}]}, "'tools' has no .* --data.ignore tools"),
        ({"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": 1}}, "'x' has no place"),
    ],
)
def test_what_our_own_format_cannot_say_is_refused(tok, row, message):
    with pytest.raises(InputError, match=f"^f:1: {message}"):
        sft_rows([("f:1", row)], tok, 64, 0)


BAD = [
    ('{"prompt": "a"}', "fields .'prompt'.; expected one of"),
    ('{"question": "a", "answer": "b"}', "fields .'answer', 'question'.; expected one of"),
    ('{"prompt": "a", "completion": "b", "messages": []}', "fields .*'messages'.*; expected one of"),
    ('{"prompt": "a", "completion": "b", "input": "c"}', "; expected one of"),
    ('{"prompt": "a", "completion": null}', "'completion' is null; expected text"),
    ('{"prompt": "a", "completion": 3}', "'completion' is a number; expected text"),
    ('{"prompt": "a", "completion": ["b"]}', "'completion' is a list; expected text"),
    ('{"prompt": ["a"], "completion": "b"}', "message 0 is a string"),
    ('{"prompt": "a", "completion": ""}', "no words by the assistant"),
    ('{"messages": []}', "'messages' is an empty list"),
    ('{"messages": "hi"}', "'messages' is a string"),
    ('{"messages": [{"role": "user"}]}', "message 0 is an object with .'role'."),
    ('{"messages": [{"role": "human", "content": "x"}]}', "message 0 has role 'human'"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "message 0 has role"),
    ('{"messages": [{"role": "user", "content": null}]}', "message 0: 'content' is null"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no words by the assistant"),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
        "message 1 is from system",
    ),
    (
        '{"instruction": "a", "Input": "c", "output": "b"}',
        "column 'Input' beside 'instruction' is not read.*did you mean 'input'.*ignore Input",
    ),
    (
        '{"messages": [{"role": "user", "content": "a", "weigth": 0}]}',
        "message 0: field 'weigth' of user is not read.*'weight'",
    ),
    ('{"prompt": "a", "completion": "b", "history": ["c"]}', "'history' is .'c'.; expected a list of"),
    ('{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "'weight' is 1, but only the assistant's"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "'weight' is 0.5; expected 0 or 1"),
    ('{"messages": [{"role": "assistant", "content": "a", "train": 0}]}', "'train' is 0; expected true or false"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": false}]}', "contradict each other"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "no words by the assistant"),
    ('{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}', "field 'tool_calls' of user is not read"),
    ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}', "a call is an object with .'name'."),
    (
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}]}',
        "the arguments of 'f' is a string; expected an object",
    ),
    ('{"messages": [{"from": "gpt", "value": "a", "role": "user"}]}', "expected one of the two"),
    ('{"prompt": "a", "completion": "b", "tools": {"a": 1}}', "'tools' is an object with .'a'.; expected a list"),
    ('{"prompt": "a", "completion": "b", "tools": [1]}', "'tools' holds a number"),
    ('{"prompt": "a", "completion": "b", "tools": [{"name": "\\ud800"}]}', "'tools' has the lone surrogate"),
    ('{"prompt": "a", "completion": "b", "chat_template_kwargs": {"messages": 1}}', "sets 'messages'"),
    ('{"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": "\\ud800"}}', "lone surrogate"),
    ('{"messages": [{"role": "system", "content": "a"}], "system": "b"}', "remove one of the two"),
    ('{"prompt": "a", "completion": " \\n"}', "no words by the assistant"),
    ('{"prompt": "a", "completion": "b", "tools": ' + "[" * 90 + "]" * 90 + "}", "nested deeper than 64"),
    ('{"prompt": "a", "completion": "\\ud800"}', "lone surrogate"),
    ('{"prompt": "a", "completion": "' + "b " * 99 + '"}', r"\d+ tokens, but a row holds T=32; raise T"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_named(tok, tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        sft_rows(read_rows(str(path)), tok, 32, 0)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def examples(n=80):
    rng = np.random.default_rng(0)
    return [(f"f:{i}", {"prompt": f"q {i}", "completion": "answer " * int(rng.integers(1, 9))}) for i in range(n)]


@pytest.mark.parametrize("pack", [True, False])
def test_every_example_is_there_once_and_whole(tok, pack):
    T = 64
    sft = sft_rows(examples(), tok, T, 3, pack=pack)
    packed = []
    for i, row in enumerate(sft.rows):
        assert row["row"] == i
        assert {k: (v.shape, v.dtype.name) for k, v in row.items()} == {
            **dict.fromkeys(("ids", "targets", "segments", "positions"), ((T,), "int32")),
            "weights": ((T,), "float32"),
            "row": ((), "int64"),
        }
        assert row["weights"][row["segments"] == 0].sum() == 0
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            assert (row["positions"][here] == np.arange(here.sum())).all()
            packed.append(tuple(zip(*(row[k][here].tolist() for k in ("ids", "targets", "weights")), strict=True)))
    expected = []
    for where, row in examples():
        ids, weights = encode_example(chat_of(row, where), tok)
        expected.append(tuple(zip(ids[:-1], ids[1:], map(float, weights[1:]), strict=True)))
    assert sorted(packed) == sorted(expected)
    assert sft.examples == 80
    assert sft.tokens == sum(map(len, expected))
    assert sft.target_tokens == sum(w for example in expected for *_, w in example)
    if pack:
        assert len(sft.rows) <= math.ceil(1.25 * sft.tokens / T)
    else:
        assert len(sft.rows) == 80


def test_stream_is_seeded_and_reshuffled(tok):
    def order(seed, start=0):
        sft = sft_rows(examples(), tok, 64, seed)
        n = len(sft.rows)
        return [int(sft.train[i]["row"]) for i in range(start * n, start * n + n)], sft.digest

    assert order(1) == order(1)
    assert order(1)[1] != order(2)[1]
    assert order(1)[0] != order(1, start=1)[0]
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    rows = [[("f:1", {"messages": [turns[0], turns[1] | weight, *turns[2:]]})] for weight in ({}, {"weight": 0})]
    assert len({sft_rows(row, tok, 64, 1).digest for row in rows}) == 2, "the same tokens with other targets"
    assert sorted(order(1)[0]) == sorted(order(1, start=1)[0])


def test_no_rows(tok):
    with pytest.raises(InputError, match="no rows"):
        sft_rows([], tok, 64, 0)
