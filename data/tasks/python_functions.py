"""Supervised tasks over the functions of the standard library: no download, and nothing of the test in the corpus.

The docstrings give the test floors on Python 3.11 (majority, naive Bayes): what a bag of words reaches.
"""

import ast
import hashlib
import io
import keyword
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .. import clean
from ..python_library import Function, functions, normal
from .base import Row, Task, accuracy, drop_leaks

CHARS = 300  # about 100 tokens
PACKAGES = (
    *("asyncio", "collections", "email", "http", "importlib", "logging"),
    *("multiprocessing", "tkinter", "unittest", "urllib", "wsgiref", "xml"),
)
STATEMENTS = ("for", "if", "raise", "return", "self", "try")
TOKENS = ("name", "keyword", "string", "newline", "(", ")", ".", ",", "=", ":")


def package(root: Path | None = None) -> Task:
    """Function -> its package, one of 12. Floors .196, .822: words alone nearly settle it."""
    pairs = ((f, head(source)) for f, source in _sources() if f.package in PACKAGES)
    return _task("package", PACKAGES, ((f, text, f.package) for f, text in pairs), None)


def next_statement(root: Path | None = None) -> Task:
    """The beginning of a function, up to where a statement starts -> its first word, one of 6, balanced.

    Floors .167, .383; a table of the previous two lines' first words and indents reaches only .45.
    """
    return _task("next_statement", STATEMENTS, _cuts(_statement_cuts), {"train": 800, "valid": 30, "test": 100})


def next_token(root: Path | None = None) -> Task:
    """The beginning of a function, up to where a token starts -> the token's kind, one of 10, balanced.

    Floors .100, .183; a table of the last two tokens reaches .51: order decides, as in language modelling.
    """
    return _task("next_token", TOKENS, _cuts(_token_cuts), {"train": 700, "valid": 20, "test": 60})


def head(source: str) -> str:
    """The first whole lines that fit `CHARS`."""
    return next(iter(clean.cut(source, CHARS)), "") if len(source) > CHARS else source


def _sources() -> Iterator[tuple[Function, str]]:
    """Functions long enough to ask about, with their source less the docstring (it would fill the prompt)."""
    for function in functions():
        if function.source.count("\n") < 3 or len(function.source) < 100:
            continue
        source = _without_docstring(function)
        if source:
            yield function, source


def _without_docstring(function: Function) -> str | None:
    if not function.docstring:
        return function.source
    node = _parse(function.source)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    if len(node.body) < 2 or node.body[0].lineno == node.lineno:
        return None  # nothing but a docstring
    lines = clean.lines(function.source)
    return "".join(lines[: node.body[0].lineno - 1] + lines[node.body[0].end_lineno :])


def _parse(source: str) -> ast.stmt | None:
    try:
        return ast.parse(source).body[0]
    except SyntaxError:  # a continuation line further left than the function itself
        return None


def _cuts(find: Callable[[str], list[tuple[int, str]]]) -> Iterator[tuple[Function, str, str]]:
    """(function, prompt, label) for at most 4 places of each function, spread by a hash."""
    for function, source in _sources():
        places = [(at, label) for at, label in find(source) if at <= CHARS]
        for at, label in sorted(places, key=lambda place: _hash(f"{function.id} {place[0]}"))[:4]:
            yield function, source[:at], label


def _starts(source: str) -> list[int]:
    starts = [0]
    for line in clean.lines(source):
        starts.append(starts[-1] + len(line))
    return starts


def _statement_cuts(source: str) -> list[tuple[int, str]]:
    """(offset, first word) of the statements that stand first on their line, from the second on."""
    node = _parse(source)
    if node is None or not source.isascii():  # ast counts columns in bytes
        return []
    starts, found = _starts(source), []
    for inner in sorted((n for n in ast.walk(node) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)[2:]:
        line, at = starts[inner.lineno - 1], starts[inner.lineno - 1] + inner.col_offset
        word = next((word for word in STATEMENTS if source.startswith(word, at)), None)
        following = source[at + len(word) : at + len(word) + 1] if word else "x"
        if not source[line:at].strip() and not (following.isalnum() or following == "_"):
            found.append((at, word))
    return found


def _token_cuts(source: str) -> list[tuple[int, str]]:
    """(offset, kind) of the tokens after the eighth, where the prompt has something to go by."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return []
    starts = _starts(source)
    return [(starts[t.start[0] - 1] + t.start[1], kind) for t in tokens[8:] if (kind := _kind(t)) in TOKENS]


def _kind(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    return {tokenize.STRING: "string", tokenize.NEWLINE: "newline"}.get(token.type, token.string)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _task(
    name: str, choices: tuple[str, ...], found: Iterable[tuple[Function, str, str]], most: dict[str, int] | None
) -> Task:
    """Rows by the functions' parts, at most `most[part]` of a label; a prompt is in one part and there once."""
    parts: dict[str, dict[str, Row]] = defaultdict(dict)
    taken: Counter = Counter()
    for function, prompt, label in sorted(found, key=lambda item: _hash(f"{item[0].id} {len(item[1])}")):
        if (most and taken[function.part, label] >= most[function.part]) or normal(prompt) in parts[function.part]:
            continue
        taken[function.part, label] += 1
        row = {"prompt": prompt, "completion": label, "meta": {"id": function.id}}
        parts[function.part][normal(prompt)] = row
    test = list(parts["test"].values())
    valid, _ = drop_leaks(list(parts["valid"].values()), test, normal)
    train, dropped = drop_leaks(list(parts["train"].values()), test + valid, normal)
    return Task(f"embedded:{name}", train, valid, test, accuracy, list(choices), dropped)
