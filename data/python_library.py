"""Embedded corpus: the source code of the running Python's standard library, and the documentation in it (prose).

Its functions are split into train, valid and test for the tasks of tasks/python_functions.py. Code and docstrings of
valid and test functions can be cut out of the corpus, so that a base never reads what it is later tested on.
"""

import ast
import functools
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import InputError
from . import clean
from .documents import Document, is_held_out

# Tests and demos, codec tables, installed packages, and the topics, which are prose.
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data", "ensurepip", "site-packages"}
SKIPPED |= {"dist-packages", "__pycache__", "__phello__"}
_TEST, _VALID = 0.12, 0.04  # shares of the functions
_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """A function or method that is not nested in another function."""

    id: str  # json/decoder.py:332:JSONDecoder.decode
    package: str  # json; "" for a module outside packages
    source: str  # dedented, decorators included
    first: int  # first and last line in the module, from 1
    last: int
    docstring: str
    part: str  # train, valid or test


class Module(NamedTuple):
    """A module of the standard library."""

    id: str
    text: str
    docstrings: list[tuple[int, str]]  # (line of the owner, text)
    functions: list[Function]


def code(exclude_task_test: bool = True) -> Iterator[Document]:
    """Yield a document per module, by default without the lines of valid and test functions."""
    for module in modules():
        lines = clean.lines(module.text)
        for function in _tested(module) if exclude_task_test else []:
            lines[function.first - 1 : function.last] = [""] * (function.last - function.first + 1)
        yield Document(module.id, "".join(lines))


def prose(exclude_task_test: bool = True) -> Iterator[Document]:
    """Yield a document of docstrings per module, by default without valid and test functions; then the topics.

    The topics are the language reference's. The ids equal those of `code`: a module is held out of both or of neither.
    """
    excluded = {f.docstring for module in modules() for f in _tested(module)} if exclude_task_test else set()
    for module in modules():
        ranges = [(f.first, f.last) for f in _tested(module)] if exclude_task_test else []
        kept = [
            text
            for line, text in module.docstrings
            if text not in excluded and not any(first <= line <= last for first, last in ranges)
        ]
        if kept:
            yield Document(module.id, "\n\n".join(kept) + "\n")
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(f"topics/{name}", inspect.cleandoc(text) + "\n")


def functions() -> list[Function]:
    """Return all functions of the corpus, in the order of modules and lines."""
    return [function for module in modules() for function in module.functions]


def normal(source: str) -> str:
    """Return source without comments and layout; two copies of a function have equal normal forms."""
    return " ".join(re.sub(r"#[^\n]*", "", source).split())


def part(source: str) -> str:
    """Return train, valid or test by a hash of the normal form, so that copies of a function are in one part."""
    if is_short(source):
        return "train"  # its copies are everywhere: `def __len__(self): return ...`
    key = normal(source)
    return "test" if is_held_out(key, _TEST) else "valid" if is_held_out(key, _TEST + _VALID) else "train"


def is_short(source: str) -> bool:
    """Return whether a function is too short to ask about."""
    return source.count("\n") < 3 or len(source) < 100


def _tested(module: Module) -> list[Function]:
    return [function for function in module.functions if function.part != "train"]


@functools.cache
def modules() -> tuple[Module, ...]:
    """Return the modules of the corpus, sorted by path. Raises InputError if Python came without sources."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    parsed = tuple(m for m in (parse_module(p, p.relative_to(root).as_posix()) for p in paths) if m)
    if not parsed:
        raise InputError(f"{root}: no standard library sources; use a Python that was installed with them")
    return parsed


def parse_module(path: Path, name: str) -> Module | None:
    """Return the module in a file, with `name` as its id; None for a blank file."""
    with tokenize.open(path) as file:  # honours the coding line
        text = file.read()
    if not text.strip():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(text)
    lines = clean.lines(text)
    package = name.partition("/")[0] if "/" in name else ""
    return Module(name, text, _docstrings(tree), [_function(*pair, name, package, lines) for pair in _walk(tree, "")])


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[_FunctionNode, str]]:
    """Yield (function, qualified name) without descending into functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FunctionNode):
            yield child, prefix + child.name
        else:
            yield from _walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


def _function(node: _FunctionNode, qualname: str, module: str, package: str, lines: list[str]) -> Function:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno or first  # None only in a tree that was not parsed
    raw = lines[first - 1 : last]
    margin = len(raw[0]) - len(raw[0].lstrip())
    source = "".join(line[margin:] if not line[:margin].strip() else line for line in raw)
    docstring = ast.get_docstring(node) or ""
    return Function(f"{module}:{first}:{qualname}", package, source, first, last, docstring, part(source))


def _docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    owners = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | _FunctionNode)]
    docstrings = [(getattr(node, "lineno", 0), text) for node in owners if (text := ast.get_docstring(node))]
    return sorted(docstrings, key=lambda pair: pair[0])
