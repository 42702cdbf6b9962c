"""Text <-> ids. SentencePiece BPE trained here, or Hugging Face's (hf_tokenizer.py); both give a Tokenizer."""

import hashlib
import heapq
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ..dialogue import ROLES
from .hf_files import BESIDE, GENERATION, MAIN, collect, read_folder

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES))
SAMPLE_BYTES = 8 << 20  # what BPE learns from: more costs time and moves few pieces
_BLOCK = "\u2581"  # SentencePiece writes a space as this character


@dataclass(frozen=True)
class Tokenizer:
    """`encode` gives no special token, whatever the text says; `decode(encode(x)) == x` if trained here.

    The fields from `template` on are a Hugging Face tokenizer's; graftax's own have none of them.
    """

    file: str  # tokenizer.model, tokenizer.json or vocab.json
    data: bytes = field(repr=False)
    vocab_size: int
    bos: int
    eos: int
    pad: int
    special: dict[str, int]
    encode_batch: Callable[[Sequence[str]], list[list[int]]] = field(repr=False, compare=False)
    _decode: Callable[[list[int]], str] = field(repr=False, compare=False)
    gaps: tuple[int, ...] = field(default=(), repr=False)  # ids below vocab_size that no token has
    template: str = field(default="", repr=False)  # of chats, in jinja2; graftax's own where the files have none
    template_file: str = field(default="", compare=False)  # which it was read from; empty: it is graftax's own
    names: dict[str, str] = field(default_factory=dict)  # {"eos_token": "</s>", ...}: what a template may write
    date: str = ""  # that a template may write, as 2026-11-29; empty: today's
    ends: tuple[int, ...] = ()  # eos, and what generation_config.json adds
    files: dict[str, bytes] = field(default_factory=dict, repr=False)  # beside the main one
    encode_marked: Callable[[Sequence[str], bool], list[Any]] | None = field(default=None, repr=False, compare=False)
    """(texts, add what HF adds) -> `tokenizers.Encoding`s, special tokens in the texts recognised."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def prompt(self, text: str) -> list[int]:
        """What a text is generated from: HF's `tokenizer(text)`; bos and `text` for graftax's own."""
        return [self.bos, *self.encode(text)] if self.encode_marked is None else self.encode_marked([text], True)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens give nothing. InputError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise InputError(f"token id {bad}: outside the vocabulary of {self.vocab_size}; wrong tokenizer?")
        return self._decode(ids)

    def has_token(self, V: int) -> np.ndarray:
        """Whether a token has each of the ids 0..V-1 [V]: a table may be longer than the vocabulary, and have gaps."""
        found = np.arange(V) < self.vocab_size
        found[[i for i in self.gaps if i < V]] = False
        return found

    @property
    def end(self) -> int:
        """The id that ends a turn in graftax's own template: eos, which a base has learnt to predict where a text ends.

        A token of its own would be one that pretraining never saw: its row of the table is like those of all unused
        pieces, and a method that leaves the table frozen (LoRA, a mask, a prompt) could not tell it from them.
        """
        return self.eos

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Every id that ends a reply: eos, those of generation_config.json, what the chat template ends a turn with."""
        if not self.template:
            return self.ends or (self.eos,)
        from .chat import turn_end

        return tuple(dict.fromkeys((*self.ends, *turn_end(self))))

    @property
    def digest(self) -> str:
        """sha256 of the file; with others beside it, of all of them but generation_config.json, which moves no id."""
        beside = {name: data for name, data in self.files.items() if name != GENERATION}
        if not beside:
            return hashlib.sha256(self.data).hexdigest()
        parts = {name: hashlib.sha256(data).hexdigest() for name, data in (beside | {self.file: self.data}).items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path | str) -> Path:
        """Write the file and those beside it into `folder`, byte for byte; returns the path of the first."""
        path = Path(folder) / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, data in (self.files | {self.file: self.data}).items():
            (path.parent / name).write_bytes(data)
        return path


def train_tokenizer(
    texts: Iterable[str], path: Path | str, vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train BPE on a bounded sample of `texts`, write it to `path`. The same texts, in any order, give the same file.

    InputError when the text is too small for `vocab_size`, or `vocab_size` too small for the text.
    """
    import sentencepiece

    sample = _sample(texts, sample_bytes)
    if not sample:
        raise InputError("tokenizer: no text to train on; at least one document that is not blank is wanted")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",  # the default destroys newlines, tabs and runs of spaces
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=list(SPECIAL[3:]),
            max_sentence_length=1 << 20,  # longer ones are left out without a word
            num_threads=2,  # written into the file, so a constant
            minloglevel=2,
        )
    except RuntimeError as e:
        raise InputError(_reason(str(e), vocab_size, sum(len(s.encode()) for s in sample))) from None
    path = Path(path)
    path = path if path.suffix == ".model" else path / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def _reason(message: str, vocab_size: int, n_bytes: int) -> str:
    if "too high" in message:
        most = message.rpartition("<= ")[2].rstrip(". ")
        few = f"tokenizer: {n_bytes} bytes of text are too few for {vocab_size} pieces"
        return f"{few}; give more text, or ask for at most {most}"
    if "smaller than required_chars" in message:
        return f"tokenizer: {vocab_size} pieces cannot hold the 256 bytes and the characters of the text; ask for more"
    return f"tokenizer: SentencePiece refused {vocab_size} pieces ({message.strip().splitlines()[-1]})"


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    """At most `limit` bytes of pieces of `texts`: those of smallest crc32, so neither order nor chance decides."""
    from ..clean import cut

    heap: list[tuple[int, str]] = []
    size, lost = 0, (-(1 << 32), "")  # the best key thrown out: nothing worse may take its room later
    for text in texts:
        for piece in cut(text, 4096):
            key = (-zlib.crc32(piece.encode()), piece)
            if key < lost:
                continue
            heapq.heappush(heap, key)
            size += len(piece.encode())
            while size > limit and len(heap) > 1:
                lost = heapq.heappop(heap)
                size -= len(lost[1].encode())
    return [piece for _, piece in sorted(heap, reverse=True)]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """From `tokenizer.model`, `tokenizer.json`, `vocab.json` with `merges.txt`, or a folder that holds one.

    In a Hugging Face folder the files beside it count: names of special tokens, added tokens, the chat template.
    InputError when something cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        # A folder may hold several (Llama 2, Qwen): tokenizer.json says most.
        found = [path / name for name in MAIN if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: no tokenizer.model and no tokenizer.json in it; graftax tokenizer trains one")
        path = found[0]
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(
            f"{path}: cannot be read ({e.strerror}); a tokenizer.model or tokenizer.json is wanted"
        ) from None
    main = "tokenizer.model" if path.suffix != ".json" else path.name if path.name in MAIN else "tokenizer.json"
    files = collect(path.parent, main)
    if main == "tokenizer.model" and _alone(data, path, files):
        return from_sentencepiece(path, data)
    from .huggingface import from_files

    return from_files(path.parent, main, data, files)


def _alone(data: bytes, path: Path, files: dict[str, bytes]) -> bool:
    """Whether SentencePiece itself reads the model: nothing of Hugging Face's is beside it, or nothing it needs."""
    if not set(files) & set(BESIDE):
        return True
    from .sentencepiece_bpe import is_bpe

    return not read_folder(path.parent, files).template and (BOS.encode() in data or not is_bpe(data, path))


def from_sentencepiece(path: Path, data: bytes) -> Tokenizer:
    """A SentencePiece model as it is; `path` is for messages."""
    import sentencepiece

    try:
        if not data:  # which it takes for a model that is not loaded yet
            raise RuntimeError
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = model.get_piece_size()
    except RuntimeError:
        raise InputError(
            f"{path}: not a whole SentencePiece model; a tokenizer.model or tokenizer.json is wanted"
        ) from None
    special = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        ids = model.encode(list(texts), out_type=int)
        for n, text in enumerate(texts):
            if _BLOCK in text and model.unk_id() not in block:  # a literal one would come back as a space
                parts = model.encode(text.split(_BLOCK), out_type=int)
                ids[n] = parts[0] + [i for part in parts[1:] for i in (*block, *part)]
        return ids

    eos = wanted(model.eos_id(), "eos", path)
    bos = model.bos_id() if model.bos_id() >= 0 else eos
    pad = model.pad_id() if model.pad_id() >= 0 else eos
    return Tokenizer("tokenizer.model", data, size, bos, eos, pad, special, encode_batch, model.decode)


def wanted(i: int | None, name: str, path: Path) -> int:
    """`i`; InputError if there is no such token."""
    if i is None or i < 0:
        raise InputError(
            f"{path}: names no {name} token; one is wanted (in tokenizer_config.json for a tokenizer.json)"
        )
    return i
