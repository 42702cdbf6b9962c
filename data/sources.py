"""Where text comes from: a spec -> documents (pretraining) or rows (tuning), and the split that holds documents out.

Specs: `embedded:code`, `embedded:prose`; a file, folder or glob of .jsonl .ndjson .json .csv .tsv .parquet (a text
field) or plain text, packed by gzip or zstd or not; `hub:owner/name[:config][@split]` (split `train` unless it is
named); several of them with commas between.
"""

import fnmatch
import hashlib
import itertools
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import InputError
from . import clean
from .errors import RAISE, RowErrors
from .files import TABLES, expand, holds_rows, read_text, reader
from .unpack import suffix, unpacked

MAX_BYTES = 8192  # a plain text longer than this is cut into documents, so that one book can be split by document
_HUB = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@:]+))?(?:@(?P<split>.+))?")
_SURROGATE = "[\ud800-\udfff]"
_WHOLE = {".md", ".rst", ".py"}  # one file is one article or module


class Document(NamedTuple):
    """A text with a stable, readable id relative to its source's root, e.g. `books/alice.txt#3`."""

    id: str
    text: str


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


def text_of(row: dict, field: str, where: str, bad: RowErrors = RAISE) -> str:
    """The text of a field. InputError: it is not there, no text, or holds a lone surrogate (JSON allows "\\ud800"),
    which no UTF-8 can carry.
    """
    if field not in row:
        raise InputError(f"{where}: no field {field!r}, only {reprlib.repr(sorted(row))}; rename one, or drop the row")
    text = row[field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        error = InputError(f"{where}: {field!r} is {kind}; text is wanted, write it in quotes or drop the row")
        if not isinstance(text, (int, float)):
            raise error
        bad.repair(error)
        text = json.dumps(text)
    if not text.isascii() and (found := re.search(_SURROGATE, text)):
        said = f"lone surrogate {found.group()!r} at character {found.start()}"
        bad.repair(InputError(f"{where}: {said}; Unicode text is wanted, write the whole character or drop the row"))
        text = re.sub(_SURROGATE, "\ufffd", text)
    return text


def _embedded(spec: str) -> Iterator[Document]:
    from . import python_library  # it imports Document from here

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
                yield from _pieces(name, text, suffix(path) not in _WHOLE)


def _row_documents(found: Iterable[tuple[str, str, dict]], field: str, bad: RowErrors) -> Iterator[Document]:
    """The documents of (id, where, row)."""
    for name, where, row in found:
        with bad:
            yield Document(name, text_of(row, field, where, bad))


def _pieces(name: str, text: str, cut: bool = True) -> Iterator[Document]:
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


def split(docs: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, held out) by id; a train document whose text equals a held-out one's is dropped."""
    train, held = [], []
    for document in docs:
        (held if is_held_out(document.id, fraction) else train).append(document)
    seen = {document.text for document in held}
    return [document for document in train if document.text not in seen], held


def five_domains(root: Path | str, bad: RowErrors = RAISE) -> dict[str, Callable[[], Iterator[Document]]]:
    """web, books, encyclopedia and forum under `root`, and code (embedded). InputError names a missing folder."""
    root = Path(root)
    readers = {"web": _web, "books": _books, "encyclopedia": _encyclopedia, "forum": _forum}
    for name in readers:
        if not (root / name).is_dir():
            raise InputError(f"{root / name}: no such folder; web, books, encyclopedia and forum are wanted in {root}")
    domains = {name: lambda name=name, read=read: read(root, root / name, bad) for name, read in readers.items()}
    return domains | {"code": lambda: documents("embedded:code")}


def _texts(root: Path, folder: Path, pattern: str, bad: RowErrors) -> Iterator[tuple[str, str]]:
    """(id relative to root, text with LF ends) of the files under `folder`; licences and readmes are left out."""
    paths = [p for p in sorted(folder.rglob("*")) if fnmatch.fnmatchcase(unpacked(p.name), pattern) and p.is_file()]
    paths = [p for p in paths if not p.name.startswith(("LICENSE", "README"))]
    if not paths:
        raise InputError(f"{folder}: no {pattern} in it; the layout of data/README.md is wanted")
    for path in paths:
        bad.rows += 1
        with bad:
            yield path.relative_to(root).as_posix(), clean.lf(read_text(path, bad))


def _web(root: Path, folder: Path, bad: RowErrors) -> Iterator[Document]:
    for name, text in _texts(root, folder, "*.md", bad):
        yield Document(name, clean.strip_front_matter(text))


def _books(root: Path, folder: Path, bad: RowErrors) -> Iterator[Document]:
    for name, text in _texts(root, folder, "*.txt", bad):
        yield from _pieces(name, clean.strip_gutenberg(text))


def _encyclopedia(root: Path, folder: Path, bad: RowErrors) -> Iterator[Document]:
    for name, text in _texts(root, folder, "wikitext*.txt", bad):
        for n, (title, article) in enumerate(clean.wikitext_articles(text)):
            yield Document(f"{name}#{n} {title}", article)
    yield from _web(root, folder, bad)


def _forum(root: Path, folder: Path, bad: RowErrors) -> Iterator[Document]:
    """One document a day: files of one day overlap, so no finer split is safe."""
    days: dict[str, list[str]] = {}
    for name, text in _texts(root, folder, "*.txt", bad):
        day = re.search(r"\d{4}-\d\d-\d\d", name)
        lines = days.setdefault(f"{folder.name}/{day.group()}" if day else name, [])
        seen = set(lines)
        lines += [line for line in text.splitlines() if line not in seen]
    for day, lines in sorted(days.items()):
        yield Document(day, "\n".join(lines) + "\n")
