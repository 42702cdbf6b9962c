"""Tasks over the functions of the standard library: no download, and no test function in the embedded corpus.

The docstrings give the floors on test with Python 3.11: majority and naive Bayes, which a bag of words reaches.
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
from ..python_library import Function, functions, is_short, normal
from .base import Task, TaskRow, accuracy, drop_leaks

CHARS = 300  # most characters of a prompt: about 100 tokens
_CUTS_PER_FUNCTION = 4
PACKAGES = (
    *("asyncio", "collections", "email", "http", "importlib", "logging"),
    *("multiprocessing", "tkinter", "unittest", "urllib", "wsgiref", "xml"),
)
STATEMENTS = ("for", "if", "raise", "return", "self", "try")
TOKENS = ("name", "keyword", "string", "newline", "(", ")", ".", ",", "=", ":")
Cuts = list[tuple[int, str]]  # (offset in the source, label of what follows)


def package(root: Path | None = None) -> Task:
    """Function -> its package, one of 12. Floors .196, .822: words alone nearly settle it."""
    labelled = ((f, _head(source), f.package) for f, source in _sources() if f.package in PACKAGES)
    return _task("package", PACKAGES, labelled, None)


def next_statement(root: Path | None = None) -> Task:
    """The beginning of a function, up to the start of a statement -> its first word, one of 6, balanced.

    Floors .167, .383; a table of the previous two lines' first words and indents reaches only .45.
    """
    return _task("next_statement", STATEMENTS, _prompts(statement_cuts), {"train": 800, "valid": 30, "test": 100})


def next_token(root: Path | None = None) -> Task:
    """The beginning of a function, up to the start of a token -> the token's kind, one of 10, balanced.

    Floors .100, .183; a table of the last two tokens reaches .51: order decides, as in language modelling.
    """
    return _task("next_token", TOKENS, _prompts(token_cuts), {"train": 700, "valid": 20, "test": 60})


def _head(source: str) -> str:
    """Return the first whole lines that fit in `CHARS`."""
    return next(iter(clean.cut(source, CHARS)), "") if len(source) > CHARS else source


def _sources() -> Iterator[tuple[Function, str]]:
    """Yield the functions that are not too short, and their source without the docstring, too long for a prompt."""
    for function in functions():
        if not is_short(function.source) and (source := _without_docstring(function)):
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


def _prompts(find_cuts: Callable[[str], Cuts]) -> Iterator[tuple[Function, str, str]]:
    """Yield (function, prompt, label) for a few cuts of each function, chosen by a hash."""
    for function, source in _sources():
        cuts = [(at, label) for at, label in find_cuts(source) if at <= CHARS]
        for at, label in sorted(cuts, key=lambda cut: _hash(f"{function.id} {cut[0]}"))[:_CUTS_PER_FUNCTION]:
            yield function, source[:at], label


def _line_offsets(source: str) -> list[int]:
    offsets = [0]
    for line in clean.lines(source):
        offsets.append(offsets[-1] + len(line))
    return offsets


def statement_cuts(source: str) -> Cuts:
    """Return the cuts before statements that begin their line, from the second statement of the body on."""
    node = _parse(source)
    if node is None or not source.isascii():  # ast counts columns in bytes
        return []
    offsets, cuts = _line_offsets(source), []
    for statement in sorted((n for n in ast.walk(node) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)[2:]:
        line = offsets[statement.lineno - 1]
        at = line + statement.col_offset
        word = next((word for word in STATEMENTS if source.startswith(word, at)), None)
        following = source[at + len(word) : at + len(word) + 1] if word else "x"
        if not source[line:at].strip() and not (following.isalnum() or following == "_"):
            cuts.append((at, word))
    return cuts


def token_cuts(source: str) -> Cuts:
    """Return the cuts before tokens, from the ninth on: the prompt holds some context then."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return []
    offsets = _line_offsets(source)
    return [(offsets[t.start[0] - 1] + t.start[1], kind) for t in tokens[8:] if (kind := _kind(t)) in TOKENS]


def _kind(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    return {tokenize.STRING: "string", tokenize.NEWLINE: "newline"}.get(token.type, token.string)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _task(
    name: str, choices: tuple[str, ...], labelled: Iterable[tuple[Function, str, str]], caps: dict[str, int] | None
) -> Task:
    """Return a task of (function, prompt, label), split by the functions' parts.

    caps: most rows per label of each part. A prompt occurs in one part, and once.
    """
    parts: dict[str, dict[str, TaskRow]] = defaultdict(dict)  # part -> normal form of the prompt -> row
    counts: Counter = Counter()
    for function, prompt, label in sorted(labelled, key=lambda item: _hash(f"{item[0].id} {len(item[1])}")):
        rows, key = parts[function.part], normal(prompt)
        if (caps and counts[function.part, label] >= caps[function.part]) or key in rows:
            continue
        counts[function.part, label] += 1
        rows[key] = {"prompt": prompt, "completion": label, "meta": {"id": function.id}}
    test = list(parts["test"].values())
    valid, _ = drop_leaks(list(parts["valid"].values()), test, normal)
    train, dropped = drop_leaks(list(parts["train"].values()), test + valid, normal)
    return Task(f"embedded:{name}", train, valid, test, accuracy, list(choices), dropped)
