"""Where text comes from: a spec -> documents (pretraining) or rows (tuning), and the split that holds documents out.

Specs: `embedded:code`, `embedded:prose`; a file, folder or glob of .jsonl .json .csv .parquet (a text field) or plain
text; `hub:owner/name[:config][@split]` (split `train` unless it is named).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import InputError
from . import clean
from .files import READERS, expand, read_text

MAX_BYTES = 8192  # a plain text longer than this is cut into documents, so that one book can be split by document
_HUB = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@:]+))?(?:@(?P<split>.+))?")
_WHOLE = {".md", ".rst", ".py"}  # one file is one article or module


class Document(NamedTuple):
    """A text with a stable, readable id relative to its source's root, e.g. `books/alice.txt#3`."""

    id: str
    text: str


def documents(spec: str, field: str = "text") -> Iterator[Document]:
    """Yield the documents of `spec`; `field` names the text of structured rows. Blank ones are left out.

    InputError for an unknown spec, a missing or empty source, text that is not UTF-8, a row without text in `field`.
    """
    if spec.startswith("embedded:"):
        found = _embedded(spec)
    elif spec.startswith("hub:"):
        found = (Document(where, _text(row, field, where)) for where, row in _hub_rows(spec))
    else:
        found = _file_documents(spec, field)
    empty = True
    for document in found:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise InputError(f"{spec}: no text in it; at least one document that is not blank is wanted")


def rows(spec: str) -> Iterator[tuple[str, dict]]:
    """Yield ("path:row", row) of a structured source. InputError for plain text, or what cannot be read."""
    if spec.startswith("hub:"):
        yield from _hub_rows(spec)
        return
    files = [] if spec.startswith("embedded:") else [path for _, path in expand(spec)]
    plain = next((path for path in files if path.suffix not in READERS), None)
    if plain or not files:
        raise InputError(f"{plain or spec}: has no rows; .jsonl, .json, .csv, .parquet or hub:owner/name is wanted")
    for path in files:
        yield from READERS[path.suffix](path)


def _text(row: dict, field: str, where: str) -> str:
    if field not in row:
        raise InputError(f"{where}: no field {field!r}, only {sorted(row)}; name the text field with --data.field")
    text = row[field]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise InputError(f"{where}: field {field!r} is {kind}; text is wanted")
    return check_text(text, where)


def check_text(text: str, where: str) -> str:
    """`text`, or InputError when it holds a lone surrogate (JSON allows "\\ud800"), which no UTF-8 can carry."""
    if not text.isascii() and (bad := re.search("[\ud800-\udfff]", text)):
        raise InputError(f"{where}: lone surrogate {bad.group()!r} at character {bad.start()}; Unicode text is wanted")
    return text


def _embedded(spec: str) -> Iterator[Document]:
    from . import embedded  # it imports Document from here

    makers = {"embedded:code": embedded.code, "embedded:prose": embedded.prose}
    if spec not in makers:
        raise InputError(f"{spec}: no such embedded corpus; {' or '.join(makers)} is wanted")
    return makers[spec]()


def _hub_rows(spec: str) -> Iterator[tuple[str, dict]]:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec}: not a hub spec; hub:owner/name[:config][@split] is wanted")
    import datasets

    split = match["split"] or "train"
    try:
        table = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as e:  # not found, no such config or split, gated, offline: each has its own class
        reason = (str(e).strip().splitlines() or [""])[0] or type(e).__name__
        raise InputError(f"{spec}: the hub gave no data ({reason}); check name, config, split and network") from None
    n = 0
    for n, row in enumerate(table, 1):
        yield f"{match['name']}@{split}:{n}", dict(row)
    if n == 0:
        raise InputError(f"{spec}: no rows; at least one is wanted")


def _file_documents(spec: str, field: str) -> Iterator[Document]:
    for name, path in expand(spec):
        if path.suffix in READERS:
            for where, row in READERS[path.suffix](path):
                yield Document(f"{name}:{where.rpartition(':')[2]}", _text(row, field, where))
        else:
            yield from _pieces(name, read_text(path), path.suffix not in _WHOLE)


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


def five_domains(root: Path | str) -> dict[str, Callable[[], Iterator[Document]]]:
    """web, books, encyclopedia and forum under `root`, and code (embedded). InputError names a missing folder."""
    root = Path(root)
    readers = {"web": _web, "books": _books, "encyclopedia": _encyclopedia, "forum": _forum}
    for name in readers:
        if not (root / name).is_dir():
            raise InputError(f"{root / name}: no such folder; web, books, encyclopedia and forum are wanted in {root}")
    domains = {name: lambda name=name, read=read: read(root, root / name) for name, read in readers.items()}
    return domains | {"code": lambda: documents("embedded:code")}


def _texts(root: Path, folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(id relative to root, text with LF ends) of the files under `folder`; licences and readmes are left out."""
    paths = [p for p in sorted(folder.rglob(pattern)) if not p.name.startswith(("LICENSE", "README"))]
    if not paths:
        raise InputError(f"{folder}: no {pattern} in it; the layout of data/README.md is wanted")
    for path in paths:
        yield path.relative_to(root).as_posix(), clean.lf(read_text(path))


def _web(root: Path, folder: Path) -> Iterator[Document]:
    for name, text in _texts(root, folder, "*.md"):
        yield Document(name, clean.strip_front_matter(text))


def _books(root: Path, folder: Path) -> Iterator[Document]:
    for name, text in _texts(root, folder, "*.txt"):
        yield from _pieces(name, clean.strip_gutenberg(text))


def _encyclopedia(root: Path, folder: Path) -> Iterator[Document]:
    for name, text in _texts(root, folder, "wikitext*.txt"):
        for n, (title, article) in enumerate(clean.wikitext_articles(text)):
            yield Document(f"{name}#{n} {title}", article)
    yield from _web(root, folder)


def _forum(root: Path, folder: Path) -> Iterator[Document]:
    """One document a day: files of one day overlap, so no finer split is safe."""
    days: dict[str, list[str]] = {}
    for name, text in _texts(root, folder, "*.txt"):
        day = re.search(r"\d{4}-\d\d-\d\d", name)
        lines = days.setdefault(f"{folder.name}/{day.group()}" if day else name, [])
        seen = set(lines)
        lines += [line for line in text.splitlines() if line not in seen]
    for day, lines in sorted(days.items()):
        yield Document(day, "\n".join(lines) + "\n")
