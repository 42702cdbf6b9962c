"""The tokenizer is exact, deterministic, and never makes a special token out of text."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import jinja2
import pytest
import sentencepiece
import tokenizers
from graftax import InputError
from graftax.data.sft import encode_example, render_prompt
from graftax.data.tokenizers import SPECIAL, add_special, add_tokens, load_tokenizer, train_tokenizer
from graftax.data.tokenizers.template import default_template
from graftax.train.runs.tokenizer_files import write_tokenizer
from tokenizers import decoders, models, pre_tokenizers

WORDS = ["".join(random.Random(n).choices("abcdefghij", k=6)) for n in range(200)]
TEXTS = [
    f"{' '.join(WORDS[i % 200 :][:5])} def f{i}(x):\n    return x + {i}\n\tThe  quick brown fox, number {i}, jumps.\r\n"
    for i in range(300)
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tok"), 400)


AWKWARD = [
    "",
    " ",
    "  lead",
    "trail   ",
    "\n\n\n",
    "\ta\t\tb",
    "a\r\nb\r",
    "x" + " " * 100 + "y",
    "\0",
    "a\0b",
    "<unk>",
]
AWKWARD += [
    "\u2581",
    "a\u2581 \u2581b\u2581",
    "\ufeffbom",
    "\u2028\u00a0\u3000",
    "<0x0A>",
    "12345 6",
    "\ufb01 \u210c e\u0301",
]
AWKWARD += ["\U0001f642\U0001f469\u200d\U0001f469 \u00e9"]


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_round_trip_of_random_unicode(tok):
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x2FFF), (0x2570, 0x2590), (0xE000, 0x10FFFF), (0x20, 0x21), (9, 14)]
    texts = []
    for _ in range(300):
        points = [rng.randint(*rng.choice(ranges)) for _ in range(rng.randint(0, 60))]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    encoded = tok.encode_batch(texts)
    assert [tok.decode(ids) for ids in encoded] == texts
    assert encoded == [tok.encode(text) for text in texts]


def test_text_gives_no_special_token(tok):
    ids = tok.encode("".join(SPECIAL) + "<s></s><unk>")
    assert not set(ids) & set(tok.special.values())
    assert set(SPECIAL) == set(tok.special)
    assert tok.decode([tok.bos, *tok.encode("hi"), tok.end, tok.eos, tok.pad]) == "hi"
    assert len({tok.bos, tok.eos, tok.pad}) == 3


def test_training_is_deterministic_whatever_the_order_and_the_bound(tok, tmp_path):
    assert train_tokenizer(TEXTS[::-1], tmp_path / "a", 400).digest == tok.digest
    texts = [text * (1 + i % 7) for i, text in enumerate(TEXTS)]  # a long one that goes leaves room for several
    digests = set()
    for seed in range(4):
        random.Random(seed).shuffle(texts)
        digests.add(train_tokenizer(texts, tmp_path / "b", 330, sample_bytes=5000).digest)
    assert len(digests) == 1


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(path) == tok
        assert load_tokenizer(path).encode(TEXTS[0]) == tok.encode(TEXTS[0])
    # What runs have on record does not change, whatever is beside the model.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).digest == hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
    assert tok.prompt("hi") == [tok.bos, *tok.encode("hi")]
    assert tok.stops == (tok.eos,)
    assert not tok.template


def test_what_cannot_be_is_one_line(tok, tmp_path):
    with pytest.raises(InputError, match=r"too few for 50000 pieces; give more text, or ask for at most \d+$"):
        train_tokenizer(TEXTS, tmp_path, 50_000)
    with pytest.raises(InputError, match="100 pieces cannot hold"):
        train_tokenizer(TEXTS, tmp_path, 100)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer([], tmp_path, 400)
    with pytest.raises(InputError, match=r"no tokenizer\.model and no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "none.model")
    for name, message in (("tokenizer.model", "not a whole SentencePiece model"), ("tokenizer.json", "not valid JSON")):
        (tmp_path / name).write_bytes(b"\xff garbage")
        with pytest.raises(InputError, match=f"{name}: {message}"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(InputError, match="token id 400: outside the vocabulary of 400"):
        tok.decode([3, 400])


def hugging_face(folder, config):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>"])
    model.enable_truncation(4)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_hugging_face_file(tmp_path):
    tok = hugging_face(tmp_path, {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    assert (tok.bos, tok.eos, tok.pad, tok.vocab_size) == (256, 257, 257, 258)
    text = "hello </s> <s>\n\t é🙂"
    assert tok.decode(tok.encode(text)) == text
    assert not {256, 257} & set(tok.encode(text))
    assert tok.decode([tok.bos, *tok.encode("a"), tok.eos]) == "a"
    copy = load_tokenizer(tok.save(tmp_path / "copy"))
    assert copy == tok


def test_hugging_face_file_without_eos(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: names no eos token"):
        hugging_face(tmp_path, {"eos_token": None})


GOLDEN = Path(__file__).parent / "golden" / "tokenizers"  # made by make_tokenizers.py with transformers
FAMILIES = ["llama2", "llama2_legacy", "llama2_json", "qwen", "qwen_slow", "llama3", "gemma"]


def family(name, tmp_path):
    """(the folder, what transformers gives for it)."""
    folder = GOLDEN / name
    if name == "llama2_legacy":  # the same model, with the dummy prefix after special tokens too
        folder = shutil.copytree(GOLDEN / "llama2", tmp_path / name)
        edit(folder / "tokenizer_config.json", legacy=True)
    if name == "qwen_slow":
        folder = shutil.copytree(GOLDEN / "qwen", tmp_path / name)
        (folder / "tokenizer.json").unlink()
    expected = {"llama2_json": "llama2", "qwen_slow": "qwen"}.get(name, name)
    return folder, json.loads((GOLDEN / expected / "expected.json").read_text())


def edit(file, **changes):
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name, tmp_path):
    folder, expected = family(name, tmp_path)
    tok = load_tokenizer(folder)
    assert tok.vocab_size == expected["vocab_size"]
    for text, ids, prompt in expected["texts"]:
        assert tok.encode(text) == ids, text
        assert tok.prompt(text) == prompt, text
        assert not set(ids) & set(tok.special.values())
        kept = text if name == "llama3" else text.replace("e\u0301", "\u00e9")  # NFC
        if "llama2" in name or name == "gemma":
            kept = text.replace("\u2581", " ")  # which is how they write one
        if "llama2" in name:
            kept = kept.removeprefix(" ")  # HF does not tell it from the dummy prefix
        assert tok.decode(ids) == kept
    assert tok.encode_batch([text for text, *_ in expected["texts"]]) == [ids for _, ids, _ in expected["texts"]]


def test_what_a_folder_says(tmp_path):
    qwen, llama3 = load_tokenizer(GOLDEN / "qwen"), load_tokenizer(GOLDEN / "llama3")
    assert (qwen.bos, qwen.eos, qwen.pad, qwen.ends) == (402, 402, 400, (402, 400))
    assert qwen.names == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert (llama3.bos, llama3.eos, llama3.pad) == (380, 381, 381)
    assert llama3.template.startswith("{% set loop_messages")  # the default one of a list
    assert load_tokenizer(GOLDEN / "gemma").template.startswith("{{ bos_token }}")  # chat_template.json
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "old")
    config = folder / "tokenizer_config.json"
    edit(config, eos_token=..., bos_token=...)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eot_id|>"}}')
    (folder / "chat_template.jinja").write_text("{{ 1 }}")  # before any other
    tok = load_tokenizer(folder)
    assert (tok.bos, tok.eos, tok.template) == (384, 384, "{{ 1 }}")
    edit(config, chat_template=..., tokenizer_class="GPT2TokenizerFast")
    (folder / "chat_template.jinja").unlink()
    tok = load_tokenizer(folder)
    assert (tok.template, tok.template_file) == (default_template(tok.special), "")


def test_gpt2_is_named_by_config_json_alone(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "qwen" / name, tmp_path)
    vocab = tmp_path / "vocab.json"
    edit(vocab, **{"<|endoftext|>": 400})
    with pytest.raises(InputError, match="names no eos token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tok = load_tokenizer(tmp_path)
    assert (tok.bos, tok.eos, tok.vocab_size, tok.file) == (400, 400, 401, "vocab.json")
    assert tok.prompt("hello") == tok.encode("hello")
    assert tok.decode(tok.encode(" It's\n\n 12 <|endoftext|>")) == " It's\n\n 12 <|endoftext|>"
    assert load_tokenizer(tok.save(tmp_path / "copy").parent) == tok  # without config.json


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_carried_and_special_tokens_added(name, tmp_path):
    folder, _ = family(name, tmp_path)
    tok = load_tokenizer(folder)
    path = tok.save(tmp_path / "a")
    for file in path.parent.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()
    for again in (load_tokenizer(path), load_tokenizer(path.parent)):
        assert again == tok
        assert again.digest == tok.digest
    more = add_special(tok, ["<|tool|>", "<|call|>", "<|tool|>"])
    copy = load_tokenizer(more.save(tmp_path / "b"))
    assert copy == more
    assert copy.digest != tok.digest
    new = {k: i for k, i in copy.special.items() if k not in tok.special}
    assert new == {"<|tool|>": tok.vocab_size, "<|call|>": tok.vocab_size + 1}
    assert copy.vocab_size == tok.vocab_size + 2
    assert copy.prompt("x<|call|>").pop() == new["<|call|>"]
    assert copy.encode("x<|call|>") == tok.encode("x<|call|>")
    assert add_special(copy, ["<|call|>"]) is copy
    assert add_special(copy, ["<|third|>"]).special["<|third|>"] == copy.vocab_size
    for bad, message in ((" ", "not blank"), ("a", "already an ordinary piece")):
        with pytest.raises(InputError, match=message):
            add_special(tok, [bad])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_added_token_is_made_of_its_text(name, tmp_path):
    """In text, in a message and in a prompt; but a token that the chat is written with is not."""
    tok = load_tokenizer(family(name, tmp_path)[0])
    marks = ("<|im_start|>", "<|eot_id|>", "[INST]", "<start_of_turn>")
    mark = next((m for m in marks if m in tok.template), "<|user|>")
    more, ids = add_tokens(tok, ["<|tool|>", mark, "<|tool|>"])
    new = ids["<|tool|>"]
    assert new == tok.vocab_size
    more = load_tokenizer(more.save(tmp_path / "b").parent)
    assert more.encode("x<|tool|>y").count(new) == more.prompt("x<|tool|>y").count(new) == 1
    assert more.decode([new]) == "<|tool|>"
    assert ids[mark] not in more.encode(f"x{mark}y")
    assert mark in more.special
    turns = [{"role": "user", "content": "x<|tool|>"}, {"role": "assistant", "content": "<|tool|>y"}]
    assert encode_example(turns, more)[0].count(new) == 2
    assert add_tokens(more, ["<|tool|>"]) == (more, {"<|tool|>": new})
    with pytest.raises(InputError, match="already an ordinary piece"):
        add_tokens(tok, ["a"])
    if name in ("qwen", "llama3"):
        with pytest.raises(InputError, match="would not decode it to its text"):
            add_tokens(tok, ["<\u00e9>"])


@pytest.mark.parametrize("name", ["llama2_json", "qwen"])
def test_the_default_chat_format_is_written_as_it_was_trained(name, tmp_path):
    """For a tokenizer without a template, as jinja2 and tokenizers, which transformers uses, render it."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    edit(folder / "tokenizer_config.json", chat_template=...)
    for file in ("chat_template.jinja", "chat_template.json", "generation_config.json"):
        (folder / file).unlink(missing_ok=True)
    tok, out = load_tokenizer(folder), tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, tok, chat=True)
    turns = [
        {"role": role, "content": text} for role, text in (("user", "\na  b"), ("assistant", " c\n"), ("user", "d"))
    ]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (out / "chat_template.jinja").read_text()
    )
    model = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for chat, asked, ids in (
        (turns[:2], False, encode_example(turns[:2], tok)[0]),
        (turns, True, render_prompt(turns, tok)),
    ):
        text = template.render(messages=chat, add_generation_prompt=asked, **tok.names)
        assert model.encode(text, add_special_tokens=False).ids == ids
    both = encode_example(turns[:2], tok)
    assert encode_example(turns[:2], load_tokenizer(out)) == both
    learned = [i for i, w in zip(*both, strict=True) if w]
    assert (learned[-1], tok.decode(learned).strip()) == (tok.eos, "c")
    said = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert said == tok.eos


SAID_TWICE = {  # files: the template that transformers 5.24 takes, or why none
    "jinja, config": ({"chat_template.jinja": "J", "config": "C"}, "J"),
    "config, json": ({"chat_template.json": "N", "config": "C"}, "C"),
    "default, jinja": ({"additional_chat_templates/default.jinja": "D", "chat_template.jinja": "J"}, "D"),
    "default, config": ({"additional_chat_templates/default.jinja": "D", "config": "C"}, "D"),
    "other, jinja": ({"additional_chat_templates/tool.jinja": "A", "chat_template.jinja": "J"}, "J"),
    "other, config": ({"additional_chat_templates/tool.jinja": "A", "config": "C"}, InputError),
    "list, jinja": ({"config": [{"name": "default", "template": "L"}], "chat_template.jinja": "J"}, "J"),
    "a name twice": ({"config": [{"name": "default", "template": t} for t in "KL"]}, "L"),
    "object": ({"config": {"default": "L", "rag": "R"}}, "L"),
}


@pytest.mark.parametrize(("files", "taken"), SAID_TWICE.values(), ids=SAID_TWICE)
def test_of_two_templates_the_one_of_transformers_counts(files, taken, tmp_path):
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "a")
    edit(folder / "tokenizer_config.json", chat_template=files.get("config", ...))
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        if name != "config":
            (folder / name).write_text(json.dumps({"chat_template": text}) if name.endswith(".json") else text)
    if isinstance(taken, str):
        tok = load_tokenizer(folder)
        assert tok.template == load_tokenizer(tok.save(tmp_path / "b").parent).template == taken
    else:
        with pytest.raises(taken, match=r"additional_chat_templates: transformers reads .* copy the template to use"):
            load_tokenizer(folder)


def test_of_two_facts_the_one_of_transformers_counts(tmp_path):
    """Stop ids, flags of added tokens, names of tokens, and whole tokenizers."""
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "a")
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": [7, 8]}')
    assert load_tokenizer(folder).ends[1:] == tuple(
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"][1:]
    )
    (folder / "generation_config.json").unlink()
    tok = load_tokenizer(folder)
    assert tok.ends == (381, 7, 8)
    assert load_tokenizer(tok.save(tmp_path / "b").parent).ends == tok.ends  # where no config.json is
    edit(folder / "config.json", eos_token_id="2")
    with pytest.raises(InputError, match=r"config\.json: eos_token_id is '2'"):
        load_tokenizer(folder)
    (folder / "config.json").unlink()

    state = json.loads((folder / "tokenizer.json").read_text())
    token = {"content": "<A>", **dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word", "special"), False)}
    (folder / "tokenizer.json").write_text(
        json.dumps(state | {"added_tokens": [*state["added_tokens"], token | {"id": 385}]})
    )
    assert load_tokenizer(folder).encode("a <A>b") == [64, 220, 385, 65]
    listed = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in state["added_tokens"]}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed | {"385": token | {"lstrip": True}})
    (folder / "added_tokens.json").write_text('{"<B>": 386}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    tok = load_tokenizer(folder)
    assert (tok.encode("a <A>b"), tok.vocab_size, tok.eos) == ([64, 385, 65], 386, 381)
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed | {"385": token | {"special": True}})
    assert 385 not in load_tokenizer(folder).encode("a <A>b")

    qwen = shutil.copytree(GOLDEN / "qwen", tmp_path / "q")
    vocab = json.loads((qwen / "vocab.json").read_text())
    edit(qwen / "vocab.json", g=vocab["h"], h=vocab["g"])
    shutil.copy(GOLDEN / "llama2" / "tokenizer.model", qwen)
    assert load_tokenizer(qwen).encode("gh") == load_tokenizer(GOLDEN / "qwen").encode("gh")


def test_every_stop_is_written(tmp_path):
    """Also the token that ends a turn of the template, which generation_config.json lacks."""
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "a")
    (folder / "generation_config.json").write_text('{"eos_token_id": 383, "temperature": 0.6}')
    tok = load_tokenizer(folder)
    assert set(tok.stops) == {381, 383, 384}
    write_tokenizer(folder, tok, chat=True)
    said = json.loads((folder / "generation_config.json").read_text())
    assert (set(said["eos_token_id"]), said["temperature"]) == (set(tok.stops), 0.6)
    assert set(load_tokenizer(folder).stops) == set(tok.stops)
    assert not (folder / "chat_template.jinja").exists()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    write_tokenizer(folder, load_tokenizer(folder), chat=False)  # of a base that was never tuned
    assert not (folder / "chat_template.jinja").exists()


def test_digest_covers_the_template(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen", tmp_path / "q")
    before = load_tokenizer(folder)
    edit(folder / "generation_config.json", eos_token_id=400)
    assert load_tokenizer(folder).digest == before.digest
    assert load_tokenizer(folder) != before
    edit(folder / "tokenizer_config.json", chat_template="{{ 1 }}")
    assert load_tokenizer(folder).digest != before.digest


def test_add_special_to_our_own(tok, tmp_path):
    more = add_special(tok, ["<|tool|>"])
    assert more.special == tok.special | {"<|tool|>": 400}
    assert load_tokenizer(more.save(tmp_path)) == more
    assert more.encode_batch(AWKWARD) == tok.encode_batch(AWKWARD)
    assert more.decode([more.bos, *more.encode("<|tool|>"), 400]) == "<|tool|>"
    user, ids = add_tokens(tok, ["<| a tool |>"])
    assert ids == {"<| a tool |>": 400}
    assert user.encode("x<| a tool |> y").count(400) == 1
    assert user.decode(user.encode("x<| a tool |> y")) == "x<| a tool |> y"
    assert user.encode_batch(AWKWARD) == tok.encode_batch(AWKWARD)
    turns = [{"role": "user", "content": "<| a tool |>"}, {"role": "assistant", "content": "b"}]
    assert 400 in encode_example(turns, user)[0]
    assert add_tokens(user, ["<| a tool |>", "<|user|>"]) == (user, ids | {"<|user|>": user.special["<|user|>"]})


def test_a_sentencepiece_model_normalises_as_it_says(tmp_path):
    golden = json.loads((GOLDEN / "llama2" / "expected.json").read_text())["texts"]
    texts = [text for text, *_ in golden if "\u2581" not in text]
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=400, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    alone = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for tok in (alone, load_tokenizer(tmp_path)):
        assert (tok.bos, tok.eos) == (1, 2)
        assert tok.encode_batch(texts + TEXTS[:9]) == model.encode(texts + TEXTS[:9])
        assert tok.prompt("a") == [1, *model.encode("a")]


def test_merges_that_make_a_special_token_are_left_out(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama2_json", tmp_path / "leak")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"] |= {"<": 450, ">": 451, "<s": 452}
    state["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tok = load_tokenizer(folder)
    assert 1 not in tok.encode("a<s>b")
    assert 452 in tok.encode("a<s>b")
    assert tok.decode(tok.encode("a<s>b")) == "a<s>b"
    assert tok.prompt("a<s>b").count(1) == 2


def test_pieces_of_other_models_that_are_special_tokens(tmp_path):
    """A unigram model would take its special pieces before any other; a word level model cannot be kept from it."""
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *([c, -3.0] for c in "<s>/ab"), ["ab", -2.0]]
    special = [
        {"id": i, "content": pieces[i][0], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i in range(3)
    ]
    state: dict = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    state |= {"version": "1.0", "added_tokens": special}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(state | {"model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}))
    tok = load_tokenizer(tmp_path)
    assert tok.encode("ab</s>b?") == [9, 3, 6, 4, 5, 8, 0]
    assert tok.prompt("ab</s>b?") == [9, 2, 8, 0]
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    file.write_text(json.dumps(state | {"model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}}))
    with pytest.raises(InputError, match=r"the plain text '<s>' gives its special token"):
        load_tokenizer(tmp_path)


BROKEN = [
    ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON"),
    ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json: not valid JSON"),
    ("tokenizer_config.json", "[]", "expected a JSON object"),
    ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is a int; expected text"),
    (
        "tokenizer_config.json",
        '{"chat_template": [{"name": "rag", "template": ""}]}',
        r"\['rag'\]; expected one named default",
    ),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "no table of ids"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "added token 7 has no content"),
    (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"9": {"content": "<x>"}}}',
        "'<x>' is listed as id 9, but has id 385",
    ),
    ("tokenizer_config.json", "{}", "names no eos token"),
    ("tokenizer_config.json", '{"eos_token": "<|gone|>"}', "names no eos token"),
    ("special_tokens_map.json", b"\xff", r"special_tokens_map\.json: not valid JSON"),
    ("chat_template.jinja", b"\xff", r"chat_template\.jinja: not UTF-8"),
    ("chat_template.json", "nul", r"chat_template\.json: not valid JSON"),
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'; expected an id or a list"),
    ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer that transformers can load"),
]


@pytest.mark.parametrize(("file", "text", "message"), BROKEN)
def test_a_broken_folder_is_one_line(file, text, message, tmp_path):
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "x")
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_broken_slow_files_are_one_line(tmp_path):
    slow, _ = family("qwen_slow", tmp_path)
    edit(slow / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer")
    with pytest.raises(InputError, match=r"vocab\.json: not a tokenizer that transformers can load \("):
        load_tokenizer(slow)
    edit(slow / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    (slow / "merges.txt").write_text("q q\n")
    with pytest.raises(InputError, match=r"vocab\.json: not a tokenizer that transformers can load"):
        load_tokenizer(slow)
    (slow / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"vocab\.json without merges\.txt"):
        load_tokenizer(slow)
    for data in (b"\xff garbage", b""):
        (slow / "tokenizer.model").write_bytes(data)
        with pytest.raises(InputError, match=r"tokenizer\.model: not a SentencePiece model"):
            load_tokenizer(slow)
