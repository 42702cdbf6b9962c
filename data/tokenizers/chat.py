"""Chats by the template of a Hugging Face tokenizer: HF's token ids, and which of them are the assistant's.

A template is a program of somebody else's. It runs in jinja2's sandbox, in a process of its own (chat_worker.py) with a
limit on time a rendering and on memory: neither an endless loop nor a string of 10**10 characters reaches this one.
"""

import datetime
import functools
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import InputError
from ..dialogue import Chat, Message, as_chat, strings
from ..errors import RAISE, RowErrors
from .tokenizer import Tokenizer

Chats = Sequence[tuple[str, Chat]]  # (where it comes from, a dialogue)

SECONDS = 5.0  # of processor time, for one rendering: most take less than a thousandth
MEMORY = 1 << 30  # bytes, and 32 times the longest conversation
_CHUNK = 512  # chats tokenised at a time: bounds the encodings in flight


class Rendered(NamedTuple):
    """A chat as text; `spans` are the assistant's words in it, `marked` if by {% generation %}."""

    text: str
    spans: list[tuple[int, int]]
    marked: bool = False


LEFT_OUT = Rendered("", [])  # of a chat that is refused


def render(
    tokenizer: Tokenizer,
    chats: Sequence[tuple[str, Chat | list[Message]]],
    *,
    add_generation_prompt: bool = False,
    bad: RowErrors = RAISE,
) -> list[Rendered]:
    """What the template makes of `chats`, all in one child process; a generation prompt has no spans.

    Spans are what {% generation %} marks; without it, what a turn adds to the prompt before it, with the token that
    ends it. InputError: the template is broken; or it is hostile, refuses a chat, or does not say whose words are whose
    in one, unless `bad` says otherwise: LEFT_OUT stands for such a chat then.
    """
    whole = [(where, as_chat(chat)) for where, chat in chats]
    _check_read(tokenizer, whole)
    return _render(tokenizer, whole, add_generation_prompt, not add_generation_prompt, bad)


@functools.cache
def today() -> str:
    """The date at which it was asked for first: one command has one, however long it takes."""
    return datetime.date.today().isoformat()


def _render(tokenizer: Tokenizer, chats: Chats, prompt: bool, spans: bool, bad: RowErrors = RAISE) -> list[Rendered]:
    rendered, left, special = [LEFT_OUT] * len(chats), [], re.compile(_special(tokenizer))
    for i, (where, chat) in enumerate(chats):
        with bad:
            _check_content(special, where, chat)
            left.append(i)
    lines = [json.dumps(_line(chat)) for _, chat in chats]
    header = _header(tokenizer) | {
        "prompt": prompt,
        "spans": spans,
        "bytes": MEMORY + 32 * max(map(len, lines), default=0),
    }
    renders = 2 * sum(len(chat.messages) for _, chat in chats)
    name = f"chat template {tokenizer.template_file or 'of the tokenizer'}"
    while left:
        replies, end = _exchange([json.dumps(header), *(lines[i] for i in left)], wall=60 + 0.1 * renders)
        if not replies or "error" in replies[0]:
            raise InputError(f"{name}: {replies[0]['error'] if replies else end}")  # it does not compile
        done = replies[1:] if len(replies) > len(left) else [*replies[1:], {"error": end}]  # that one ended the process
        for i, one in zip(left, done, strict=False):
            with bad:
                if "error" in one:
                    raise InputError(f"{chats[i][0]}: {name}: {one['error']}")
                rendered[i] = Rendered(one["text"], [(a, b) for a, b in one["spans"]], one["marked"])
        if left := left[len(done) :]:
            bad.check_cap()  # a process that ends takes seconds: not once for every row
    return rendered


def _header(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "template": tokenizer.template,
        "variables": tokenizer.names,
        "date": tokenizer.date or today(),
        "special": _special(tokenizer),
        "seconds": SECONDS,
        "bytes": MEMORY,
    }


def _line(chat: Chat) -> dict[str, Any]:
    return {**vars(chat), "tools": chat.tools or None, "learnt": chat.learnt}


def _special(tokenizer: Tokenizer) -> str:
    """A pattern for special tokens; the longest match wins."""
    return "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) or "(?!)"


def _check_content(special: re.Pattern, where: str, chat: Chat) -> None:
    """HF takes the text of a special token for the token, so a row could end its own turn."""
    parts = {"tools": chat.tools, "chat_template_kwargs": chat.variables}
    parts = {f"message {n}": turn for n, turn in enumerate(chat.messages)} | parts
    for part, value in parts.items():
        if found := next(filter(None, map(special.search, strings(value))), None):
            raise InputError(
                f"{where}: {part} holds {found[0]!r}, which this tokenizer takes for its special token; "
                "rewrite it or drop the row"
            )


def _check_read(tokenizer: Tokenizer, chats: Chats) -> None:
    """InputError for tools, calls, thoughts, names or variables that the template takes no notice of.

    That is where its source never names them and the first dialogue that has them renders the same without them. A
    `name` is one of calls and tools too, so that its being named says nothing.
    """
    first: dict[str, tuple[str, Chat]] = {}
    for where, chat in chats:
        first = dict.fromkeys(chat.beyond_text, (where, chat)) | first
    if not first:
        return
    named = _named(json.dumps(_header(tokenizer)))
    if named is None:  # it does not compile, which rendering says
        return
    for name, (where, chat) in first.items():
        if (name == "name" or name not in named) and _same_without(tokenizer, where, chat, name):
            file = tokenizer.template_file or "of the tokenizer"
            raise InputError(
                f"{where}: the chat template {file} takes no notice of {name!r}, so nothing would be learnt of it; "
                f"take a base whose template reads it, or leave it out with --data.ignore {name}"
            )


@functools.lru_cache(maxsize=8)
def _named(header: str) -> list[str] | None:
    """All that the source of a template names; None if it does not compile."""
    replies, _ = _exchange([header], wall=60)
    return replies[0].get("names") if replies else None


def _same_without(tokenizer: Tokenizer, where: str, chat: Chat, name: str) -> bool:
    pair = [(where, chat), (where, chat.without(name))]
    try:
        texts = [[one.text for one in _render(tokenizer, pair, prompt, spans=False)] for prompt in (False, True)]
    except InputError:  # a template that does not name it stumbles over the rest of what goes with it
        return True
    return all(a == b for a, b in texts)


def _exchange(lines: list[str], wall: float) -> tuple[list[dict], str]:
    """(the worker's replies, why there are no more)."""
    # Without site-packages the child starts in 50 ms, and no .pth file or PYTHON* variable runs in it.
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    roots = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    worker = Path(__file__).with_name("chat_worker.py")
    command = [sys.executable, "-I", "-S", str(worker), *roots, str(worker.parent)]
    given = "\n".join([*lines, ""]).encode()  # ASCII
    try:
        done = subprocess.run(command, input=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=wall)
    except subprocess.TimeoutExpired as e:
        return _replies(e.stdout or b""), f"it is not done after {wall:.0f} seconds"
    if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
        end = f"it is not done after {SECONDS:g} seconds of computing; is there a loop without an end?"
    else:
        end = f"its process ended with code {done.returncode}; does it take too much memory?"
    return _replies(done.stdout), end


def _replies(out: bytes) -> list[dict]:
    """Whole lines only: a process that was killed may have left half of one."""
    return [json.loads(line) for line in out.split(b"\n")[:-1]]


def encode_chats(tokenizer: Tokenizer, chats: Chats, bad: RowErrors = RAISE) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, weights) of each chat: weight 1 on the assistant's tokens, 0 elsewhere; ([], []) if it is left out."""
    rendered = render(tokenizer, chats, bad=bad)
    for n, (encoding, one) in enumerate(zip(_encodings(tokenizer, rendered), rendered, strict=True)):
        ids, weights = [], []
        with bad:
            found = _weights(encoding.offsets, one)
            if one is not LEFT_OUT and not found.any():
                raise InputError(f"{chats[n][0]}: the chat template gives no words by the assistant; nothing to learn")
            ids, weights = encoding.ids, found.tolist()
        yield ids, weights


def encode_prompts(tokenizer: Tokenizer, chats: Chats, bad: RowErrors = RAISE) -> list[list[int]]:
    """The ids that a reply to each chat is generated from; [] for one that is left out."""
    rendered = render(tokenizer, chats, add_generation_prompt=True, bad=bad)
    return [encoding.ids for encoding in _encodings(tokenizer, rendered)]


def _encodings(tokenizer: Tokenizer, rendered: list[Rendered]) -> Iterator:
    assert tokenizer.encode_marked is not None, "a tokenizer with a template recognises special tokens"
    for k in range(0, len(rendered), _CHUNK):
        yield from tokenizer.encode_marked([one.text for one in rendered[k : k + _CHUNK]], False)


def _weights(offsets: list[tuple[int, int]], one: Rendered) -> np.ndarray:
    """1 for tokens that overlap a span. A character may be several tokens, which share its offsets."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(offsets), np.int64)
    for start, end in one.spans:
        first = np.searchsorted(ends, start, side="right")
        # HF's mask ends with the first token of the last character, even where it is several.
        last = np.searchsorted(ends, end - 1, side="right") + 1 if one.marked else np.searchsorted(starts, end)
        weights[first:last] = 1
    return weights


def turn_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token that follows a reply in a rendered chat, if one does; () if the template renders no chat."""
    words = "graftax answers"
    chat = Chat([{"role": "user", "content": "graftax asks"}, {"role": "assistant", "content": words}])
    try:
        text = _render(tokenizer, [("probe", chat)], prompt=False, spans=False)[0].text
    except InputError:
        return ()  # a prompt will not be rendered either, and that says why
    found = re.compile(_special(tokenizer)).search(text, text.rfind(words) + len(words)) if words in text else None
    return (tokenizer.special[found[0]],) if found else ()
