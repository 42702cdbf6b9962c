"""A task from files of examples, scored by exact match. What no file gives is held out of the training file."""

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
from .base import Task, TaskRow, drop_leaks, exact_match

MAX_CHOICES = 1000
_OUR_NAMES = Columns()


def file_task(
    path: Path | str,
    fraction: float,
    seed: int = 0,
    errors: RowErrors = RAISE,
    valid: str = "",
    test: str = "",
    columns: Columns = _OUR_NAMES,
) -> Task:
    """Return a task with the rows of a file to train on, rows to select by (valid) and rows to judge by (test).

    valid, test: files of such rows. In place of a missing one, `fraction` of the training file's prompts is held out by
    hash: half of them for each, or all of them if only one is missing. If they are too few for both, all are valid.

    Raises InputError for no rows on one side and, unless `errors` leaves it out, for a row that cannot be used.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"--data.held-out {fraction:g}: expected a number in [0, 1)")
    rows, files = file_rows(path, errors, columns), {"valid": valid, "test": test}
    missing = [name for name, file in files.items() if not file]
    parts = _hold_out(rows, fraction, seed, missing)
    parts |= {name: file_rows(file, errors, columns) for name, file in files.items() if file}
    test_rows = parts["test"]
    train_rows, n_train = drop_leaks(parts["train"], parts["valid"] + test_rows, _normal_prompt)
    valid_rows, n_valid = drop_leaks(parts["valid"], test_rows, _normal_prompt)
    if len(missing) == 2 and not (valid_rows and test_rows):
        valid_rows, test_rows = valid_rows + test_rows, []
    if not train_rows or not valid_rows:
        errors.check_cap()  # too many unusable rows may be the reason
    if not train_rows:
        raise InputError(f"{path}: {len(rows)} rows leave none for training: all prompts are held out; give more rows")
    if valid and not valid_rows:
        raise InputError(f"--data.valid {valid}: every prompt is among the test rows too; give other rows")
    if fraction and not valid_rows:
        hint = "give more, or --data.valid FILE, or train on all of them with --data.held-out 0"
        raise InputError(f"{path}: {len(rows)} rows leave none for validation at --data.held-out {fraction:g}; {hint}")
    choices = _choices(train_rows, valid_rows + test_rows)
    return Task(Path(path).stem, train_rows, valid_rows, test_rows, _score, choices, n_train + n_valid)


def whole_task(
    path: Path | str, errors: RowErrors = RAISE, train: Sequence[TaskRow] = (), columns: Columns = _OUR_NAMES
) -> Task:
    """Return a task whose test rows are all rows of a file.

    Its choices are those of the `train` rows if they cover the file, else the file's own.
    """
    rows = file_rows(path, errors, columns)
    return Task(Path(path).stem, [], [], rows, _score, _choices(train, rows) or _choices(rows, []))


def file_rows(path: Path | str, errors: RowErrors = RAISE, columns: Columns = _OUR_NAMES) -> list[TaskRow]:
    """Return the rows of a file of examples. Raises InputError if none can be used, or at once as `errors` says."""
    rows: list[TaskRow] = []
    for where, row in source_rows(str(path), errors):
        with errors:
            rows.append(row_of(chat_of(row, where, errors, columns), where))
    if not rows:
        errors.check_cap()
        raise InputError(f"{path}: none of its rows can be used; correct the file")
    return rows


def row_of(chat: Chat, where: str) -> TaskRow:
    """Return the task row of a dialogue. Raises InputError if it does not end with a reply."""
    *earlier, last = chat.messages
    if last["role"] != "assistant":
        problem = f"the last message is from {last['role']}; expected a reply by assistant"
        raise InputError(f"{where}: {problem}; add one or drop the row")
    is_pair = len(earlier) == 1 and earlier[0]["role"] == "user"
    prompt = earlier[0]["content"] if is_pair else earlier
    return {"prompt": prompt, "completion": last["content"] or "", "where": where, "chat": chat}


def same_prompts(rows: Sequence[TaskRow], others: Sequence[TaskRow]) -> int:
    """Return how many rows have the prompt of one of `others`, up to white space."""
    return drop_leaks(list(rows), list(others), _normal_prompt)[1]


def _hold_out(rows: list[TaskRow], fraction: float, seed: int, names: list[str]) -> dict[str, list[TaskRow]]:
    """Split rows into train and the held-out `names` (valid, test, both or none) by a hash of the prompt."""
    parts: dict[str, list[TaskRow]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        key = f"{seed}/{json.dumps(row['prompt'])}"  # rows with one prompt stay on one side
        is_held = names and is_held_out(key, fraction)
        name = names[-1 if is_held_out(f"test/{key}", 0.5) else 0] if is_held else "train"
        parts[name].append(row)
    return parts


def _normal_prompt(prompt: Any) -> str:
    """Return a prompt, text or messages, with normal white space: a copy with other line ends is a copy."""
    return " ".join((prompt if isinstance(prompt, str) else json.dumps(prompt)).split())


def _score(rows: list[TaskRow], outputs: list[str]) -> dict[str, float]:
    return {"exact_match": exact_match(rows, outputs)}


def _choices(train: Sequence[TaskRow], held_out: Sequence[TaskRow]) -> list[str] | None:
    """Return the completions if they are choices, else None.

    They are choices if there are few (each occurs 4 times on average), all are plain text, and none is held out only.
    """
    if not all(row["chat"].replies_in_text for row in (*train, *held_out)):
        return None
    completions = {row["completion"] for row in train}
    few = 1 < len(completions) <= min(MAX_CHOICES, len(train) / 4)
    return sorted(completions) if few and all(row["completion"] in completions for row in held_out) else None
