"""Options without training: the answer of the nearest example, and prompts, answered freely or by the best choice."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ... import InputError
from ...model import Context
from ..choices import continuation_losses, pair_scores, prompt_reads
from ..cluster.signals import Stop
from ..config import Run
from ..evaluate import evenly_spaced, generate_texts, with_rendered_replies
from ..progress import console
from .base_cache import BaseCache
from .example_selection import BM25Examples, EmbeddingExamples, RandomExamples, token_flops
from .prompts import FORMATS, PromptFormat
from .results_log import ResultsLog
from .task_evaluator import BATCH, TaskEvaluator

NEAREST_ANSWER = "the nearest example's answer (BM25), no model"
# Two ways to choose among the task's answers: the highest log p(choice | prompt), or the largest gain over
# log p(choice | a prompt without content), which discounts choices that are likely anyway (arXiv:2104.08315).
CHOICE_RULES, NO_CONTENT = ("most likely choice", "choice with the largest gain"), "N/A"
SAMPLED_ROWS = 64  # rows that choose the prompt format, or tell how long a request is

Row = dict[str, Any]


class Prompting:
    """All options without training on one task, with the base of `config` and at most `shots` worked examples.

    Options that are in the log are not measured again.
    """

    def __init__(
        self, config: Run, shots: int, evaluator: TaskEvaluator, cache: BaseCache, log: ResultsLog, stop: Stop
    ):
        self.evaluator, self.log, self.stop = evaluator, log, stop
        self.tokenizer, self.rows, self.choices = evaluator.tokenizer, evaluator.rows, evaluator.task.choices
        self.model, self.params = cache.model(config)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.params))
        self.train = with_rendered_replies(evaluator.task.train, self.tokenizer)
        self.k = min(shots, len(self.train))
        base = cache.base(config)
        context, T = base.config.context, base.config.context
        if base.run.phase == "pretrain" and "imported" not in base.manifest:
            T = base.run.data.T  # a base cannot use more text than a training row held, whatever its context allows
        self.formats = [PromptFormat(name, self.tokenizer, min(T, context) - evaluator.new) for name in FORMATS]
        if evaluator.longest_prompt > self.formats[0].max_tokens:
            self.formats = [PromptFormat(name, self.tokenizer, context - evaluator.new) for name in FORMATS]

    @cached_property
    def bm25(self) -> BM25Examples:
        """BM25 over the training examples."""
        return BM25Examples(self.train)

    def request_cost(self) -> dict[str, float]:
        """Return tokens and FLOPs of a request to a tuned model: a chat without examples, and its answer."""
        rows, chat = evenly_spaced(self.rows, SAMPLED_ROWS), self.formats[0]
        prompt = float(np.mean([len(ids) for ids in chat.prompts(rows, [[] for _ in rows])]))
        tokens = prompt + self._answer_tokens(chat)
        flops = tokens * token_flops(self.model.config, self.parameters, prompt)
        return {"prompt_tokens": prompt, "request_tokens": tokens, "request_flops": flops}

    def _answer_tokens(self, prompt_format: PromptFormat) -> float:
        """Return the mean tokens of an expected answer."""
        rows = evenly_spaced(self.rows, SAMPLED_ROWS)
        return float(np.mean([len(prompt_format.continuations(row, [row["completion"]])[0]) for row in rows]))

    def run(self) -> None:
        """Measure the options that the log does not have yet."""
        self._add(NEAREST_ANSWER, self.bm25, self._nearest_answers)
        self.format = self._choose_format()
        selections: dict[str, Callable[[], RandomExamples | None]] = {
            "zero-shot": lambda: None,
            f"{self.k} {RandomExamples.label}": lambda: RandomExamples(self.train),
            f"{self.k} {BM25Examples.label}": lambda: self.bm25,
            f"{self.k} {EmbeddingExamples.label}": lambda: EmbeddingExamples(
                self.train, self.model, self.params, self.tokenizer
            ),
        }
        for name, make in selections.items():
            names = [name, *(f"{name}, {rule}" for rule in CHOICE_RULES if self.choices)]
            if not all(self.log.select(kind="option", name=each) for each in names):
                self._measure_prompts(name, make())

    def _add(self, name: str, selection: RandomExamples | None, answer: Callable[[], Any]) -> None:
        """Log an option; answer() -> (answers to all rows, costs of a request)."""
        if self.log.select(kind="option", name=name):
            return
        self.stop.check()
        answers, costs = answer()
        line: dict[str, Any] = {"kind": "option", "name": name, "examples": 0, "bytes": 0, "prepare_flops": 0.0,
                                "prepare_seconds": 0.0}  # fmt: skip
        if selection:
            line |= {"examples": len(self.train) if selection.bytes else self.k, "bytes": selection.bytes,
                     "prepare_flops": selection.prepare_flops,
                     "prepare_seconds": selection.prepare_seconds}  # fmt: skip
        line = self.log.add({**line, **costs, **self.evaluator.score(answers)})
        console.print(f"{name}: {self.evaluator.metric} {line['score']:.4f}, {line['request_seconds'] * 1e3:.1f} ms "
                      f"and {line['prompt_tokens']:.0f} prompt tokens per request", soft_wrap=True)  # fmt: skip

    def _select(self, selection: RandomExamples | None, rows: Sequence[Row]) -> tuple[list[list[Row]], float]:
        """Return (worked examples for each row, seconds per row)."""
        if selection is None:
            return [[] for _ in rows], 0.0
        selection.nearest(rows, self.k)  # compiles
        start = time.perf_counter()
        examples = [[self.train[i] for i in indices] for indices in selection.nearest(rows, self.k)]
        return examples, (time.perf_counter() - start) / len(rows)

    def _nearest_answers(self) -> tuple[list[str], dict[str, float]]:
        examples, seconds = self._select(self.bm25, self.rows)
        answers = [some[-1]["completion"] for some in examples]
        return answers, {"prompt_tokens": 0, "request_flops": 0.0, "request_seconds": seconds}

    def _choose_format(self) -> PromptFormat:
        """Return the format in which the expected answers of validation rows are the most likely.

        A format that the tokenizer or its chat template does not support is left out. Raises InputError if all are.
        """
        if lines := self.log.select(kind="prompt_format"):
            return next(each for each in self.formats if each.name == lines[0]["format"])
        rows = evenly_spaced(self.evaluator.task.valid or self.train, SAMPLED_ROWS)
        examples, losses, error_text = self._select(self.bm25, rows)[0], {}, ""
        for each in self.formats:
            try:
                prompts = each.prompts(rows, examples)
                answers = [each.continuations(row, [row["completion"]])[0] for row in rows]
            except InputError as error:
                error_text = f"{each.name}: {error}"
                console.print(f"no prompts as {error_text}", soft_wrap=True)
                continue
            pairs = list(zip(prompts, answers, strict=True))
            losses[each.name] = float(pair_scores(self.model, self.params, Context(), pairs)[0].mean())
        if not losses:
            raise InputError(f"no prompt format works for this task and base: {error_text}")
        best = min((each for each in self.formats if each.name in losses), key=lambda each: losses[each.name])
        self.log.add({"kind": "prompt_format", "format": best.name, "losses": losses})
        by_format = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
        console.print(f"prompts as {best.name}: nats per answer on {len(rows)} rows: {by_format}", soft_wrap=True)
        return best

    def _measure_prompts(self, name: str, selection: RandomExamples | None) -> None:
        """Log the free answers to the prompts and, for a task with choices, the best choices."""
        examples, select_seconds = self._select(selection, self.rows)
        prompts = self.format.prompts(self.rows, examples)
        tokens = float(np.mean([len(prompt) for prompt in prompts]))
        per_token = token_flops(self.model.config, self.parameters, tokens)
        select_flops = selection.query_flops if selection else 0.0

        def costs(flops: float, seconds: float) -> dict[str, float]:
            return {"prompt_tokens": tokens, "request_flops": flops + select_flops,
                    "request_seconds": seconds + select_seconds}  # fmt: skip

        def free_answers() -> tuple[list[str], dict[str, float]]:
            answers, seconds = self._timed(self._generate, prompts)
            return answers, costs((tokens + self._answer_tokens(self.format)) * per_token, seconds)

        self._add(name, selection, free_answers)
        if not self.choices:
            return
        continuations = self.format.continuations(self.rows[0], self.choices)
        losses, seconds = self._timed(lambda some: self._choice_losses(some, continuations), prompts)
        reads = prompt_reads(self.model, prompts, continuations)
        choice_costs = costs((reads * tokens + sum(map(len, continuations))) * per_token, seconds)
        no_content = self.format.prompts([{"prompt": NO_CONTENT, "completion": NO_CONTENT}], [[]])
        for rule, offset in zip(CHOICE_RULES, (0.0, self._choice_losses(no_content, continuations)), strict=True):
            answers = [self.choices[i] for i in (losses - offset).argmin(1)]
            self._add(f"{name}, {rule}", selection, lambda answers=answers: (answers, choice_costs))

    def _timed(self, work: Callable[[Any], Any], prompts: Any) -> tuple[Any, float]:
        """Return (work(prompts), seconds per prompt), without compilation."""
        work(sorted(prompts, key=len)[-BATCH:])  # the longest prompts compile what serves all
        start = time.perf_counter()
        return work(prompts), (time.perf_counter() - start) / len(prompts)

    def _generate(self, prompts: Any) -> list[str]:
        texts = generate_texts(self.model, self.params, Context(), self.tokenizer, prompts, self.evaluator.new,
                               batch=min(BATCH, len(prompts)))  # fmt: skip
        return [self.format.extract_answer(text) for text in texts]

    def _choice_losses(self, prompts: Any, continuations: Any) -> np.ndarray:
        """Return the nats of each choice after each prompt [prompts, choices]."""
        return continuation_losses(self.model, self.params, Context(), prompts, continuations)
