"""Evaluators: the rows that a task is scored on, the metric that counts, and scored answers as lines of results."""

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from ... import InputError
from ...data.sft import render_prompts
from ..config import Run, did_you_mean
from ..evaluate import evenly_spaced, generate_answers, longest_reply, row_chats, scored_rows
from ..inputs import load_task, report_row_errors, with_answerable_rows
from .base_cache import BaseCache
from .stats import resampled_scores

SHOWN = 12  # rows whose answers the reports show
BATCH = 50  # rows that are answered at a time


@dataclasses.dataclass(frozen=True)
class TaskEvaluator:
    """The test rows of a task and one of its metrics; for a task without a test, its validation rows."""

    name: str  # as it was given: a task's name, or a file
    metric: str
    task: Any
    rows: tuple[Any, ...]
    new: int  # tokens of the longest answer
    tokenizer: Any
    compiled: set[str] = dataclasses.field(default_factory=set, compare=False)  # shapes that were answered before

    @property
    def label(self) -> str:
        """The name; of a file without its folder."""
        return Path(self.name).name

    @classmethod
    def read(cls, text: str, run: Run, cache: BaseCache, metric: str = "") -> Self:
        """Return the evaluator of TASK or TASK@METRIC; tasks are read below the run's --data.root.

        Raises InputError for a metric that the task does not have, and for a task without rows to score.
        """
        name, named_metric = cls.split_metric(text)
        base, bad = cache.base(run), run.data.row_errors()
        task = load_task(dataclasses.replace(run.data, task=name), bad)
        task = with_answerable_rows(task, base.tokenizer, base.config, 0, bad)
        report_row_errors(bad)
        rows = scored_rows(task, base.tokenizer, run.eval_rows)
        if not rows:
            raise InputError(f"--task {text}: no row to score; give --data.test FILE, or --data.held-out above 0")
        metrics = list(task.score(rows, [row["completion"] for row in rows]))
        metric = metric or named_metric
        if (metric or name != text) and metric not in metrics:
            near = did_you_mean(metric, metrics)
            raise InputError(f"{task.name} has no score {metric!r}{near}; it has {', '.join(metrics)}")
        new = longest_reply(rows, base.tokenizer)
        return cls(name, metric or metrics[0], task, tuple(rows), new, base.tokenizer)

    @staticmethod
    def split_metric(text: str) -> tuple[str, str]:
        """Return (TASK, METRIC) for TASK@METRIC, (TASK, "") for TASK. The first @ after hub: names a split."""
        match = re.fullmatch(r"(hub:[^@]*(?:@[^@]*)?|[^@]*)(?:@(.*))?", text)
        return (text, "") if os.path.exists(text) or not match else (match[1], match[2] or "")

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, as a chat."""
        return max(map(len, render_prompts(row_chats(self.rows), self.tokenizer)))

    @property
    def part(self) -> str:
        """The part of the task that the rows are: test or validation."""
        return "test" if self.task.test else "validation"

    @property
    def digest(self) -> str:
        """sha256 of the metric and the rows."""
        return hashlib.sha256(json.dumps([self.metric, *self.rows], sort_keys=True, default=vars).encode()).hexdigest()

    def score(self, answers: Sequence[str]) -> dict[str, Any]:
        """Return {"score", "scores" of all metrics, "samples": answers of the shown rows} and `resampled_scores`."""
        rows, answers = list(self.rows), list(answers)
        scores = self.task.score(rows, answers)
        return {"score": scores[self.metric], "scores": scores,
                **resampled_scores(self.task.score, self.metric, rows, answers),
                "samples": evenly_spaced(answers, SHOWN)}  # fmt: skip

    def timed_score(self, bound: Any) -> dict[str, Any]:
        """Return the score of greedy answers by `bound` (model, bound parameters, context), and the "seconds" it took.

        Compilation, once for each kind of shapes, is not counted.
        """
        shapes = str((jax.tree.map(jnp.shape, (bound[1], bound[2].past)), bound[2].tokens))
        if shapes not in self.compiled:
            self.compiled.add(shapes)
            # A batch with the longest rows has the shapes of all batches.
            self._answers(bound, sorted(self.rows, key=lambda row: len(str(row["prompt"])))[-BATCH:])
        start = time.perf_counter()
        answers = self._answers(bound, self.rows)
        seconds = time.perf_counter() - start
        return self.score(answers) | {"seconds": seconds}

    def _answers(self, bound: Any, rows: Sequence[Any]) -> list[str]:
        model, params, context = bound
        return generate_answers(model, params, context, self.tokenizer, rows, self.new, batch=min(BATCH, len(rows)))

    def reference_score(self) -> float:
        """Return the score of the expected answers: the highest possible one."""
        return self.task.score(list(self.rows), [row["completion"] for row in self.rows])[self.metric]

    def shown_rows(self) -> list[dict[str, str]]:
        """Return the rows whose answers are "samples" of `score`."""
        return [{"prompt": str(row["prompt"]), "expected": row["completion"]}
                for row in evenly_spaced(self.rows, SHOWN)]  # fmt: skip
