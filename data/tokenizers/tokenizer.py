"""The `Tokenizer` class: text to token ids and back. `load_tokenizer` and `train_tokenizer` make one."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ..dialogue import ROLES

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES))
CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece tokenizer trained by graftax, or a Hugging Face tokenizer.

    `encode` never returns a special token, whatever the text is. For a tokenizer trained here
    `decode(encode(text)) == text`. The fields from `template` on are empty for a tokenizer trained here.
    """

    file: str  # name of the main file: tokenizer.model, tokenizer.json or vocab.json
    data: bytes = field(repr=False)  # content of the main file
    vocab_size: int  # largest id + 1
    bos: int
    eos: int
    pad: int
    special: dict[str, int]  # {text: id} of the special tokens
    encode_batch: Callable[[Sequence[str]], list[list[int]]] = field(repr=False, compare=False)
    _decode: Callable[[list[int]], str] = field(repr=False, compare=False)
    gaps: tuple[int, ...] = field(default=(), repr=False)  # ids below vocab_size without a token
    template: str = field(default="", repr=False)  # chat template in jinja2; the default one if the files have none
    template_file: str = field(default="", compare=False)  # path the template was read from; empty: the default one
    names: dict[str, str] = field(default_factory=dict)  # {"eos_token": "</s>", ...}: variables of the template
    date: str = ""  # ISO date that `strftime_now` in a template formats; empty: today
    ends: tuple[int, ...] = ()  # eos, then the eos_token_id of generation_config.json
    files: dict[str, bytes] = field(
        default_factory=dict, repr=False
    )  # {name: content} of the files beside the main one
    encode_marked: Callable[[Sequence[str], bool], list[Any]] | None = field(default=None, repr=False, compare=False)
    """(texts, add_special_tokens) -> `tokenizers.Encoding`s; special tokens in the texts are recognised."""
    turn_end: Callable[["Tokenizer"], tuple[int, ...]] | None = field(default=None, repr=False, compare=False)
    """Returns the special token that ends a turn of the chat template, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def prompt(self, text: str) -> list[int]:
        """Return the ids to continue `text` from: those of HF's `tokenizer(text)`, or bos and `text`."""
        return [self.bos, *self.encode(text)] if self.encode_marked is None else self.encode_marked([text], True)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special tokens. Raises InputError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise InputError(f"token id {outside}: outside the vocabulary of {self.vocab_size}; wrong tokenizer?")
        return self._decode(ids)

    def has_token(self, V: int) -> np.ndarray:
        """Return a boolean mask [V]: which of the ids 0..V-1 have a token. An embedding table may have spare rows."""
        mask = np.arange(V) < self.vocab_size
        mask[[i for i in self.gaps if i < V]] = False
        return mask

    @property
    def end(self) -> int:
        """The id that ends a turn in graftax's own chat format: eos, which pretraining has taught the base to predict.

        A new token would have an untrained embedding row, and a method that freezes the table (LoRA, a mask, a prompt)
        could not tell it from the rows of other unused pieces.
        """
        return self.eos

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Every id that ends a reply: eos, those of generation_config.json, and the end of a turn in the template."""
        ends = self.ends or (self.eos,)
        return tuple(dict.fromkeys((*ends, *self.turn_end(self)))) if self.turn_end and self.template else ends

    @property
    def digest(self) -> str:
        """sha256 of the main file and of those beside it, but for generation_config.json, which changes no id."""
        beside = {name: data for name, data in self.files.items() if name != GENERATION}
        if not beside:
            return hashlib.sha256(self.data).hexdigest()
        parts = {name: hashlib.sha256(data).hexdigest() for name, data in (beside | {self.file: self.data}).items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path | str) -> Path:
        """Write all files into `folder`, byte for byte; return the path of the main file."""
        path = Path(folder) / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, data in (self.files | {self.file: self.data}).items():
            (path.parent / name).write_bytes(data)
        return path


def require_id(i: int | None, name: str, path: Path) -> int:
    """Return the id `i` of the special token `name`. Raises InputError if there is no such token."""
    if i is None or i < 0:
        raise InputError(f"{path}: names no {name} token; name one in {CONFIG}")
    return i
