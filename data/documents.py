"""A document, how a long text is cut into documents, and which documents are held out."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from .. import InputError
from . import clean

MAX_BYTES = 8192  # bytes of UTF-8 per document of a text that is cut, so that one book can be split by document


class Document(NamedTuple):
    """A text with a stable, readable id relative to the root of its source, e.g. `books/alice.txt#3`."""

    id: str
    text: str


def cut_documents(id: str, text: str) -> Iterator[Document]:
    """Yield a text as documents of at most MAX_BYTES, with ids `id#0`, `id#1`, ...; plain `id` if one is enough."""
    pieces = clean.cut(text, MAX_BYTES)
    for n, piece in enumerate(pieces):
        yield Document(f"{id}#{n}" if len(pieces) > 1 else id, piece)


def is_held_out(doc_id: str, fraction: float) -> bool:
    """Return whether a document is held out of training, by a hash of its id alone.

    The order and the other documents do not matter, and a larger `fraction` only adds documents. Raises InputError for
    a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise InputError(f"held-out fraction {fraction}: expected a number in [0, 1)")
    return int.from_bytes(hashlib.sha256(doc_id.encode()).digest()[:8]) < fraction * 2**64
