"""The ways to answer that train nothing: the nearest example's answer; prompts, free or with the likeliest choice."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ...model import Context
from ..choices import continuation_losses, pair_scores
from ..evaluate import evenly, replies
from ..progress import console
from ..stop import Stop, Stopped
from .exam import BATCH, Exam
from .ground import Ground
from .ledger import Ledger
from .prompts import Form, asked, by_lot, by_states, by_words

TRIED = 64  # validation rows that choose the form of a prompt


def token_flops(config: Any, parameters: int, T: float) -> float:
    """FLOPs of reading one token behind T / 2 others: 2 a matrix's parameter, and attention's two products."""
    matrices = parameters - (0 if config.tied else config.V * config.D)
    return 2.0 * matrices + 4.0 * config.L * config.N * config.H * T / 2


class Prompting:
    """All of them on one exam."""

    def __init__(self, plan: Any, exam: Exam, ground: Ground, ledger: Ledger, stop: Stop):
        self.plan, self.exam, self.ledger, self.stop = plan, exam, ledger, stop
        self.model, self.params = ground.model(plan.run)
        self.base, self.train = ground.base(plan.run), exam.task.train
        self.parameters = sum(x.size for x in jax.tree.leaves(self.params))
        self.k = min(plan.shots, len(self.train))
        # Rows longer than those that it was trained on are nothing a base can read, whatever its positions allow.
        seen = self.base.run.data.T if self.base.run.phase == "pretrain" else self.base.config.context
        seen = self.base.config.context if "imported" in self.base.manifest else min(seen, self.base.config.context)
        self.forms = [Form(kind, exam.tokenizer, seen - exam.new) for kind in ("chat", "plain")]

    def near(self, rows: Sequence[Any], how: str) -> np.ndarray:
        """Which examples stand before each row, the nearest last."""
        if how == "states":
            return by_states(self.model, self.params, self.exam.tokenizer, self.train, rows, self.k)
        return {"lot": by_lot, "words": by_words}[how](self.train, rows, self.k)

    def request(self) -> dict[str, float]:
        """What a request of a tuned model reads and writes: as a chat, without examples."""
        rows = evenly(self.exam.rows, TRIED)
        prompts, chat = self.forms[0].prompts(rows, [[] for _ in rows]), self.forms[0]
        asked, answer = (float(np.mean([len(ids) for ids in some])) for some in (
            prompts, [chat.tails(row, [row["completion"]])[0] for row in rows]))  # fmt: skip
        flops = (asked + answer) * token_flops(self.model.config, self.parameters, asked)
        return {"prompt_tokens": asked, "request_tokens": asked + answer, "request_flops": flops}

    def go(self) -> None:
        """A line for each, as far as there are none."""
        text = sum(len((asked(row) + row["completion"]).encode()) for row in self.train)
        states = text + 4 * len(self.train) * self.model.config.D
        retrieved = {"words": ("BM25", text), "states": ("the base's states", states)}
        self._add("the nearest example's answer (BM25), no model", lambda: self._copied("words"), bytes=text)
        self.form = self._chosen_form()
        shots: dict[str, Any] = {"": [[] for _ in self.exam.rows]}
        ways = {"": "zero-shot", "lot": f"{self.k} examples by lot",
                **{how: f"{self.k} nearest examples by {name}" for how, (name, _) in retrieved.items()}}  # fmt: skip
        for how, name in ways.items():
            for choices in (False, True) if self.exam.task.choices else (False,):
                said = f"{name}, the likeliest choice" if choices else name
                if self.ledger.find(kind="option", name=said):
                    continue
                if how not in shots:
                    shots[how] = [[self.train[i] for i in some] for some in self.near(self.exam.rows, how)]
                few, size = shots[how], retrieved.get(how, ("", 0))[1]
                self._add(said, lambda few=few, choices=choices: self._prompted(few, choices), bytes=size)

    def _add(self, name: str, answer: Callable[[], Any], **facts: Any) -> None:
        if self.ledger.find(kind="option", name=name):
            return
        if self.stop.asked:
            raise Stopped
        answers, costs = answer()
        examples = len(self.train) if facts["bytes"] else self.k * (name.split()[-1] == "lot")
        facts |= {"kind": "option", "name": name, "examples": examples}
        line: dict[str, Any] = self.ledger.add({**facts, **costs, **self.exam.sheet(answers)})
        console.print(f"{name}: {self.exam.metric} {line['score']:.4f}, {line['request_seconds'] * 1e3:.1f} ms and "
                      f"{line['prompt_tokens']:.0f} tokens of prompt a request", soft_wrap=True)  # fmt: skip

    def _copied(self, how: str) -> Any:
        began = time.perf_counter()
        answers = [self.train[some[-1]]["completion"] for some in self.near(self.exam.rows, how)]
        seconds = (time.perf_counter() - began) / len(answers)
        return answers, {"prompt_tokens": 0, "request_flops": 0.0, "request_seconds": seconds}

    def _chosen_form(self) -> Form:
        """The form in which the answers of some validation rows, behind their nearest examples, are the likeliest."""
        if found := self.ledger.find(kind="form"):
            return next(form for form in self.forms if form.kind == found[0]["form"])
        rows = evenly(self.exam.task.valid or self.train, TRIED)
        shots = [[self.train[i] for i in some] for some in self.near(rows, "words")]
        losses = {}
        for form in self.forms:
            prompts = form.prompts(rows, shots)
            tails = [form.tails(row, [row["completion"]])[0] for row in rows]
            pairs = list(zip(prompts, tails, strict=True))
            losses[form.kind] = float(pair_scores(self.model, self.params, Context(), pairs)[0].mean())
        best = min(self.forms, key=lambda form: losses[form.kind])
        self.ledger.add({"kind": "form", "form": best.kind, "losses": losses})
        said = ", ".join(f"{kind} {loss:.2f}" for kind, loss in losses.items())
        console.print(f"prompts as {best.kind}: nats an answer on {len(rows)} validation rows: {said}", soft_wrap=True)
        return best

    def _prompted(self, shots: Any, choices: bool) -> Any:
        """(answers, costs)."""
        prompts = self.form.prompts(self.exam.rows, shots)
        tokens = float(np.mean([len(prompt) for prompt in prompts]))
        tails = self.form.tails(self.exam.rows[0], self.exam.task.choices or [self.exam.rows[0]["completion"]])
        answer = self._scored if choices else self._written
        answer(sorted(prompts, key=len)[-BATCH:], tails)  # compiles what serves all
        began = time.perf_counter()
        answers = answer(prompts, tails)
        seconds = (time.perf_counter() - began) / len(prompts)
        more = sum(map(len, tails)) if choices else float(np.mean([len(tail) for tail in tails]))
        each = token_flops(self.model.config, self.parameters, tokens)
        return answers, {"prompt_tokens": tokens, "request_flops": (tokens + more) * each, "request_seconds": seconds}

    def _written(self, prompts: Any, tails: Any) -> list[str]:
        args = (self.model, self.params, Context(), self.exam.tokenizer, prompts)
        found = replies(*args, self.exam.new + 1, batch=min(BATCH, len(prompts)))
        return [self.form.cut(text) for text in found]

    def _scored(self, prompts: Any, tails: Any) -> list[str]:
        losses = continuation_losses(self.model, self.params, Context(), prompts, tails)
        return [self.exam.task.choices[i] for i in losses.argmin(axis=1)]
