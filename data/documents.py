"""A document, and the split that holds documents out."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from .. import InputError
from . import clean

MAX_BYTES = 8192  # a plain text longer than this is cut into documents, so that one book can be split by document


class Document(NamedTuple):
    """A text with a stable, readable id relative to its source's root, e.g. `books/alice.txt#3`."""

    id: str
    text: str


def pieces(name: str, text: str, cut: bool = True) -> Iterator[Document]:
    parts = clean.cut(text, MAX_BYTES) if cut else [text]
    for n, part in enumerate(parts):
        yield Document(f"{name}#{n}" if len(parts) > 1 else name, part)


def is_held_out(doc_id: str, fraction: float) -> bool:
    """Whether this id is held out: a hash of the id alone, so order and neighbours do not matter, and growing
    `fraction` only adds documents.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"held-out fraction {fraction}: a number in [0, 1) is wanted")
    return int.from_bytes(hashlib.sha256(doc_id.encode()).digest()[:8]) < fraction * 2**64
