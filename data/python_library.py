"""The corpus every Python carries: the source of its standard library (code) and the documentation in it (prose).

Functions are also split train/valid/test for the tasks of tasks/python_functions.py. The code and prose of valid and test
functions can be left out of the corpus, so that a base pretrained here has not read what it is later tested on.
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

# Tests and demos, codec tables, what others installed, and the topics (they are prose).
_SKIP = {"test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data", "ensurepip", "site-packages"}
_SKIP |= {"dist-packages", "__pycache__", "__phello__"}
_TEST, _VALID = 0.12, 0.04  # of the functions
_Def = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """A function or method that is not inside another function; `part` is train, valid or test."""

    id: str  # json/decoder.py:332:JSONDecoder.decode
    package: str  # json; "" for a module that is in no package
    source: str  # dedented, decorators included
    first: int  # lines of the module, from 1
    last: int
    docstring: str
    part: str


class _Module(NamedTuple):
    id: str
    text: str
    docstrings: list[tuple[int, str]]  # (line of the owner, text)
    functions: list[Function]


def code(exclude_task_test: bool = True) -> Iterator[Document]:
    """One document a module; unless told otherwise the lines of valid and test functions are cut out of it."""
    for module in _modules():
        lines = clean.lines(module.text)
        for function in module.functions if exclude_task_test else []:
            if function.part != "train":
                lines[function.first - 1 : function.last] = [""] * (function.last - function.first + 1)
        yield Document(module.id, "".join(lines))


def prose(exclude_task_test: bool = True) -> Iterator[Document]:
    """One document of docstrings a module, then the language reference's topics; ids equal those of `code`, so that a
    module is held out of both or of neither.
    """
    held = {f.docstring for f in functions() if f.part != "train"} if exclude_task_test else set()
    for module in _modules():
        inside = [(f.first, f.last) for f in module.functions if f.part != "train"] if exclude_task_test else []
        kept = [
            text
            for line, text in module.docstrings
            if text not in held and not any(first <= line <= last for first, last in inside)
        ]
        if kept:
            yield Document(module.id, "\n\n".join(kept) + "\n")
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(f"topics/{name}", inspect.cleandoc(text) + "\n")


def functions() -> list[Function]:
    """All functions of the corpus, in the order of modules and lines."""
    return [function for module in _modules() for function in module.functions]


def normal(source: str) -> str:
    """Source without comments and layout: what makes two copies of a function the same."""
    return " ".join(re.sub(r"#[^\n]*", "", source).split())


def part(source: str) -> str:
    """train, valid or test, by a hash of the normalised source: copies of one function fall on the same side."""
    if source.count("\n") < 3 or len(source) < 100:
        return "train"  # `def __len__(self): return ...`: too short to test, and its copies are everywhere
    key = normal(source)
    return "test" if is_held_out(key, _TEST) else "valid" if is_held_out(key, _TEST + _VALID) else "train"


@functools.cache
def _modules() -> tuple[_Module, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not _SKIP & set(p.relative_to(root).parts))
    found = tuple(m for m in (_module(p, p.relative_to(root).as_posix()) for p in paths) if m)
    if not found:
        raise InputError(f"{root}: holds no standard library sources; use a Python that was installed with them")
    return found


def _module(path: Path, name: str) -> _Module | None:
    with tokenize.open(path) as file:  # honours the coding line
        text = file.read()
    if not text.strip():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(text)
    lines = clean.lines(text)
    package = name.partition("/")[0] if "/" in name else ""
    found = [_function(node, qualname, name, package, lines) for node, qualname in _walk(tree, "")]
    return _Module(name, text, _docstrings(tree), found)


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[_Def, str]]:
    """(function, qualified name), not looking inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child, prefix + child.name
        else:
            yield from _walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


def _function(node: _Def, qualname: str, module: str, package: str, lines: list[str]) -> Function:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno or first  # None only in a tree that was not parsed
    raw = lines[first - 1 : last]
    margin = len(raw[0]) - len(raw[0].lstrip())
    source = "".join(line[margin:] if not line[:margin].strip() else line for line in raw)
    docstring = ast.get_docstring(node) or ""
    return Function(f"{module}:{first}:{qualname}", package, source, first, last, docstring, part(source))


def _docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, owners) and (text := ast.get_docstring(node)):
            found.append((getattr(node, "lineno", 0), text))
    return sorted(found, key=lambda pair: pair[0])
