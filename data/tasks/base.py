"""Tasks: train, validation and test rows with a score. No held-out prompt occurs among the training rows."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ... import InputError

# {"prompt": str or a list of earlier messages, "completion": str}, maybe "meta" and "where" (file:line). A row of a
# file also has "chat", the whole Chat.
TaskRow = dict[str, Any]
Score = Callable[[list[TaskRow], list[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task to fine-tune on and to be judged by.

    score: (rows, outputs) -> named numbers, the headline first.
    choices: all completions, if they are few; else None.
    dropped: number of train and validation rows left out because their prompt is held out.
    """

    name: str
    train: list[TaskRow]
    valid: list[TaskRow]
    test: list[TaskRow]
    score: Score
    choices: list[str] | None = None
    dropped: int = 0

    def pairs(self, part: str = "train") -> Iterator[tuple[str, TaskRow]]:
        """Yield (where, row) of one part, as `sft_rows` takes them."""
        for n, row in enumerate(getattr(self, part), 1):
            yield row.get("where", f"{self.name}/{part}:{n}"), row


def exact_match(rows: list[TaskRow], outputs: list[str]) -> float:
    """Return the share of outputs that equal the completion, ignoring outer white space."""
    if not rows:
        raise InputError("exact match: no rows to score; expected at least one")
    return sum(o.strip() == r["completion"].strip() for r, o in zip(rows, outputs, strict=True)) / len(rows)


def accuracy(rows: list[TaskRow], outputs: list[str]) -> dict[str, float]:
    """Score of a task with choices: {"accuracy": exact match}."""
    return {"accuracy": exact_match(rows, outputs)}


def drop_leaks(
    rows: list[TaskRow], held_out: list[TaskRow], key: Callable[[Any], str] = str.strip
) -> tuple[list[TaskRow], int]:
    """Drop the rows whose prompt occurs in `held_out`; prompts are compared by `key`. Return (rows, number dropped)."""
    leaked = {key(row["prompt"]) for row in held_out}
    kept = [row for row in rows if key(row["prompt"]) not in leaked]
    return kept, len(rows) - len(kept)


def floors(task: Task) -> dict[str, float]:
    """Return the exact match on test of two baselines.

    majority: the most frequent completion of train. naive_bayes: multinomial naive Bayes over the words of the prompt,
    argmax over c of log n(c) + sum over words w of log((n(w, c) + 1) / (n(c's words) + |vocabulary|)).
    """
    word_counts: dict[str, Counter] = defaultdict(Counter)
    label_counts: Counter = Counter()
    for row in task.train:
        label_counts[row["completion"]] += 1
        word_counts[row["completion"]].update(re.findall(r"\w+", row["prompt"]))
    vocabulary = set().union(*word_counts.values())
    totals = {label: sum(word_counts[label].values()) + len(vocabulary) for label in label_counts}

    def log_likelihood(label: str, words: list[str]) -> float:
        counts, total = word_counts[label], totals[label]
        return math.log(label_counts[label]) + sum(math.log((counts[w] + 1) / total) for w in words)

    def most_likely(prompt: str) -> str:
        words = [word for word in re.findall(r"\w+", prompt) if word in vocabulary]
        return max(label_counts, key=lambda label: log_likelihood(label, words))

    majority = label_counts.most_common(1)[0][0]
    return {
        "majority": exact_match(task.test, [majority] * len(task.test)),
        "naive_bayes": exact_match(task.test, [most_likely(row["prompt"]) for row in task.test]),
    }
