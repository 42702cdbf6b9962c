"""Chat templates give HF's ids and masks, and a hostile one gives one line."""

import dataclasses
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from graftax import InputError
from graftax.data.columns import Columns, chat_of
from graftax.data.errors import RowErrors
from graftax.data.sft import encode_example, encode_examples, render_prompt, render_prompts, sft_rows
from graftax.data.tasks.file_task import row_of
from graftax.data.tokenizers import chat, chat_worker, load_tokenizer, train_tokenizer
from graftax.train.choices import answer_continuations
from graftax.train.evaluate import longest_reply, with_rendered_replies

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"  # made by make_tokenizers.py with transformers
ASK = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
TWICE = [*ASK, *ASK]


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(GOLDEN / "qwen")


def chats(expected):
    good = [one for one in expected if "ids" in one]
    return [(f"chat {n}", one["messages"]) for n, one in enumerate(good)], good


@pytest.mark.parametrize("name", ["llama2", "llama2_json", "qwen", "llama3", "gemma"])
def test_ids_and_masks_are_those_of_transformers(name):
    """The masks are HF's for the same template with {% generation %}; here they are derived without it."""
    tok = load_tokenizer(GOLDEN / name)
    assert "generation %" not in tok.template
    rows, good = chats(json.loads((GOLDEN / name.removesuffix("_json") / "expected.json").read_text())["chats"])
    assert len(good) >= 4
    for (ids, weights), one in zip(encode_examples(rows, tok), good, strict=True):
        assert ids == one["ids"]
        assert weights == one["mask"]
    assert render_prompts(rows, tok) == [one["prompt"] for one in good]


@pytest.mark.parametrize("name", ["generation", "qwen3", "phi3"])
def test_more_templates(qwen, name):
    tok = dataclasses.replace(qwen, template=(GOLDEN / "templates" / f"{name}.jinja").read_text())
    rows, good = chats(json.loads((GOLDEN / "templates" / f"{name}.json").read_text()))
    assert render_prompts(rows, tok) == [one["prompt"] for one in good]
    for (_, turns), one, found, (ids, weights) in zip(
        rows, good, chat.render(tok, rows), encode_examples(rows, tok), strict=True
    ):
        assert ids == one["ids"]
        if name == "generation":  # HF's mask, and it leaves the token out that ends a turn
            assert weights == one["mask"]
            continue
        words = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
        if name == "qwen3":  # the last turn has an empty thought where it had none; earlier ones lose theirs
            words = [re.sub("(?s)^<think>.*</think>\\s*", "", one) for one in words[:-1]] + words[-1:]
            last = words[-1].replace("<think>hm</think>", "<think>\nhm\n</think>\n\n")
            words[-1] = last if "<think>" in last else "<think>\n\n</think>\n\n" + last.lstrip("\n")
        assert [found.text[a:b] for a, b in found.spans] == words


def test_the_token_that_ends_a_turn_stops():
    stops = {name: load_tokenizer(GOLDEN / name) for name in ("llama2", "qwen", "llama3", "gemma")}
    bare = {name: dataclasses.replace(tok, ends=(tok.eos,)) for name, tok in stops.items()}
    ids = {"llama2": (2,), "qwen": (402,), "llama3": (381, 384), "gemma": (1, 6)}
    assert {name: tok.stops for name, tok in bare.items()} == ids
    assert stops["qwen"].stops == (402, 400)  # generation_config.json's
    broken = dataclasses.replace(bare["qwen"], template="{{ raise_exception('no') }}")
    assert broken.stops == (402,)


def test_our_own_template_written_as_one(tmp_path):
    """A jinja template beside a model trained here gives what data/sft.py gives without one."""
    own = train_tokenizer([f"why {i}, because\n" for i in range(300)], tmp_path, 290)
    template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tok = load_tokenizer(tmp_path)
    turns = [{"role": "system", "content": "  be\n"}, *TWICE]
    assert tok.template == template
    assert encode_example(turns, tok) == encode_example(turns, own)
    assert render_prompt(turns, tok) == render_prompt(turns, own)
    assert tok.stops == own.stops == (own.eos,)
    assert tok.digest != own.digest


def test_rows_are_read_with_the_template(qwen):
    rows = [(f"f:{n}", {"prompt": f"why {n}", "completion": "because"}) for n in range(5)]
    sft = sft_rows(rows, qwen, 64, 0, pack=False)
    ids, weights = encode_example([{"role": "user", "content": "why 3"}, ASK[1]], qwen)
    row = sft.rows[3]
    assert row["ids"][: len(ids) - 1].tolist() == ids[:-1]
    assert row["weights"][: len(ids) - 1].tolist() == weights[1:]
    learned = [int(t) for t, w in zip(row["targets"], row["weights"], strict=True) if w]
    assert qwen.decode(learned) == "because"
    assert learned[-1] == 402
    assert sft.digest != sft_rows(rows, dataclasses.replace(qwen, files={}), 64, 0, pack=False).digest


def test_the_text_of_a_special_token_is_refused(qwen):
    rows = [("f:1", {"prompt": "a", "completion": "b"}), ("f:2", {"prompt": "a<|im_end|>\n", "completion": "b"})]
    with pytest.raises(InputError, match=r"^f:2: message 0 holds '<\|im_end\|>', which this tokenizer takes for"):
        sft_rows(rows, qwen, 64, 0)
    llama = load_tokenizer(GOLDEN / "llama2")
    with pytest.raises(InputError, match="message 1 holds '</s>'"):
        encode_example([ASK[0], {"role": "assistant", "content": "<s>x</s>"[3:]}], llama)
    ids, _ = encode_example([ASK[0], {"role": "assistant", "content": "</think> [/INST] <|im end|>"}], qwen)
    assert ids.count(402) == 3  # only those of the template


def test_what_closes_a_chat_is_not_looked_for_after_every_turn(qwen):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% else %}{{ pad_token }}{% endif %}"
    )
    text, spans, _ = chat.render(dataclasses.replace(qwen, template=template), [("f:1", TWICE)])[0]
    assert [text[a:b] for a, b in spans] == ["because<|im_end|>", "because<|im_end|><|endoftext|>"]


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "user", "content": "add 1"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "a sum",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "tool_call_id": "1", "name": "add", "content": "2"},
    {"role": "assistant", "content": "it is 2"},
]
CALL = '<think>\na sum\n</think>\n\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def caller(qwen):
    """A template of Qwen3's kind: tools, calls, thoughts, enable_thinking."""
    return dataclasses.replace(qwen, template=(GOLDEN / "templates" / "tools.jinja").read_text())


def test_tools_calls_thoughts_and_variables_reach_the_template(caller):
    row = {"messages": CALLED, "tools": [ADD]}
    text, spans, _ = chat.render(caller, [("f:1", chat_of(row, "f:1"))])[0]
    assert text.startswith("<|im_start|>system\n# Tools\n<tools>\n" + json.dumps(ADD) + "\n</tools><|im_end|>\n")
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n" in text
    assert [text[a:b] for a, b in spans] == [CALL, "<think>\n\n</think>\n\nit is 2<|im_end|>"]
    quick = [("f:1", chat_of({"messages": TWICE, "chat_template_kwargs": {"enable_thinking": False}}, "f:1"))]
    prompt = chat.render(caller, quick, add_generation_prompt=True)[0].text
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    text, spans, _ = chat.render(caller, quick)[0]  # the thought is there before the last reply alone
    assert [text[a:b] for a, b in spans] == ["because<|im_end|>"] * 2
    sft = sft_rows([("f:1", row)], caller, 512, 0)
    for other in (row | {"tools": [ADD, ADD]}, row | {"chat_template_kwargs": {"enable_thinking": True}}):
        assert sft_rows([("f:1", other)], caller, 512, 0).digest != sft.digest


@pytest.mark.parametrize("name", ["tools", "generation"])
def test_a_turn_that_is_context_is_no_target(qwen, name):
    tok = dataclasses.replace(qwen, template=(GOLDEN / "templates" / f"{name}.jinja").read_text())
    turns = [ASK[0], {"role": "assistant", "content": "wrong", "weight": 0}, *ASK]
    text, spans, _ = chat.render(tok, [("f:1", chat_of({"messages": turns}, "f:1"))])[0]
    assert "wrong" in text
    assert [re.sub("<.*?>|\\s", "", text[a:b]) for a, b in spans] == ["because"]


def test_the_end_of_a_call_is_behind_its_last_word(qwen):
    """Where a special token announces calls (Mistral), or stands between them (DeepSeek)."""
    template = (
        "{{ tools }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.tool_calls %}"
        "<|endoftext|>{{ m.reasoning_content }}{% for c in m.tool_calls %}{{ c.function.name }}<|im_start|>"
        "{{ c.function.arguments|tojson }}<|endoftext|>{% endfor %}<|im_end|>{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    two = CALLED[1] | {"tool_calls": CALLED[1]["tool_calls"] * 2}
    row = {"messages": [CALLED[0], two, *CALLED[2:]]}
    text, spans, _ = chat.render(dataclasses.replace(qwen, template=template), [("f:1", chat_of(row, "f:1"))])[0]
    call = 'add<|im_start|>{"a": 1}<|endoftext|>'
    assert [text[a:b] for a, b in spans] == [f"<|endoftext|>a sum{call}{call}<|im_end|>", "it is 2<|im_end|>"]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"tools": [ADD]}, "tools"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ({"messages": [ASK[0], ASK[1] | {"reasoning_content": "hm"}]}, "reasoning_content"),
        ({"messages": [ASK[0] | {"name": "bob"}, ASK[1]]}, "name"),
        ({"messages": [ASK[0], ASK[1] | {"tool_calls": CALLED[1]["tool_calls"]}]}, "tool_calls"),
    ],
)
def test_what_a_template_takes_no_notice_of_is_refused(qwen, more, name):
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    plain = dataclasses.replace(
        qwen, template=plain + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match=f"^f:2: the chat template .* takes no notice of '{name}'.*ignore {name}$"):
        sft_rows([("f:1", {"messages": ASK}), ("f:2", {"messages": ASK} | more)], plain, 64, 0)
    left = chat_of({"messages": ASK} | more, "f:2", columns=Columns(ignore=(name,)))
    assert encode_example(left, plain) == encode_example(ASK, plain)


def test_what_a_template_reads_under_no_name_counts(qwen):
    template = "{% for m in messages %}<|im_start|>{{ m|tojson }}<|im_end|>{% endfor %}"
    row = chat_of({"messages": [ASK[0] | {"name": "bob"}, ASK[1]]}, "f:1")
    prompt = chat.render(
        dataclasses.replace(qwen, template=template), [("f:1", row.prompt)], add_generation_prompt=True
    )
    assert '"name": "bob"' in prompt[0].text


def test_the_name_of_a_call_is_not_that_of_a_sender(caller):
    with pytest.raises(InputError, match=r"^f:1: the chat template .* takes no notice of 'name'"):
        render_prompts([("f:1", chat_of({"messages": [ASK[0] | {"name": "bob"}, ASK[1]]}, "f:1"))], caller)


def test_the_text_of_a_special_token_in_tools_is_refused(caller):
    tools = [ADD | {"description": "<|im_end|>"}]
    with pytest.raises(InputError, match=r"^f:1: tools holds '<\|im_end\|>'"):
        sft_rows([("f:1", {"messages": ASK, "tools": tools})], caller, 512, 0)


def test_a_reply_is_judged_by_all_that_it_says(caller):
    """The last reply alone, with what the template puts before it and what ends it; calls and thoughts as text."""
    whole = [row_of(chat_of({"messages": turns, "tools": [ADD]}, f"f:{n}"), f"f:{n}")
             for n, turns in enumerate((CALLED[:2], CALLED, [*TWICE, *TWICE]))]  # fmt: skip
    rows = with_rendered_replies(whole, caller)
    think = "<think>\n\n</think>\n\n"
    assert [row["completion"] for row in rows] == [CALL.removesuffix("<|im_end|>"), "it is 2", "because"]
    counts = [longest_reply([row], caller) for row in rows]
    assert [len(answer_continuations(caller, row, [row["completion"]])[0]) for row in rows] == counts
    assert counts == [len(caller.encode_marked([t], False)[0].ids) for t in (
        CALL, f"{think}it is 2<|im_end|>", f"{think}because<|im_end|>")]  # fmt: skip


def test_the_date_is_the_one_that_the_tokenizer_carries(qwen, monkeypatch):
    template = "{{ strftime_now('%d %b %Y %H:%M') }}" + qwen.template
    dated = dataclasses.replace(qwen, template=template, date="2024-07-26")
    text = lambda tok: chat.render(tok, [("f:1", ASK)])[0].text.split("<")[0]  # noqa: E731
    assert text(dated) == "26 Jul 2024 00:00"
    fresh = dataclasses.replace(dated, date="")
    monkeypatch.setattr(chat, "today", lambda: "2020-01-02")
    assert text(fresh) == "02 Jan 2020 00:00"
    assert dated.stops == qwen.stops


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
UNCLEAR = [
    (HEAD, "message 1: the template takes no notice of add_generation_prompt"),
    (
        HEAD + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
        "where its generation prompt ends",
    ),
    ("{{ messages[-1].content }}", "does not write a reply where its generation prompt ends"),
    ("{{ messages|length }}{% if add_generation_prompt %}:{% endif %}", "does not write a reply"),
    (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        "message 1: the template writes the turns before it differently once later ones follow",
    ),
    (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if not loop.last and m.role == 'assistant' %}(cut)"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        "message 1: the template writes this turn differently once later ones follow",
    ),
    ("{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ 'ab' + m() }}", "inside a macro or a filter"),
    ("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}", "marks no words"),
]


@pytest.mark.parametrize(("template", "message"), UNCLEAR)
def test_a_mask_that_would_be_a_guess_is_refused(qwen, template, message):
    with pytest.raises(InputError, match=message):
        chat.render(dataclasses.replace(qwen, template=template), [("f:1", TWICE)])


def test_an_empty_reply_without_a_generation_prompt_is_refused(qwen):
    turns = [*ASK, ASK[0], {"role": "assistant", "content": ""}]
    special = re.compile(re.escape("<|im_end|>") + "|" + re.escape("<|im_start|>"))
    _, render = chat_worker.renderer({"template": HEAD, "variables": {}, "date": "2026-11-29", "seconds": 0})
    with pytest.raises(chat_worker.Refused, match="takes no notice"):
        chat_worker.derived_spans(render, turns[2:], render(turns[2:], False), special, [False, True])


def test_plain_text_markers(qwen):
    """Without special tokens a turn ends where its words do, a character of several tokens included."""
    template = (
        "{% for m in messages %}{{ m.role|upper }}: {{ m.content|trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    turns = [*ASK, ASK[0], {"role": "assistant", "content": " so \U0001f642\n"}]
    tok = dataclasses.replace(qwen, template=template)
    text, spans, _ = chat.render(tok, [("f:1", turns)])[0]
    assert [text[a:b] for a, b in spans] == ["because", "so \U0001f642"]
    ids, weights = encode_example(turns, tok)  # the space before a word is in its token
    assert tok.decode([i for i, w in zip(ids, weights, strict=True) if w]) == " because so \U0001f642"
    closed = template.replace(
        "{% if", "{% if not add_generation_prompt %}{{ eos_token }}{{ pad_token }}{% endif %}{% if"
    )
    text, spans, _ = chat.render(dataclasses.replace(qwen, template=closed), [("f:1", ASK)])[0]
    assert [text[a:b] for a, b in spans] == ["because\n\n<|im_end|><|endoftext|>"]


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    (LOOP, "not done after 0.3 seconds"),
    ("{{ 7 ** (7 ** 9) }}", "not done after 0.3 seconds"),
    ("{{ 'a' * 10 ** 10 }}", "too much memory"),
    ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "too much memory"),
    ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "90000000 characters come of"),
    ("{{ ''.__class__.__mro__ }}", "reaches for what a template may not .attribute '__class__' of a str"),
    ("{{ messages.__class__ }}", "reaches for what a template may not"),
    ("{{ ''|attr('__class__') }}", "reaches for what a template may not"),
    ("{{ '{0.__class__}'.format(1) }}", "reaches for what a template may not"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "reaches for what a template may not"),
    ("{{ dict.__init__.__globals__ }}", "reaches for what a template may not"),
    ("{% set n = namespace(__class__=1) %}", "reaches for what a template may not"),
    ("{% set _ = messages.append(1) %}", "reaches for what a template may not"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ raise_exception('roles\nmust \x1b[2Jalternate') }}", r"roles must \?\[2Jalternate$"),
    ("{{ nothing.at.all }}", "'nothing' is undefined"),
]


@pytest.mark.parametrize(("template", "message"), HOSTILE)
def test_a_hostile_template_is_one_line(qwen, monkeypatch, template, message):
    monkeypatch.setattr(chat, "SECONDS", 0.3 if "0.3 seconds" in message else 30)
    monkeypatch.setattr(chat, "MEMORY", 1 << 28)
    tok = dataclasses.replace(qwen, template="{% if messages[0].content == 'x' %}" + template + "{% endif %}")
    rows = [("f:1", ASK), ("f:7", [{"role": "user", "content": "x"}, *ASK])]
    with pytest.raises(InputError, match=message) as caught, ThreadPoolExecutor(1) as pool:
        pool.submit(chat.render, tok, rows, add_generation_prompt=True).result()  # where no signal handler works
    where = "chat template " if "7 **" in template else "f:7: chat template "  # jinja2 computes constants at once
    assert str(caught.value).startswith(where + str(GOLDEN / "qwen" / "tokenizer_config.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "^chat template .*: line 1: Expected an expression"),
        ("a\n{% generation %}", "line 2: Unexpected end of template"),
        ("{{ 1|nofilter }}", "line 1: No filter named 'nofilter'"),
        ("{{ " + "(" * 9000 + ")" * 9000 + " }}", "RecursionError"),
    ],
)
def test_a_template_that_does_not_compile(qwen, template, message):
    with pytest.raises(InputError, match=message):
        chat.render(dataclasses.replace(qwen, template=template), [("f:1", ASK)])


@pytest.mark.parametrize("words", ["{{ raise_exception('no') }}", "{{ 'a' * 10 ** 10 }}", "{{ ''.__class__ }}", LOOP])
def test_one_refused_chat_costs_no_other(qwen, monkeypatch, words):
    """Whether the template raises, or the process that renders is killed, or a message holds a special token."""
    monkeypatch.setattr(chat, "SECONDS", 0.15)
    words = "{% if 'x' in messages[0].content %}" + words + "{% endif %}"
    tok, texts = dataclasses.replace(qwen, template=words + qwen.template), ["a", "x", "b", "<|im_end|>", "x", "c"]
    rows = [(f"f:{n}", [{"role": "user", "content": text}, ASK[1]]) for n, text in enumerate(texts)]
    bad, good = RowErrors("skip", 1.0), [0, 2, 5]
    found = list(encode_examples(rows, tok, bad))
    assert [n for n, (ids, _) in enumerate(found) if ids] == good
    assert [found[n] for n in good] == list(encode_examples([rows[n] for n in good], qwen))
    assert {line.split(":")[2] for line in bad.messages} == {"1", "3", "4"}
    assert bad.left_out == 3
    assert [n for n, ids in enumerate(render_prompts(rows, tok, RowErrors("skip", 1.0))) if ids] == good
    with pytest.raises(InputError, match=r"^f:3: message 0 holds"):
        list(encode_examples(rows, tok))
    if "range" in words:  # a process that is killed takes its seconds: no more of them than the cap allows
        bad = RowErrors("skip", 0.001)
        bad.rows = 1000
        with pytest.raises(InputError, match=r"2 of 1000 rows left out.*more than --data\.max-bad-rows"):
            list(encode_examples([*rows[:2], *rows[1:2] * 99], tok, bad))
    with pytest.raises(InputError, match=r"^chat template .*: line 1"):
        list(encode_examples(rows, dataclasses.replace(qwen, template="{% if %}"), RowErrors("skip", 1.0)))


def test_gemma_has_no_system_role_and_the_row_is_named():
    tok = load_tokenizer(GOLDEN / "gemma")
    row = {"messages": [{"role": "system", "content": "x"}, *ASK]}
    with pytest.raises(InputError, match=r"^f:2: chat template .*chat_template\.json: System role not supported$"):
        sft_rows([("f:1", {"prompt": "a", "completion": "b"}), ("f:2", row)], tok, 64, 0)
    with pytest.raises(InputError, match="Conversation roles must alternate"):
        render_prompt([ASK[0], ASK[0]], tok)


def test_the_limit_is_of_one_rendering_not_of_all(qwen, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    before = os.times().children_user
    assert len(chat.render(qwen, [("f", TWICE * 4)] * 800)) == 800
    assert os.times().children_user - before > 0.1


def test_the_environment_is_that_of_transformers():
    template = (
        "{{ {'b': '<\u00e9>', 'a': 1}|tojson }}{{ dict(a=1) }}{{ tools is none }}{{ strftime_now('%%') }}\n"
        "    {% set n = namespace(a=1) %}\n{% set n.a = 2 %}{{ n.a }}{{ x }}\n"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    header = {"template": template, "variables": {"x": "<s>"}, "date": "2026-11-29", "seconds": 0}
    _, render = chat_worker.renderer(header)
    assert render([], False) == '{"b": "<\u00e9>", "a": 1}{\'a\': 1}True%\n2<s>\n1'
