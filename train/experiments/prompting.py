"""The ways to answer that train nothing: the nearest example's answer; prompts, free or with the likeliest choice."""

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
from ..evaluate import evenly_spaced, generate_texts, with_rendered_replies
from ..progress import console
from .base_cache import BaseCache
from .example_selection import BM25Examples, EmbeddingExamples, RandomExamples, token_flops
from .prompts import KINDS, Form
from .results_log import ResultsLog
from .task_evaluator import BATCH, TaskEvaluator

# Of the task's choices: the one with the highest log p(choice | prompt), or with the largest gain over
# log p(choice | a prompt that says nothing), so that what is likely anyhow has no lead (arXiv:2104.08315).
CHOICES, NOTHING = ("the likeliest choice", "the choice that gains most"), "N/A"
TRIED = 64  # rows that choose the form of a prompt, or say how long a request is


class Prompting:
    """All of them on one exam."""

    def __init__(self, plan: Any, exam: TaskEvaluator, ground: BaseCache, ledger: ResultsLog, stop: Stop):
        self.plan, self.exam, self.ledger, self.stop = plan, exam, ledger, stop
        self.model, self.params = ground.model(plan.run)
        base, self.train = ground.base(plan.run), with_rendered_replies(exam.task.train, exam.tokenizer)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.params))
        self.k = min(plan.shots, len(self.train))
        # Text longer than the rows that it was trained on is nothing a base can read, whatever its positions allow.
        imported = "imported" in base.manifest or base.run.phase != "pretrain"
        context, T = base.config.context, base.config.context if imported else base.run.data.T
        self.forms = [Form(kind, exam.tokenizer, min(T, context) - exam.new) for kind in KINDS]
        if exam.longest_prompt > self.forms[0].longest:
            self.forms = [Form(form.kind, exam.tokenizer, context - exam.new) for form in self.forms]

    @cached_property
    def words(self) -> BM25Examples:
        """BM25 over the training examples."""
        return BM25Examples(self.train)

    def request(self) -> dict[str, float]:
        """What a request of a tuned model reads and writes: as a chat, without examples."""
        rows, chat = evenly_spaced(self.exam.rows, TRIED), self.forms[0]
        asked = float(np.mean([len(ids) for ids in chat.prompts(rows, [[] for _ in rows])]))
        answer = self._written_tokens(chat)
        flops = (asked + answer) * token_flops(self.model.config, self.parameters, asked)
        return {"prompt_tokens": asked, "request_tokens": asked + answer, "request_flops": flops}

    def _written_tokens(self, form: Form) -> float:
        """Tokens of an answer, on average."""
        rows = evenly_spaced(self.exam.rows, TRIED)
        return float(np.mean([len(form.tails(row, [row["completion"]])[0]) for row in rows]))

    def go(self) -> None:
        """A line for each, as far as there are none."""
        self._add("the nearest example's answer (BM25), no model", self.words, self._copied)
        self.form = self._chosen_form()
        shelves: dict[str, Callable[[], RandomExamples | None]] = {
            "zero-shot": lambda: None,
            f"{self.k} {RandomExamples.label}": lambda: RandomExamples(self.train),
            f"{self.k} {BM25Examples.label}": lambda: self.words,
            f"{self.k} {EmbeddingExamples.label}": lambda: EmbeddingExamples(
                self.train, self.model, self.params, self.exam.tokenizer
            ),
        }  # fmt: skip
        for name, make in shelves.items():
            ways = [name, *(f"{name}, {way}" for way in CHOICES if self.exam.task.choices)]
            if all(self.ledger.find(kind="option", name=way) for way in ways):
                continue
            self._prompted(name, make())

    def _add(self, name: str, shelf: RandomExamples | None, answer: Callable[[], Any]) -> None:
        if self.ledger.find(kind="option", name=name):
            return
        self.stop.check()
        answers, costs = answer()
        facts: dict[str, Any] = {"kind": "option", "name": name, "examples": 0, "bytes": 0, "made_flops": 0.0,
                                 "made_seconds": 0.0}  # fmt: skip
        if shelf:
            kept = len(self.train) if shelf.bytes else self.k
            facts |= {"examples": kept, "bytes": shelf.bytes, "made_flops": shelf.made_flops,
                      "made_seconds": shelf.made_seconds}  # fmt: skip
        line = self.ledger.add({**facts, **costs, **self.exam.sheet(answers)})
        console.print(f"{name}: {self.exam.metric} {line['score']:.4f}, {line['request_seconds'] * 1e3:.1f} ms and "
                      f"{line['prompt_tokens']:.0f} tokens of prompt a request", soft_wrap=True)  # fmt: skip

    def _near(self, shelf: RandomExamples | None, rows: Sequence[Any]) -> tuple[list[list[Any]], float]:
        """(the examples before each row, seconds of a row)."""
        if shelf is None:
            return [[] for _ in rows], 0.0
        shelf.nearest(rows, self.k)  # compiles
        began = time.perf_counter()
        found = [[self.train[i] for i in some] for some in shelf.nearest(rows, self.k)]
        return found, (time.perf_counter() - began) / len(rows)

    def _copied(self) -> Any:
        near, seconds = self._near(self.words, self.exam.rows)
        answers = [some[-1]["completion"] for some in near]
        return answers, {"prompt_tokens": 0, "request_flops": 0.0, "request_seconds": seconds}

    def _chosen_form(self) -> Form:
        """The form in which the answers of some validation rows, behind their nearest examples, are the likeliest.
        One that the tokenizer or its template cannot have is left out; InputError if that is both."""
        if found := self.ledger.find(kind="form"):
            return next(form for form in self.forms if form.kind == found[0]["form"])
        rows = evenly_spaced(self.exam.task.valid or self.train, TRIED)
        shots, losses, refused = self._near(self.words, rows)[0], {}, ""
        for form in self.forms:
            try:
                prompts = form.prompts(rows, shots)
                tails = [form.tails(row, [row["completion"]])[0] for row in rows]
            except InputError as error:
                refused = f"{form.kind}: {error}"
                console.print(f"no prompts as {refused}", soft_wrap=True)
                continue
            pairs = list(zip(prompts, tails, strict=True))
            losses[form.kind] = float(pair_scores(self.model, self.params, Context(), pairs)[0].mean())
        if not losses:
            raise InputError(f"no form of a prompt serves this task and base: {refused}")
        best = min((form for form in self.forms if form.kind in losses), key=lambda form: losses[form.kind])
        self.ledger.add({"kind": "form", "form": best.kind, "losses": losses})
        said = ", ".join(f"{kind} {loss:.2f}" for kind, loss in losses.items())
        console.print(f"prompts as {best.kind}: nats an answer on {len(rows)} rows: {said}", soft_wrap=True)
        return best

    def _prompted(self, name: str, shelf: RandomExamples | None) -> None:
        """What the base writes behind each prompt, and the choices that it prefers there."""
        near, looked = self._near(shelf, self.exam.rows)
        prompts, row, choices = self.form.prompts(self.exam.rows, near), self.exam.rows[0], self.exam.task.choices
        tokens = float(np.mean([len(prompt) for prompt in prompts]))
        token = token_flops(self.model.config, self.parameters, tokens)
        more, fixed = shelf.flops if shelf else 0.0, {"prompt_tokens": tokens}

        def written() -> Any:
            flops = (tokens + self._written_tokens(self.form)) * token + more
            answers, seconds = self._timed(self._written, prompts)
            return answers, fixed | {"request_flops": flops, "request_seconds": seconds + looked}

        self._add(name, shelf, written)
        if not choices:
            return
        tails = self.form.tails(row, choices)
        losses, seconds = self._timed(lambda some: self._losses(some, tails), prompts)
        flops = (prompt_reads(self.model, prompts, tails) * tokens + sum(map(len, tails))) * token + more
        costs = fixed | {"request_flops": flops, "request_seconds": seconds + looked}
        nothing = self.form.prompts([{"prompt": NOTHING, "completion": NOTHING}], [[]])
        for way, off in zip(CHOICES, (0.0, self._losses(nothing, tails)), strict=True):
            self._add(f"{name}, {way}", shelf, lambda off=off: ([choices[i] for i in (losses - off).argmin(1)], costs))

    def _timed(self, work: Callable[[Any], Any], prompts: Any) -> tuple[Any, float]:
        """(what it gives for all prompts, seconds of a prompt)."""
        work(sorted(prompts, key=len)[-BATCH:])  # compiles what serves all
        began = time.perf_counter()
        return work(prompts), (time.perf_counter() - began) / len(prompts)

    def _written(self, prompts: Any) -> list[str]:
        args = (self.model, self.params, Context(), self.exam.tokenizer, prompts)
        found = generate_texts(*args, self.exam.new, batch=min(BATCH, len(prompts)))
        return [self.form.cut(text) for text in found]

    def _losses(self, prompts: Any, tails: Any) -> np.ndarray:
        return continuation_losses(self.model, self.params, Context(), prompts, tails)
