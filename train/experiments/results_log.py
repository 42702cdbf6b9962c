"""A ledger: results.jsonl, a line for each thing that was found, whole after each; what is in it is not done again."""

import json
from pathlib import Path
from typing import Any

from ... import InputError
from ...atomic import atomic_write

Line = dict[str, Any]


class ResultsLog:
    """The lines of a file of results, in the order in which they were found."""

    def __init__(self, path: Path):
        self.path, self.lines = path, read(path) if path.exists() else []

    def find(self, **key: Any) -> list[Line]:
        """The lines that have these values."""
        return found(self.lines, **key)

    def add(self, line: Line) -> Line:
        """One more; the file is whole at any moment."""
        self.lines.append(line)
        atomic_write(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines))
        return line


def read(path: Path) -> list[Line]:
    """The lines of a file of results. InputError for one that is none."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a file of results ({error}); take another folder") from None


def found(lines: list[Line], **key: Any) -> list[Line]:
    """The lines that have these values."""
    return [line for line in lines if key.items() <= line.items()]
