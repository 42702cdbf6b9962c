"""Where text comes from: a spec -> documents (pretraining) or rows (tuning), and the split that holds documents out.

Specs: `embedded:code`, `embedded:prose`; a file, folder or glob of .jsonl .ndjson .json .csv .tsv .parquet (a text
field) or plain text, packed by gzip or zstd or not; `hub:owner/name[:config][@split]` (split `train` unless it is
named); several of them with commas between.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator

from .. import InputError
from . import python_library
from .documents import Document, pieces
from .errors import RAISE, RowErrors
from .fields import text_of
from .files import TABLES, expand, holds_rows, read_text, reader
from .unpack import suffix

_HUB = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@:]+))?(?:@(?P<split>.+))?")
_WHOLE = {".md", ".rst", ".py"}  # one file is one article or module


def documents(spec: str, field: str = "text", bad: RowErrors = RAISE) -> Iterator[Document]:
    """Yield the documents of `spec`; `field` names the text of structured rows. Blank ones are left out.

    InputError for an unknown spec, a missing or empty source; `bad` says what becomes of text that is not UTF-8 and of
    a row without text in `field`.
    """
    empty = True
    for document in itertools.chain.from_iterable(_documents(part, field, bad) for part in parts(spec)):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        bad.settle()
        raise InputError(f"{spec}: no text in it; at least one document that is not blank is wanted")


def parts(spec: str) -> list[str]:
    """The sources that a spec names: several have commas between them. InputError for one that is there twice."""
    found = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",")]
    if twice := next((part for part in found if found.count(part) > 1), None):
        raise InputError(f"{spec}: {twice!r} is there twice; give each source once")
    return found


def _documents(spec: str, field: str, bad: RowErrors) -> Iterator[Document]:
    """The documents of one source."""
    if spec.startswith("embedded:"):
        return _embedded(spec)
    if spec.startswith("hub:"):
        return _row_documents(((where, where, row) for where, row in _hub_rows(spec, bad)), field, bad)
    return _file_documents(spec, field, bad)


def rows(spec: str, bad: RowErrors = RAISE) -> Iterator[tuple[str, dict]]:
    """Yield ("path:row", row) of a structured source. InputError for plain text, or what cannot be read."""
    for part in parts(spec):
        if part.startswith("hub:"):
            yield from _hub_rows(part, bad)
            continue
        files = [] if part.startswith("embedded:") else [(path, reader(path)) for _, path in expand(part)]
        plain = next((path for path, read in files if read is None), None)
        if plain or not files:
            raise InputError(f"{plain or part}: has no rows; {TABLES} or hub:owner/name is wanted")
        for path, read in files:
            if read:
                yield from read(path, bad)


def _embedded(spec: str) -> Iterator[Document]:
    makers = {"embedded:code": python_library.code, "embedded:prose": python_library.prose}
    if spec not in makers:
        raise InputError(f"{spec}: no such embedded corpus; {' or '.join(makers)} is wanted")
    return makers[spec]()


def _hub_rows(spec: str, bad: RowErrors = RAISE) -> Iterator[tuple[str, dict]]:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec}: not a hub spec; hub:owner/name[:config][@split] is wanted")
    if os.path.exists(match["name"]):  # datasets would read it in place of the hub's, and keep a copy by its age
        raise InputError(f"{spec}: a folder {match['name']} is here too; give that folder itself, or run elsewhere")
    import datasets

    split = match["split"] or "train"
    try:
        table = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as e:  # not found, no such config or split, gated, offline: each has its own class
        reason = (str(e).strip().splitlines() or [""])[0] or type(e).__name__
        raise InputError(f"{spec}: the hub gave no data ({reason}); check name, config, split and network") from None
    n = 0
    for n, row in enumerate(table, 1):
        bad.rows += 1
        with bad:
            yield f"{match['name']}@{split}:{n}", dict(row)
    if n == 0:
        raise InputError(f"{spec}: no rows; at least one is wanted")


def _file_documents(spec: str, field: str, bad: RowErrors) -> Iterator[Document]:
    for name, path in expand(spec):
        if read := reader(path):
            found = ((f"{name}:{where.rpartition(':')[2]}", where, r) for where, r in read(path, bad))
            yield from _row_documents(found, field, bad)
        else:
            bad.rows += 1
            with bad:
                text = read_text(path, bad)
                if holds_rows(text):
                    raise InputError(f"{path}: its lines are JSON objects; name it .jsonl, and they are read as rows")
                yield from pieces(name, text, suffix(path) not in _WHOLE)


def _row_documents(found: Iterable[tuple[str, str, dict]], field: str, bad: RowErrors) -> Iterator[Document]:
    """The documents of (id, where, row)."""
    for name, where, row in found:
        with bad:
            yield Document(name, text_of(row, field, where, bad))
