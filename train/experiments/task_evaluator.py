"""Exams: the rows that a task is judged on, the score that counts, and answer sheets as lines of results."""

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from ...data.sft import render_prompts
from ..config import Run, did_you_mean
from ..evaluate import evenly_spaced, generate_answers, longest_reply, row_chats, scored_rows
from ..inputs import load_task, report_row_errors, with_answerable_rows
from .base_cache import BaseCache
from .stats import by_row

SHOWN = 12  # rows whose answers are shown side by side
BATCH = 50  # rows that are answered at once


@dataclasses.dataclass(frozen=True)
class TaskEvaluator:
    """The test of a task, or its validation rows where it has none, which then judge and choose at once."""

    name: str  # as it was given: a task's name, or a file
    metric: str
    task: Any
    rows: tuple[Any, ...]
    new: int  # tokens of the longest answer
    tokenizer: Any
    seen: set[str] = dataclasses.field(default_factory=set, compare=False)  # kinds that are compiled

    @property
    def label(self) -> str:
        """What it is called: a file by its name."""
        return Path(self.name).name

    @classmethod
    def read(cls, said: str, run: Run, ground: BaseCache, metric: str = "") -> "TaskEvaluator":
        """TASK or TASK@METRIC, below a run's --data.root. InputError for a metric that the task does not have."""
        name, asked = cls.parted(said)
        base, bad = ground.base(run), run.data.row_errors()
        task = load_task(dataclasses.replace(run.data, task=name), bad)
        task = with_answerable_rows(task, base.tokenizer, base.config, 0, bad)
        report_row_errors(bad)
        rows = scored_rows(task, base.tokenizer, run.eval_rows)
        if not rows:
            raise InputError(f"--task {said}: no row to score; give --data.test FILE, or --data.held-out above 0")
        has = list(task.score(rows, [row["completion"] for row in rows]))
        metric = metric or asked
        if (metric or name != said) and metric not in has:
            raise InputError(f"{task.name} has no score {metric!r}{did_you_mean(metric, has)}; it has {', '.join(has)}")
        return cls(name, metric or has[0], task, tuple(rows), longest_reply(rows, base.tokenizer), base.tokenizer)

    @staticmethod
    def parted(said: str) -> tuple[str, str]:
        """(TASK, METRIC or "") of TASK@METRIC, or of TASK alone. The first @ behind hub: names a split."""
        found = re.fullmatch(r"(hub:[^@]*(?:@[^@]*)?|[^@]*)(?:@(.*))?", said)
        return (said, "") if os.path.exists(said) or not found else (found[1], found[2] or "")

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, as a chat."""
        return max(map(len, render_prompts(row_chats(self.rows), self.tokenizer)))

    @property
    def part(self) -> str:
        """Which part of the task its rows are."""
        return "test" if self.task.test else "validation"

    @property
    def digest(self) -> str:
        """sha256 of the rows and what they are judged by."""
        return hashlib.sha256(json.dumps([self.metric, *self.rows], sort_keys=True, default=vars).encode()).hexdigest()

    def answers(self, bound: Any, rows: Sequence[Any] = ()) -> list[str]:
        """What (model, bound parameters, context) answers, greedily; rows: others than the exam's."""
        rows, (model, params, context) = rows or self.rows, bound
        return generate_answers(model, params, context, self.tokenizer, rows, self.new, batch=min(BATCH, len(rows)))

    def sheet(self, answers: Sequence[str]) -> dict[str, Any]:
        """{"score", "scores": all that the task has, "marks" or "draws" for the bootstrap, "samples"}."""
        rows, given = list(self.rows), list(answers)
        scores = self.task.score(rows, given)
        samples = evenly_spaced(given, SHOWN)
        return {"score": scores[self.metric], "scores": scores,
                **by_row(self.task.score, self.metric, rows, given), "samples": samples}  # fmt: skip

    @property
    def longest(self) -> list[Any]:
        """As many rows as are answered at once, the longest among them: their shapes are those of all."""
        return sorted(self.rows, key=lambda row: len(str(row["prompt"])))[-BATCH:]

    def gold(self) -> float:
        """The score of the answers that are wanted."""
        return self.task.score(list(self.rows), [row["completion"] for row in self.rows])[self.metric]

    def shown(self) -> list[dict[str, str]]:
        """The rows whose answers `sheet` keeps."""
        return [{"prompt": str(row["prompt"]), "wanted": row["completion"]} for row in evenly_spaced(self.rows, SHOWN)]

    def timed(self, bound: Any) -> dict[str, Any]:
        """The sheet of all rows, and the seconds it took; compiling, which the first of a kind must, does not count."""
        kind = str((jax.tree.map(jnp.shape, (bound[1], bound[2].past)), bound[2].tokens))
        if kind not in self.seen:
            self.seen.add(kind)
            self.answers(bound, self.longest)
        began = time.perf_counter()
        answers = self.answers(bound)
        seconds = time.perf_counter() - began
        return self.sheet(answers) | {"seconds": seconds}
