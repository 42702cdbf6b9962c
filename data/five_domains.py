"""The five domains."""

import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import InputError
from . import clean
from .documents import Document, pieces
from .errors import RAISE, RowErrors
from .files import read_text
from .sources import documents
from .unpack import unpacked


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
        yield from pieces(name, clean.strip_gutenberg(text))


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
