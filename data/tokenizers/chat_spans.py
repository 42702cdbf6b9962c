"""Find which characters of a rendered chat are learnt words of the assistant.

Runs in the child process of chat_worker.py and imports the standard library only.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

Span = tuple[int, int]
Render = Callable[[list, bool], str]  # (messages, add_generation_prompt) -> text
Words = list[tuple[str, bool]]  # (text, required: whether a template that keeps a turn's meaning writes it unchanged)


class Refused(Exception):
    """Why there is no mask for a chat."""


def marked_spans(text: str, marks: list[tuple[int, str]]) -> list[Span]:
    """Return the spans that {% generation %} marks, as transformers finds them; `marks` are (start, words)."""
    for start, words in marks:
        if not text.startswith(words, start):
            raise Refused("{% generation %} is inside a macro or a filter, so where its words are is not known")
    if not any(words for _, words in marks):
        raise Refused("{% generation %} marks no words")
    return [(start, start + len(words)) for start, words in marks if words]


def learnt_marks(render: Render, env: Any, turns: list, learnt: list[bool]) -> list[Any]:
    """Return the marks of the turns that are learnt. The marks of a turn are those that appear when it is added."""
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
    render: Render,
    turns: list,
    text: str,
    special: re.Pattern,
    learnt: list[bool],
    usual: Render | None = None,
) -> list[Span]:
    """Return what each learnt turn adds to the prompt before it, with the token that ends it. `text` is of all turns.

    usual: `render` without the row's own variables. Some of these say how the last reply begins, but not earlier ones.
    """
    spans = []
    for n, turn in enumerate(turns):
        if not learnt[n]:
            continue
        prompt = render(turns[:n], True)
        after = text if n + 1 == len(turns) else render(turns[: n + 1], False)
        try:
            ends = _possible_ends(prompt, after, words_of(turn), special, lambda n=n: _has_header(render, turns[:n]))
            before = prompt if usual is None or text.startswith(prompt) else usual(turns[:n], True)
            spans.append(_span_in_chat(text, before, after, len(prompt), ends, special))
        except Refused as e:
            hint = "{% generation %} in the template would say which words to learn"
            raise Refused(f"message {n}: the template {e}; {hint}") from None
    return spans


def words_of(turn: dict[str, Any]) -> Words:
    """Return the texts of a turn in the order in which templates write them: thoughts, content, calls."""
    thoughts = [(turn[key].strip(), False) for key in ("reasoning_content", "reasoning", "thinking") if key in turn]
    words = [*thoughts, ((turn["content"] or "").strip(), True)]
    for call in turn.get("tool_calls", ()):
        function = call.get("function", call)
        words += [(function["name"], True), *((text, False) for text in _texts(function["arguments"]))]
    return [(text, required) for text, required in words if text]


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


def _find_words(text: str, words: Words, start: int, special: re.Pattern) -> Span:
    """Return where `words`, in order and outside special tokens, begin and end behind `start`.

    Returns (-1, start) if a required one is missing.
    """
    plain, first, end = special.sub(lambda match: "\0" * len(match[0]), text), -1, start
    for word, required in words:
        at = plain.find(word, end)
        if at >= 0:
            first, end = at if first < 0 else first, at + len(word)
        elif required:
            return -1, start
    return (first if words else start), end


def _has_header(render: Render, turns: list) -> bool:
    """Return whether the template begins a reply with text that it does not write as a generation prompt."""
    before, words = render(turns, False), "graftax answers"
    if before != render(turns, True):
        return False
    header, separator, _ = render([*turns, {"role": "assistant", "content": words}], False)[len(before) :].partition(
        words
    )
    return not separator or bool(header.strip())


def _possible_ends(
    prompt: str, after: str, words: Words, special: re.Pattern, has_header: Callable[[], bool]
) -> list[int]:
    """Return where the turn in `after` may end: after each of the adjacent special tokens that follow its words.

    Without one it ends where trailing white space begins, which is not learnt.
    """
    if not after.startswith(prompt):
        raise Refused("does not write a reply where its generation prompt ends")
    start = len(prompt)
    first, end = _find_words(after, words, start, special)
    tokens = list(special.finditer(after, end))
    run = 1
    while run < len(tokens) and tokens[run].start() == tokens[run - 1].end():
        run += 1
    unclear = run < len(tokens) and (first < 0 or not words)
    if (first < 0 or after[start:first].strip() or unclear) and has_header():
        raise Refused("takes no notice of add_generation_prompt, so where a reply begins is not known")
    if first < 0 and (unclear or not tokens):
        raise Refused("changes the words of this turn, and where it ends is not clear")
    return [token.end() for token in tokens[:run]] or [max(start, len(after.rstrip()))]


def _span_in_chat(text: str, before: str, after: str, begin: int, ends: list[int], special: re.Pattern) -> Span:
    """Return the span in `text`, the whole chat, of the turn after[begin:end], whose end is one of `ends`.

    A template may write a turn differently once others follow (Qwen3 drops thoughts). It then follows `before`.
    """
    for end in reversed(ends):
        if text.startswith(after[:end]):
            return begin, end
    start = len(before)
    first, match = special.search(after, begin), special.search(text, start)
    close = after[first.start() : ends[-1]] if first else ""
    if not text.startswith(before) or not close or not match or not text.startswith(close, match.start()):
        raise Refused("writes the turns before it differently once later ones follow")
    if text[start : match.start()].strip() not in after[begin : ends[-1]]:
        raise Refused("writes this turn differently once later ones follow")
    return start, match.start() + len(close)
