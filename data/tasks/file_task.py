"""Tasks from files of examples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import InputError
from ..columns import Columns, chat_of
from ..dialogue import Chat
from ..documents import is_held_out
from ..errors import RAISE, RowErrors
from ..sources import rows as source_rows
from .base import Row, Task, drop_leaks, exact_match

MOST = 1000  # choices of a file of examples


def _words(prompt: Any) -> str:
    """A prompt, or turns, without regard to white space: a copy with another line end is a copy."""
    return " ".join((prompt if isinstance(prompt, str) else json.dumps(prompt)).split())


def row_of(chat: Chat, where: str) -> Row:
    """A task's row of a dialogue. InputError if it does not end with a reply."""
    *earlier, last = chat.messages
    if last["role"] != "assistant":
        said = f"the last message is from {last['role']}"
        raise InputError(f"{where}: {said}; a reply by assistant is wanted, add one or drop the row")
    pair = len(earlier) == 1 and earlier[0]["role"] == "user"
    prompt = earlier[0]["content"] if pair else earlier
    return {"prompt": prompt, "completion": last["content"] or "", "where": where, "chat": chat}


def file_rows(path: Path | str, errors: RowErrors = RAISE, columns: Columns = Columns()) -> list[Row]:  # noqa: B008
    """All rows of a file of examples, checked. InputError: a bad row, unless `errors` says otherwise, or none left."""
    rows: list[Row] = []
    for where, row in source_rows(str(path), errors):
        with errors:
            rows.append(row_of(chat_of(row, where, errors, columns), where))
    if not rows:
        errors.check_cap()
        raise InputError(f"{path}: no row of it can be used; mend the file")
    return rows


def file_task(
    path: Path | str, fraction: float, seed: int = 0, errors: RowErrors = RAISE, valid: str = "", test: str = "",
    columns: Columns = Columns(),  # noqa: B008
) -> Task:  # fmt: skip
    """The rows of a file to train on, and rows to choose by (valid) and to judge on (test). Score: exact match.

    valid, test: files of such rows. For what is not given, `fraction` of the training file's prompts, by hash, is held
    out: half of them for each, or all for the one that is missing; if they are too few for both, all are valid.

    InputError: a bad row, unless `errors` says otherwise, or nothing left on one side.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"--data.held-out {fraction:g}: wanted a number of 0 or more, below 1")
    rows, files = file_rows(path, errors, columns), {"valid": valid, "test": test}
    free = [part for part, file in files.items() if not file]  # what the training file itself must give
    parts: dict[str, list[Row]] = {
        part: file_rows(file, errors, columns) if file else [] for part, file in files.items()
    }
    parts["train"] = []
    for row in rows:
        said = f"{seed}/{json.dumps(row['prompt'])}"  # by prompt: its repetitions stay on one side
        held = free and is_held_out(said, fraction)
        parts[free[-1 if is_held_out(f"test/{said}", 0.5) else 0] if held else "train"].append(row)
    train, dropped = drop_leaks(parts["train"], parts["valid"] + parts["test"], _words)
    kept, leaked = drop_leaks(parts["valid"], parts["test"], _words)
    parts |= {"train": train, "valid": kept}
    if len(free) == 2 and not (kept and parts["test"]):
        parts |= {"valid": kept + parts["test"], "test": []}
    if not train or not parts["valid"]:
        errors.check_cap()  # too many bad rows may be why
    if not train:
        raise InputError(f"{path}: {len(rows)} rows leave none for training: all prompts are held out; give more rows")
    if valid and not kept:
        raise InputError(f"--data.valid {valid}: every prompt is among the test rows too; give other rows")
    if fraction and not parts["valid"]:
        raise InputError(f"{path}: {len(rows)} rows leave none for validation at --data.held-out {fraction:g}; give "
                         "more, or --data.valid FILE, or train on all of them with --data.held-out 0")  # fmt: skip
    choices = _few(train, parts["valid"] + parts["test"])
    return Task(Path(path).stem, **parts, score=_exact, choices=choices, dropped=dropped + leaked)


def whole_task(
    path: Path | str, errors: RowErrors = RAISE, train: Sequence[Row] = (), columns: Columns = Columns()  # noqa: B008
) -> Task:  # fmt: skip
    """All rows of a file to judge on, by exact match. Its choices are those of `train` if they are this file's too."""
    rows = file_rows(path, errors, columns)
    return Task(Path(path).stem, [], [], rows, _exact, _few(train, rows) or _few(rows, []))


def same_prompts(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """How many rows have the prompt of one of the others, white space aside."""
    return drop_leaks(list(rows), list(others), _words)[1]


def _exact(rows: list[Row], outputs: list[str]) -> dict[str, float]:
    return {"exact_match": exact_match(rows, outputs)}


def _few(train: Sequence[Row], held: Sequence[Row]) -> list[str] | None:
    """The completions, if they are choices: no others are held out, each stands in several rows, all are text alone."""
    if not all(row["chat"].replies_in_text for row in (*train, *held)):
        return None
    known = {row["completion"] for row in train}
    few = 1 < len(known) <= min(MOST, len(train) / 4) and all(row["completion"] in known for row in held)
    return sorted(known) if few else None
