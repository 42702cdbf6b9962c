"""The five domains: web, books, encyclopedia and forum, read from a folder laid out as in data/README.md, and code."""

import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import InputError
from . import clean
from .documents import Document, cut_documents
from .errors import RAISE, RowErrors
from .files import read_text
from .sources import documents
from .unpack import content_name


def five_domains(root: Path | str, errors: RowErrors = RAISE) -> dict[str, Callable[[], Iterator[Document]]]:
    """Return {domain: function that reads its documents}: four folders of `root`, and the embedded `code`.

    Raises InputError for a missing folder.
    """
    root = Path(root)
    readers = {"web": _web, "books": _books, "encyclopedia": _encyclopedia, "forum": _forum}
    for name in readers:
        if not (root / name).is_dir():
            raise InputError(f"{root / name}: no such folder; expected the layout of data/README.md")
    domains = {name: lambda name=name, read=read: read(root, root / name, errors) for name, read in readers.items()}
    return domains | {"code": lambda: documents("embedded:code")}


def _texts(root: Path, folder: Path, pattern: str, errors: RowErrors) -> Iterator[tuple[str, str]]:
    """Yield (id relative to root, text with LF ends) of the files in `folder`, without licences and readmes."""
    paths = [p for p in sorted(folder.rglob("*")) if fnmatch.fnmatchcase(content_name(p.name), pattern) and p.is_file()]
    paths = [p for p in paths if not p.name.startswith(("LICENSE", "README"))]
    if not paths:
        raise InputError(f"{folder}: no {pattern} in it; expected the layout of data/README.md")
    for path in paths:
        errors.rows += 1
        with errors:
            yield path.relative_to(root).as_posix(), clean.lf(read_text(path, errors))


def _web(root: Path, folder: Path, errors: RowErrors) -> Iterator[Document]:
    for name, text in _texts(root, folder, "*.md", errors):
        yield Document(name, clean.strip_front_matter(text))


def _books(root: Path, folder: Path, errors: RowErrors) -> Iterator[Document]:
    for name, text in _texts(root, folder, "*.txt", errors):
        yield from cut_documents(name, clean.strip_gutenberg(text))


def _encyclopedia(root: Path, folder: Path, errors: RowErrors) -> Iterator[Document]:
    for name, text in _texts(root, folder, "wikitext*.txt", errors):
        for n, (title, article) in enumerate(clean.wikitext_articles(text)):
            yield Document(f"{name}#{n} {title}", article)
    yield from _web(root, folder, errors)


def _forum(root: Path, folder: Path, errors: RowErrors) -> Iterator[Document]:
    """Yield one document per day: files of one day overlap, so no finer split is safe."""
    days: dict[str, list[str]] = {}
    for name, text in _texts(root, folder, "*.txt", errors):
        day = re.search(r"\d{4}-\d\d-\d\d", name)
        lines = days.setdefault(f"{folder.name}/{day.group()}" if day else name, [])
        seen = set(lines)
        lines += [line for line in text.splitlines() if line not in seen]
    for day, lines in sorted(days.items()):
        yield Document(day, "\n".join(lines) + "\n")
