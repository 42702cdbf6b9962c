"""The tokenizer is exact, deterministic, and never makes a special token out of text."""

import json
import random

import pytest
import tokenizers
from graftax import InputError
from graftax.data.tokenizer import SPECIAL, load_tokenizer, train_tokenizer
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
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"\xff garbage")
        with pytest.raises(InputError, match=f"{name}: not a "):
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
