"""Prompts with worked examples, as a chat or as plain text in one of two shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ... import InputError
from ...data.columns import chat_of
from ...data.dialogue import Chat
from ...data.sft import render_prompts
from ..choices import answer_continuations

Row = dict[str, Any]
# Plain text: (a worked example, a question, its answer).
SHAPES = {"lines": ("{q}\n{a}\n\n", "{q}\n", "{a}\n"), "pairs": ("{q}: {a}\n", "{q}:", " {a}\n")}
KINDS = ("chat", *SHAPES)


def asked(row: Row) -> str:
    """The words of a row's prompt."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] or "" for turn in prompt)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a question, with worked examples before it, is put to a model: in turns of a `chat`, or in a shape of plain
    text."""

    kind: str
    tokenizer: Any
    longest: int  # tokens of a prompt; the examples that stand first are left out until it fits

    def prompts(self, rows: Sequence[Row], shots: Sequence[Sequence[Row]]) -> list[list[int]]:
        """The ids of each row's prompt. InputError for a row that is too long without any example."""
        left = [list(few) for few in shots]
        ids = self._rendered(rows, left)
        while long := [i for i, prompt in enumerate(ids) if len(prompt) > self.longest]:
            for i in long:
                if not left[i]:
                    raise InputError(f"a prompt of {len(ids[i])} tokens, without an example, and its answer do not fit "
                                     f"into the base's {self.longest}: {asked(rows[i])[:60]!r}")  # fmt: skip
                left[i].pop(0)
            for i, prompt in zip(long, self._rendered([rows[i] for i in long], [left[i] for i in long]), strict=True):
                ids[i] = prompt
        return ids

    def _rendered(self, rows: Sequence[Row], shots: Sequence[Sequence[Row]]) -> list[list[int]]:
        if self.kind == "chat":
            chats = [_with_examples(row, few) for row, few in zip(rows, shots, strict=True)]
            return render_prompts([("a prompt", chat) for chat in chats], self.tokenizer)
        texts = [self.text(row, few) for row, few in zip(rows, shots, strict=True)]
        return [self.tokenizer.prompt(text) for text in texts]

    def text(self, row: Row, shots: Sequence[Row]) -> str:
        """Worked examples and a question as plain text. InputError for what has no place in it."""
        for one in (row, *shots):
            if more := list(chat_of(one, "a prompt").beyond_text):
                raise InputError(f"plain text has no place for {more[0]!r}: {asked(one)[:60]!r}")
        shot, question, _ = SHAPES[self.kind]
        return "".join(shot.format(q=asked(one), a=one["completion"]) for one in shots) + question.format(q=asked(row))

    def tails(self, row: Row, answers: Sequence[str]) -> list[list[int]]:
        """The ids of answers behind a row's prompt, and of what ends them."""
        if self.kind == "chat":
            return answer_continuations(self.tokenizer, row, answers)
        prompt = self.tokenizer.prompt(self.text(row, []))
        due = SHAPES[self.kind][2]
        whole = [self.tokenizer.prompt(self.text(row, []) + due.format(a=answer)) for answer in answers]
        if any(ids[: len(prompt)] != prompt for ids in whole):
            raise InputError("this tokenizer joins a question's end to what follows, so that answers cannot be scored")
        return [ids[len(prompt) :] for ids in whole]

    def cut(self, text: str) -> str:
        """The answer in what was written."""
        return (text if self.kind == "chat" else text.lstrip("\n").split("\n")[0]).strip()


def _with_examples(row: Row, shots: Sequence[Row]) -> Chat:
    """A question with the turns of worked examples before it."""
    chat = chat_of(row, "a prompt").prompt
    before = [turn for shot in shots for turn in chat_of(shot, "a worked example").messages]
    return dataclasses.replace(chat, messages=[*before, *chat.messages], context=())
