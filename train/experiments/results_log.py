"""results.jsonl of a comparison or decision: one line for each result, so that a resumed experiment repeats nothing.

Kinds of lines: `setup` (once), `base` (a task's score by the untuned base), `cost` (a method's training step), `search`
(a learning rate on seed 0), `test` (a method and seed on a task's test); of a decision also `question` (what is asked
for), `prompt_format` and `option` (an approach without training).
"""

import json
from pathlib import Path
from typing import Any

from ... import InputError
from ...atomic import atomic_write

Line = dict[str, Any]

# Names in files of earlier versions: they are read under today's names.
RENAMED_KINDS = {"asked": "question", "form": "prompt_format"}
RENAMED_KEYS = {"marks": "row_correct", "draws": "resampled_scores", "wanted": "expected", "form": "format",
                "virtual": "virtual_tokens", "evaluating": "evaluate_seconds", "made_flops": "prepare_flops",
                "made_seconds": "prepare_seconds", "gold": "reference_score"}  # fmt: skip
RENAMED_OPTIONS = {"examples by lot": "random examples", "by the base's states": "by embedding",
                   "the likeliest choice": "most likely choice",
                   "the choice that gains most": "choice with the largest gain"}  # fmt: skip


class ResultsLog:
    """The lines of a results file, in the order in which they were added."""

    def __init__(self, path: Path):
        self.path, self.lines = path, read_results(path) if path.exists() else []

    def select(self, **values: Any) -> list[Line]:
        """Return the lines that have these values."""
        return select(self.lines, **values)

    def add(self, line: Line) -> Line:
        """Append a line; the file is complete at any moment."""
        self.lines.append(line)
        atomic_write(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines))
        return line


def read_results(path: Path) -> list[Line]:
    """Return the lines of a results file, with today's names. Raises InputError for another file."""
    try:
        return [_with_new_names(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a results file ({error}); take another folder") from None


def select(lines: list[Line], **values: Any) -> list[Line]:
    """Return the lines that have these values."""
    return [line for line in lines if values.items() <= line.items()]


def _with_new_names(line: Line) -> Line:
    line = {RENAMED_KEYS.get(key, key): value for key, value in line.items()}
    line["kind"] = RENAMED_KINDS.get(line.get("kind", ""), line.get("kind", ""))
    for task in line.get("tasks", {}).values():
        task["shown"] = [{RENAMED_KEYS.get(key, key): text for key, text in row.items()} for row in task["shown"]]
    if line["kind"] == "option":
        for old, new in RENAMED_OPTIONS.items():
            line["name"] = line["name"].replace(old, new)
    return line
