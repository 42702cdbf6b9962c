"""What a fine-tune is judged on: train, valid and test rows, and a score. Held-out prompts never occur in train."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ... import InputError

# {"prompt": str or earlier turns, "completion": str}, maybe "meta" and "where"; of a file also "chat", the whole Chat
Row = dict[str, Any]
Score = Callable[[list[Row], list[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """`score(rows, outputs)` gives named numbers, the headline first. `choices`: all completions, if they are few."""

    name: str
    train: list[Row]
    valid: list[Row]
    test: list[Row]
    score: Score
    choices: list[str] | None = None
    dropped: int = 0  # train and valid rows left out because their prompt is held out

    def pairs(self, part: str = "train") -> Iterator[tuple[str, Row]]:
        """("where", row) of one part, as `sft_rows` takes them."""
        for n, row in enumerate(getattr(self, part), 1):
            yield row.get("where", f"{self.name}/{part}:{n}"), row


def exact_match(rows: list[Row], outputs: list[str]) -> float:
    """The share of outputs equal to the completion, outer white space aside."""
    if not rows:
        raise InputError("exact match: no rows to score; at least one is wanted")
    return sum(o.strip() == r["completion"].strip() for r, o in zip(rows, outputs, strict=True)) / len(rows)


def accuracy(rows: list[Row], outputs: list[str]) -> dict[str, float]:
    """{"accuracy": exact match}, for a task with choices."""
    return {"accuracy": exact_match(rows, outputs)}


def drop_leaks(rows: list[Row], held: list[Row], key: Callable[[str], str] = str.strip) -> tuple[list[Row], int]:
    """(rows whose prompt, under `key`, is not among the prompts of `held`, how many were dropped)."""
    banned = {key(row["prompt"]) for row in held}
    kept = [row for row in rows if key(row["prompt"]) not in banned]
    return kept, len(rows) - len(kept)


def floors(task: Task) -> dict[str, float]:
    """Test exact match of the most frequent train completion, and of unigram naive Bayes (add one)."""
    words: dict[str, Counter] = defaultdict(Counter)
    labels: Counter = Counter()
    for row in task.train:
        labels[row["completion"]] += 1
        words[row["completion"]].update(re.findall(r"\w+", row["prompt"]))
    vocabulary = set().union(*words.values())
    totals = {label: sum(words[label].values()) + len(vocabulary) for label in labels}

    def likelihood(label: str, seen: list[str]) -> float:
        return math.log(labels[label]) + sum(math.log((words[label][w] + 1) / totals[label]) for w in seen)

    def bayes(prompt: str) -> str:
        seen = [word for word in re.findall(r"\w+", prompt) if word in vocabulary]
        return max(labels, key=lambda label: likelihood(label, seen))

    majority = labels.most_common(1)[0][0]
    return {
        "majority": exact_match(task.test, [majority] * len(task.test)),
        "naive_bayes": exact_match(task.test, [bayes(row["prompt"]) for row in task.test]),
    }


# Name -> (root of the data folder) -> Task; the embedded ones take no notice of root.
