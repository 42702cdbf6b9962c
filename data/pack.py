"""Documents -> one flat array of tokens -> windows of T: row i is tokens [i*T, (i+1)*T) of a seeded order.

A row is a dict of arrays of length T: `ids` int32; `targets` int32, the next token; `weights` float32, 0 where the
target is not to be learned (padding, the end of a document); `segments` int32, 1, 2, ... by document, 0 = padding;
`positions` int32, from 0 in each segment; and the scalar `row` int64, unique in the run.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import InputError
from ..atomic import whole_folder
from .sources import Document
from .tokenizers import Tokenizer

Row = dict[str, Any]  # of arrays and the scalar `row`
_FIELDS = {"ids": np.int32, "targets": np.int32, "weights": np.float32, "segments": np.int32, "positions": np.int32}
_CHUNK = 4 << 20  # characters tokenised at a time: bounds the Python lists in flight


class Tokens(NamedTuple):
    """Documents as bos + tokens + eos, one after the other; document k is `flat[offsets[k]:offsets[k + 1]]`."""

    flat: np.ndarray  # uint16 or uint32
    offsets: np.ndarray  # int64, one more than documents
    digest: str  # sha256 of flat and offsets


def empty_row(T: int, row: int = -1) -> Row:
    """A row of padding."""
    fields: Row = {name: np.zeros(T, dtype) for name, dtype in _FIELDS.items()}
    return fields | {"row": np.int64(row)}


class Windows:
    """Random access to the packed rows of `tokens[order]`; holds no copy of the tokens (they may be a memory map)."""

    def __init__(self, tokens: Tokens, order: np.ndarray, T: int, first_row: int = 0):
        if T < 2:
            raise InputError(f"row length T={T}: at least 2 is wanted")
        self.tokens, self.T, self.first_row = tokens, T, first_row
        self.starts = tokens.offsets[:-1][order]
        self.bounds = np.concatenate([[0], np.cumsum(np.diff(tokens.offsets)[order])])  # in the shuffled order
        self.total = int(self.bounds[-1])

    def __len__(self) -> int:
        return -(-self.total // self.T)

    def __repr__(self) -> str:
        return f"Windows({len(self)} rows of {self.T})"

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row, flat = empty_row(self.T, self.first_row + index), self.tokens.flat
        begin, end = index * self.T, min((index + 1) * self.T, self.total)
        at, segment = begin, 0
        k = int(np.searchsorted(self.bounds, begin, side="right")) - 1
        while at < end:
            stop, document_end, segment = min(int(self.bounds[k + 1]), end), int(self.bounds[k + 1]), segment + 1
            source = int(self.starts[k]) + at - int(self.bounds[k])
            place = slice(at - begin, stop - begin)
            row["ids"][place] = flat[source : source + stop - at]
            row["segments"][place] = segment
            row["positions"][place] = np.arange(stop - at)
            # The last token of a document has no next one; the last of a window has, in the next window.
            known = min(stop, document_end - 1) - at
            row["targets"][at - begin : at - begin + known] = flat[source + 1 : source + 1 + known]
            row["weights"][at - begin : at - begin + known] = 1
            at, k = stop, k + 1
        return row


def fingerprint(docs: Sequence[Document], tokenizer: Tokenizer) -> str:
    """sha256 of the ids and texts and of the tokenizer: what the tokens depend on."""
    sha = hashlib.sha256(tokenizer.digest.encode())
    for document in docs:
        for part in (document.id.encode(), document.text.encode()):
            sha.update(len(part).to_bytes(8))
            sha.update(part)
    return sha.hexdigest()


def tokenize(docs: Sequence[Document], tokenizer: Tokenizer, cache_dir: Path | str | None = None) -> Tokens:
    """The tokens of `docs`, read from `cache_dir` when the same documents and tokenizer were there before.

    A cache that cannot be read or written is not used, and a line says so. InputError when what is in it is damaged.
    """
    if cache_dir is None:
        return _tokenize(docs, tokenizer)
    folder, made = Path(cache_dir) / fingerprint(docs, tokenizer), None
    try:
        if not folder.is_dir():
            made = _tokenize(docs, tokenizer)
            _write(folder, made)
        return _read(folder)
    except OSError as error:  # no right to read or write it, no room: not damage
        logging.getLogger("graftax").warning(f"without a cache: {folder}: {error.strerror or error}")
        return made or _tokenize(docs, tokenizer)


def _tokenize(docs: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts, lengths, batch, size = [], [], [], 0
    for n, document in enumerate(docs):
        batch.append(document.text)
        size += len(document.text)
        if size < _CHUNK and n + 1 < len(docs):
            continue
        for ids in tokenizer.encode_batch(batch):
            parts.append(np.array([tokenizer.bos, *ids, tokenizer.eos], dtype))
            lengths.append(len(ids) + 2)
        batch, size = [], 0
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Tokens(flat, offsets, _digest(flat, offsets))


def _digest(flat: np.ndarray, offsets: np.ndarray) -> str:
    sha = hashlib.sha256(np.ascontiguousarray(flat).data)
    sha.update(np.ascontiguousarray(offsets).data)
    return sha.hexdigest()


def _write(folder: Path, tokens: Tokens) -> None:
    """Another process may have been faster, with the same bytes."""
    try:
        with whole_folder(folder) as made:
            np.save(made / "flat.npy", tokens.flat, allow_pickle=False)
            np.save(made / "offsets.npy", tokens.offsets, allow_pickle=False)
            (made / "digest").write_text(tokens.digest)
    except InputError as error:
        if not folder.is_dir():
            raise OSError(str(error)) from None


def _read(folder: Path) -> Tokens:
    try:
        flat = np.load(folder / "flat.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        digest = (folder / "digest").read_text()
        if _digest(flat, offsets) == digest:
            return Tokens(flat, offsets, digest)
    except (FileNotFoundError, ValueError, EOFError):
        pass
    raise InputError(f"{folder}: the cached tokens are damaged; delete this folder, it is made again")
