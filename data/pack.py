"""Packing of documents: one flat array of tokens, cut into windows of T.

A row is a dict of arrays of shape [T] and one scalar:

- `ids` int32: tokens;
- `targets` int32: the next token;
- `weights` float32: weight of the loss, 0 for padding and at the end of a document, which has no next token;
- `segments` int32: 1, 2, ... by document, 0 for padding;
- `positions` int32: from 0 in each segment;
- `row` int64 scalar: index of the row, unique in the run; -1 for a row of padding.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import InputError
from ..atomic import atomic_folder
from .documents import Document
from .tokenizers import Tokenizer

Row = dict[str, Any]
_DTYPES = {"ids": np.int32, "targets": np.int32, "weights": np.float32, "segments": np.int32, "positions": np.int32}
_BATCH_CHARACTERS = 4 << 20  # tokenised at a time: bounds the Python lists in memory


class Tokens(NamedTuple):
    """Documents, each as bos + tokens + eos, in one array; document k is `flat[offsets[k]:offsets[k + 1]]`."""

    flat: np.ndarray  # uint16, or uint32 for a vocabulary of more than 2**16
    offsets: np.ndarray  # [documents + 1] int64
    digest: str  # sha256 of flat and offsets


def empty_row(T: int, row: int = -1) -> Row:
    """Return a row of padding."""
    return {name: np.zeros(T, dtype) for name, dtype in _DTYPES.items()} | {"row": np.int64(row)}


class Windows:
    """Random access to the packed rows of documents: row i is tokens [i * T, (i + 1) * T) of documents in `order`.

    The tokens are not copied; they may be a memory map.
    """

    def __init__(self, tokens: Tokens, order: np.ndarray, T: int, first_row: int = 0):
        if T < 2:
            raise InputError(f"row length T={T}: expected at least 2")
        self.T, self.first_row, self.flat = T, first_row, tokens.flat
        self.starts = tokens.offsets[:-1][order]  # [documents] where each one starts in `flat`
        self.bounds = np.concatenate([[0], np.cumsum(np.diff(tokens.offsets)[order])])  # [documents + 1] in the stream
        self.total = int(self.bounds[-1])  # tokens

    def __len__(self) -> int:
        return -(-self.total // self.T)

    def __repr__(self) -> str:
        return f"Windows({len(self)} rows of {self.T})"

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = empty_row(self.T, self.first_row + index)
        begin, end = index * self.T, min((index + 1) * self.T, self.total)  # in the stream of documents
        document = int(np.searchsorted(self.bounds, begin, side="right")) - 1
        at, segment = begin, 1
        while at < end:
            document_start, document_end = int(self.bounds[document]), int(self.bounds[document + 1])
            n = min(document_end, end) - at
            source = int(self.starts[document]) + at - document_start
            place = slice(at - begin, at - begin + n)
            row["ids"][place] = self.flat[source : source + n]
            row["segments"][place] = segment
            row["positions"][place] = np.arange(n)
            # The last token of a document has no target; the last of a window has one, in the next window.
            n_targets = min(at + n, document_end - 1) - at
            place = slice(at - begin, at - begin + n_targets)
            row["targets"][place] = self.flat[source + 1 : source + 1 + n_targets]
            row["weights"][place] = 1
            at, document, segment = at + n, document + 1, segment + 1
        return row


def tokenize(docs: Sequence[Document], tokenizer: Tokenizer, cache_dir: Path | str | None = None) -> Tokens:
    """Return the tokens of `docs`, cached in `cache_dir` by the documents and the tokenizer.

    A cache that cannot be read or written is not used, with a warning. Raises InputError for a damaged cache.
    """
    if cache_dir is None:
        return _tokenize(docs, tokenizer)
    folder, tokens = Path(cache_dir) / _cache_key(docs, tokenizer), None
    try:
        if not folder.is_dir():
            tokens = _tokenize(docs, tokenizer)
            _write_cache(folder, tokens)
        return _read_cache(folder)
    except OSError as error:  # no permission, no space: not damage
        logging.getLogger("graftax").warning(f"without a cache: {folder}: {error.strerror or error}")
        return tokens or _tokenize(docs, tokenizer)


def _tokenize(docs: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts, lengths, texts, size = [], [], [], 0
    for n, document in enumerate(docs):
        texts.append(document.text)
        size += len(document.text)
        if size < _BATCH_CHARACTERS and n + 1 < len(docs):
            continue
        for ids in tokenizer.encode_batch(texts):
            parts.append(np.array([tokenizer.bos, *ids, tokenizer.eos], dtype))
            lengths.append(len(ids) + 2)
        texts, size = [], 0
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Tokens(flat, offsets, _digest(flat, offsets))


def _digest(flat: np.ndarray, offsets: np.ndarray) -> str:
    sha = hashlib.sha256(np.ascontiguousarray(flat).data)
    sha.update(np.ascontiguousarray(offsets).data)
    return sha.hexdigest()


def _cache_key(docs: Sequence[Document], tokenizer: Tokenizer) -> str:
    """Return the sha256 of what the tokens depend on: ids and texts of the documents, and the tokenizer."""
    sha = hashlib.sha256(tokenizer.digest.encode())
    for document in docs:
        for part in (document.id.encode(), document.text.encode()):
            sha.update(len(part).to_bytes(8))
            sha.update(part)
    return sha.hexdigest()


def _write_cache(folder: Path, tokens: Tokens) -> None:
    try:
        with atomic_folder(folder) as made:
            np.save(made / "flat.npy", tokens.flat, allow_pickle=False)
            np.save(made / "offsets.npy", tokens.offsets, allow_pickle=False)
            (made / "digest").write_text(tokens.digest)
    except InputError as error:
        if not folder.is_dir():  # else another process wrote the same bytes meanwhile
            raise OSError(str(error)) from None


def _read_cache(folder: Path) -> Tokens:
    try:
        flat = np.load(folder / "flat.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        digest = (folder / "digest").read_text()
        if _digest(flat, offsets) == digest:
            return Tokens(flat, offsets, digest)
    except (FileNotFoundError, ValueError, EOFError):
        pass
    raise InputError(f"{folder}: the cached tokens are damaged; delete this folder, and it is written anew")
