"""Sources of text: a spec names documents (pretraining) or rows (fine-tuning).

Specs:
- `embedded:code`, `embedded:prose`: the standard library of the running Python (python_library.py);
- a file, folder or glob of tables (.jsonl .ndjson .json .csv .tsv .parquet) or plain text, which may be compressed by
  gzip or zstd;
- `hub:owner/name[:config][@split]`: a data set of the Hugging Face hub; the split is `train` by default;
- several of these, separated by commas.
"""

import itertools
import os
import re
from collections.abc import Iterator

from .. import InputError
from . import python_library
from .documents import Document, cut_documents
from .errors import RAISE, RowErrors
from .fields import Record, text_of
from .files import TABLES, expand, holds_json_lines, is_table, read_rows, read_text
from .unpack import content_suffix

_EMBEDDED = {"embedded:code": python_library.code, "embedded:prose": python_library.prose}
_HUB = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@:]+))?(?:@(?P<split>.+))?")
_UNCUT = {".md", ".rst", ".py"}  # one file is one article or module


def documents(spec: str, field: str = "text", errors: RowErrors = RAISE) -> Iterator[Document]:
    """Yield the documents of `spec` that are not blank; `field` names the text of a table's rows.

    Raises InputError for an unknown spec, a missing or empty source and, unless `errors` leaves it out, for text that
    is not UTF-8 and a row without text in `field`.
    """
    empty = True
    for document in itertools.chain.from_iterable(_documents(part, field, errors) for part in _split_spec(spec)):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        errors.check_cap()
        raise InputError(f"{spec}: no text in it; expected at least one document that is not blank")


def rows(spec: str, errors: RowErrors = RAISE) -> Iterator[tuple[str, Record]]:
    """Yield ("path:n", row) of the tables of `spec`. Raises InputError for plain text and for what cannot be read."""
    for part in _split_spec(spec):
        if part.startswith("hub:"):
            yield from _hub_rows(part, errors)
            continue
        paths = [] if part.startswith("embedded:") else [path for _, path in expand(part)]
        plain = next((path for path in paths if not is_table(path)), None)
        if plain or not paths:
            raise InputError(f"{plain or part}: has no rows; expected {TABLES} or hub:owner/name")
        for path in paths:
            yield from read_rows(path, errors)


def _split_spec(spec: str) -> list[str]:
    """Return the comma-separated sources of a spec. Raises InputError for a duplicate."""
    parts = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",")]
    if duplicate := next((part for part in parts if parts.count(part) > 1), None):
        raise InputError(f"{spec}: duplicate source {duplicate!r}; give each source once")
    return parts


def _documents(spec: str, field: str, errors: RowErrors) -> Iterator[Document]:
    """Yield the documents of one source, with ids relative to it."""
    if spec.startswith("embedded:"):
        if spec not in _EMBEDDED:
            raise InputError(f"{spec}: no such embedded corpus; expected {' or '.join(_EMBEDDED)}")
        yield from _EMBEDDED[spec]()
    elif spec.startswith("hub:"):
        for where, row in _hub_rows(spec, errors):
            with errors:
                yield Document(where, text_of(row, field, where, errors))
    else:
        for name, path in expand(spec):
            if is_table(path):
                for where, row in read_rows(path, errors):
                    with errors:
                        yield Document(f"{name}:{where.rpartition(':')[2]}", text_of(row, field, where, errors))
                continue
            errors.rows += 1
            with errors:
                text = read_text(path, errors)
                if holds_json_lines(text):
                    raise InputError(f"{path}: its lines are JSON objects; name it .jsonl to read them as rows")
                yield from [Document(name, text)] if content_suffix(path) in _UNCUT else cut_documents(name, text)


def _hub_rows(spec: str, errors: RowErrors = RAISE) -> Iterator[tuple[str, Record]]:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec}: not a hub spec; expected hub:owner/name[:config][@split]")
    if os.path.exists(match["name"]):  # `datasets` would read the folder instead of the hub, and cache it by its age
        raise InputError(f"{spec}: a folder {match['name']} exists here too; give that folder itself, or run elsewhere")
    import datasets

    split = match["split"] or "train"
    try:
        table = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as e:  # not found, no such config or split, gated, offline: each has its own class
        reason = (str(e).strip().splitlines() or [""])[0] or type(e).__name__
        raise InputError(f"{spec}: the hub gave no data ({reason}); check name, config, split and network") from None
    n = 0
    for n, row in enumerate(table, 1):
        errors.rows += 1
        with errors:
            yield f"{match['name']}@{split}:{n}", dict(row)
    if n == 0:
        raise InputError(f"{spec}: no rows; expected at least one")
