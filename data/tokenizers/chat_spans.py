"""Which characters of a rendered chat are the assistant's words that are learnt.

Part of the child process of chat_worker.py: it imports the standard library alone.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

Span = tuple[int, int]


class Refused(Exception):
    """Why no mask can be had."""


def marked_spans(text: str, marks: list[tuple[int, str]]) -> list[Span]:
    """What {% generation %} marks, as HF finds it."""
    for start, words in marks:
        if not text.startswith(words, start):
            raise Refused("{% generation %} is inside a macro or a filter, so where its words are is not known")
    if not any(words for _, words in marks):
        raise Refused("{% generation %} marks no words")
    return [(start, start + len(words)) for start, words in marks if words]


def learnt_marks(render: Callable[[list, bool], str], env: Any, turns: list, learnt: list[bool]) -> list[Any]:
    """The marks of the turns that are learnt: each turn has those that come in with it."""
    if all(learnt[n] for n, turn in enumerate(turns) if turn["role"] == "assistant"):
        return env.marks
    marks, before, kept = env.marks, 0, []
    for n, turn in enumerate(turns):
        if turn["role"] == "assistant":
            render(turns[: n + 1], False)
            kept += marks[before : len(env.marks)] if learnt[n] else []
            before = len(env.marks)
    if before != len(marks):
        raise Refused("{% generation %} marks other words once later turns follow, so whose they are is not known")
    return kept


def derived_spans(
    render: Callable[[list, bool], str], turns: list, text: str, special: re.Pattern, learnt: list[bool],
    usual: Callable[[list, bool], str] | None = None,
) -> list[Span]:  # fmt: skip
    """What each turn that is learnt adds to the prompt before it, with the token that ends it. `text` is of all.

    usual: `render` without the row's own variables. Some say how the last reply begins, and not the ones before it.
    """
    spans = []
    for n, turn in enumerate(turns):
        if not learnt[n]:
            continue
        before = render(turns[:n], True)
        after = text if n + 1 == len(turns) else render(turns[: n + 1], False)
        try:
            ends = _ends(before, after, words_of(turn), special, lambda n=n: _headed(render, turns[:n]))
            begins = before if usual is None or text.startswith(before) else usual(turns[:n], True)
            spans.append(_in_all(text, begins, len(before), after, ends, special))
        except Refused as e:
            hint = "{% generation %} in the template would say which words to learn"
            raise Refused(f"message {n}: the template {e}; {hint}") from None
    return spans


Words = list[tuple[str, bool]]  # (text, whether a template that keeps a turn's meaning writes it as it stands)


def words_of(turn: dict[str, Any]) -> Words:
    """The texts of a turn in the order in which templates write them: thoughts, content, calls."""
    thoughts = [(turn[key].strip(), False) for key in ("reasoning_content", "reasoning", "thinking") if key in turn]
    found = [*thoughts, ((turn["content"] or "").strip(), True)]
    for call in turn.get("tool_calls", ()):
        inner = call.get("function", call)
        found += [(inner["name"], True), *((text, False) for text in _texts(inner["arguments"]))]
    return [(text, sure) for text, sure in found if text]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _found(text: str, words: Words, start: int, special: re.Pattern) -> tuple[int, int]:
    """(where the first of `words` begins behind `start`, where the last ends), special tokens aside; (-1, start) if
    one that is sure to be there is not."""
    plain, first, end = special.sub(lambda match: "\0" * len(match[0]), text), -1, start
    for word, sure in words:
        at = plain.find(word, end)
        if at >= 0:
            first, end = at if first < 0 else first, at + len(word)
        elif sure:
            return -1, start
    return (first if words else start), end


def _headed(render: Callable[[list, bool], str], turns: list) -> bool:
    """Whether a template begins a reply with something that no generation prompt has."""
    before, words = render(turns, False), "graftax answers"
    if before != render(turns, True):
        return False
    begun = render([*turns, {"role": "assistant", "content": words}], False)[len(before) :].partition(words)
    return not begun[1] or bool(begun[0].strip())


def _ends(before: str, after: str, words: Words, special: re.Pattern, headed: Callable[[], bool]) -> list[int]:
    """Where the turn in `after` may end: after each of the special tokens, side by side, that follow its words.

    Without one it is where white space begins, which is not learnt.
    """
    if not after.startswith(before):
        raise Refused("does not write a reply where its generation prompt ends")
    start = len(before)
    at, end = _found(after, words, start, special)
    found = list(special.finditer(after, end))
    run = 1
    while run < len(found) and found[run].start() == found[run - 1].end():
        run += 1
    unclear = run < len(found) and (at < 0 or not words)
    if (at < 0 or after[start:at].strip() or unclear) and headed():
        raise Refused("takes no notice of add_generation_prompt, so where a reply begins is not known")
    if at < 0 and (unclear or not found):
        raise Refused("changes the words of this turn, and where it ends is not clear")
    return [one.end() for one in found[:run]] or [max(start, len(after.rstrip()))]


def _in_all(text: str, before: str, own: int, after: str, ends: list[int], special: re.Pattern) -> Span:
    """The turn that begins at `own` in `after`, in the whole conversation, where it follows `before`: a template may
    write it differently there (Qwen3 drops thoughts)."""
    start = len(before)
    for end in reversed(ends):
        if text.startswith(after[:end]):
            return own, end
    ends_with, found = special.search(after, own), special.search(text, start)
    close = after[ends_with.start() : ends[-1]] if ends_with else ""
    if not text.startswith(before) or not close or not found or not text.startswith(close, found.start()):
        raise Refused("writes the turns before it differently once later ones follow")
    if text[start : found.start()].strip() not in after[own : ends[-1]]:
        raise Refused("writes this turn differently once later ones follow")
    return start, found.start() + len(close)
