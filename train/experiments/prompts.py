"""Prompt formats: a question with worked examples before it, as turns of a chat or as plain text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ... import InputError
from ...data.columns import chat_of
from ...data.sft import render_prompts
from ..choices import answer_continuations

Row = dict[str, Any]
# Formats of plain text: (a worked example, a question, its answer).
TEXT_FORMATS = {"lines": ("{q}\n{a}\n\n", "{q}\n", "{a}\n"), "pairs": ("{q}: {a}\n", "{q}:", " {a}\n")}
FORMATS = ("chat", *TEXT_FORMATS)


def question_text(row: Row) -> str:
    """Return the text of a row's prompt; of a chat the contents of its turns."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] or "" for turn in prompt)


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """A way to write a question with worked examples: `chat`, or one of TEXT_FORMATS."""

    name: str
    tokenizer: Any
    max_tokens: int  # of a prompt; the first examples are dropped until it fits

    def prompts(self, rows: Sequence[Row], examples: Sequence[Sequence[Row]]) -> list[list[int]]:
        """Return the token ids of each row's prompt. Raises InputError for a row that does not fit without examples."""
        kept = [list(some) for some in examples]
        ids = self._encode(rows, kept)
        while too_long := [i for i, prompt in enumerate(ids) if len(prompt) > self.max_tokens]:
            for i in too_long:
                if not kept[i]:
                    raise InputError(f"a prompt of {len(ids[i])} tokens without examples, and its answer, do not fit "
                                     f"into the base's {self.max_tokens}: {question_text(rows[i])[:60]!r}")  # fmt: skip
                kept[i].pop(0)
            shorter = self._encode([rows[i] for i in too_long], [kept[i] for i in too_long])
            for i, prompt in zip(too_long, shorter, strict=True):
                ids[i] = prompt
        return ids

    def _encode(self, rows: Sequence[Row], examples: Sequence[Sequence[Row]]) -> list[list[int]]:
        if self.name != "chat":
            return [self.tokenizer.prompt(self.text(row, some)) for row, some in zip(rows, examples, strict=True)]
        chats = []
        for row, some in zip(rows, examples, strict=True):
            chat = chat_of(row, "a prompt").prompt
            before = [turn for example in some for turn in chat_of(example, "a worked example").messages]
            chat = dataclasses.replace(chat, messages=[*before, *chat.messages], context=())
            chats.append(("a prompt", chat))
        return render_prompts(chats, self.tokenizer)

    def text(self, row: Row, examples: Sequence[Row]) -> str:
        """Return worked examples and a question as plain text. Raises InputError for what plain text cannot express."""
        for each in (row, *examples):
            if extra := list(chat_of(each, "a prompt").beyond_text):
                raise InputError(f"plain text cannot express {extra[0]!r}: {question_text(each)[:60]!r}")
        example, question, _ = TEXT_FORMATS[self.name]
        before = "".join(example.format(q=question_text(each), a=each["completion"]) for each in examples)
        return before + question.format(q=question_text(row))

    def continuations(self, row: Row, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each answer after a row's prompt, with what ends an answer."""
        if self.name == "chat":
            return answer_continuations(self.tokenizer, row, answers)
        text, answer_format = self.text(row, []), TEXT_FORMATS[self.name][2]
        prompt = self.tokenizer.prompt(text)
        full = [self.tokenizer.prompt(text + answer_format.format(a=answer)) for answer in answers]
        if any(ids[: len(prompt)] != prompt for ids in full):
            raise InputError(
                "the tokenizer joins the end of a question to its answer, so that answers cannot be scored"
            )
        return [ids[len(prompt) :] for ids in full]

    def extract_answer(self, text: str) -> str:
        """Return the answer in a generated text."""
        return (text if self.name == "chat" else text.lstrip("\n").split("\n")[0]).strip()
