"""Render chats by the chat template of a Hugging Face tokenizer: HF's token ids, and which of them are the assistant's.

Chat templates are untrusted code. They run in jinja2's sandbox in a child process (chat_worker.py) that has a limit on
CPU time for each rendering and on memory: neither an endless loop nor a string of 10**10 characters reaches this one.
The child imports jinja2 alone, because transformers takes 1.3 s to import and its templates write today's date.
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

SECONDS = 5.0  # CPU time for one rendering; most take less than a millisecond
MEMORY = 1 << 30  # bytes of address space, to which 32 times the longest conversation is added
_CHUNK = 512  # chats tokenised at a time: bounds the encodings in memory


class Rendered(NamedTuple):
    """A chat as text; `spans` are the learnt words of the assistant in it, `marked` if by {% generation %}."""

    text: str
    spans: list[tuple[int, int]]
    marked: bool = False


LEFT_OUT = Rendered("", [])  # stands for a chat that was refused


def render(
    tokenizer: Tokenizer,
    chats: Sequence[tuple[str, Chat | list[Message]]],
    *,
    add_generation_prompt: bool = False,
    bad: RowErrors = RAISE,
) -> list[Rendered]:
    """Render `chats` in one child process; with a generation prompt, without spans.

    Spans are what {% generation %} marks. Without it they are what a turn adds to the prompt before it, with the token
    that ends it. Raises InputError if the template is broken; also, unless `bad` leaves out such a chat, if it is
    hostile, refuses a chat, or does not tell whose words are whose.
    """
    dialogues = [(where, as_chat(chat)) for where, chat in chats]
    _check_fields_are_read(tokenizer, dialogues)
    return _render(tokenizer, dialogues, add_generation_prompt, spans=not add_generation_prompt, bad=bad)


@functools.cache
def today() -> str:
    """Return the ISO date of the first call: a command has one date, however long it takes."""
    return datetime.date.today().isoformat()


def _render(tokenizer: Tokenizer, chats: Chats, prompt: bool, spans: bool, bad: RowErrors = RAISE) -> list[Rendered]:
    rendered, left, special = [LEFT_OUT] * len(chats), [], re.compile(_special(tokenizer))
    for i, (where, chat) in enumerate(chats):
        with bad:
            _check_content(special, where, chat)
            left.append(i)
    lines = [json.dumps({**vars(chat), "tools": chat.tools or None, "learnt": chat.learnt}) for _, chat in chats]
    memory = MEMORY + 32 * max(map(len, lines), default=0)
    header = json.dumps(_header(tokenizer) | {"prompt": prompt, "spans": spans, "bytes": memory})
    renderings = 2 * sum(len(chat.messages) for _, chat in chats)
    name = f"chat template {tokenizer.template_file or 'of the tokenizer'}"
    while left:
        replies, end = _exchange([header, *(lines[i] for i in left)], wall=60 + 0.1 * renderings)
        if not replies or "error" in replies[0]:
            raise InputError(f"{name}: {replies[0]['error'] if replies else end}")  # it does not compile
        answers = replies[1:] if len(replies) > len(left) else [*replies[1:], {"error": end}]  # that chat ended it
        for i, answer in zip(left, answers, strict=False):
            with bad:
                if "error" in answer:
                    raise InputError(f"{chats[i][0]}: {name}: {answer['error']}")
                rendered[i] = Rendered(answer["text"], [(a, b) for a, b in answer["spans"]], answer["marked"])
        if left := left[len(answers) :]:
            bad.check_cap()  # ending a process takes seconds: not once for every row
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


def _special(tokenizer: Tokenizer) -> str:
    """Return a pattern that matches special tokens, the longest first."""
    return "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) or "(?!)"


def _check_content(special: re.Pattern, where: str, chat: Chat) -> None:
    """Raise InputError for the text of a special token: HF takes it for the token, so a row could end its own turn."""
    parts = {f"message {n}": turn for n, turn in enumerate(chat.messages)}
    for part, value in {**parts, "tools": chat.tools, "chat_template_kwargs": chat.variables}.items():
        if match := next(filter(None, map(special.search, strings(value))), None):
            raise InputError(
                f"{where}: {part} holds {match[0]!r}, which this tokenizer takes for its special token; "
                "rewrite it or drop the row"
            )


def _check_fields_are_read(tokenizer: Tokenizer, chats: Chats) -> None:
    """Raise InputError for tools, calls, thoughts, names or variables that the template ignores.

    It ignores a field if its source does not name it and the first dialogue with the field renders the same without it.
    Calls and tools have a `name` too, so that the source may name it for those only.
    """
    first: dict[str, tuple[str, Chat]] = {}
    for where, chat in chats:
        first = dict.fromkeys(chat.beyond_text, (where, chat)) | first
    if not first:
        return
    named = _names_in_template(json.dumps(_header(tokenizer)))
    if named is None:  # it does not compile, which rendering reports
        return
    for name, (where, chat) in first.items():
        if (name == "name" or name not in named) and _same_without(tokenizer, where, chat, name):
            raise InputError(
                f"{where}: the chat template {tokenizer.template_file or 'of the tokenizer'} takes no notice of "
                f"{name!r}, so nothing would be learnt of it; take a base whose template reads it, or leave it out "
                f"with --data.ignore {name}"
            )


@functools.lru_cache(maxsize=8)
def _names_in_template(header: str) -> list[str] | None:
    """Return all names and constant texts in the source of a template; None if it does not compile."""
    replies, _ = _exchange([header], wall=60)
    return replies[0].get("names") if replies else None


def _same_without(tokenizer: Tokenizer, where: str, chat: Chat, name: str) -> bool:
    pair = [(where, chat), (where, chat.without(name))]
    try:
        texts = [[r.text for r in _render(tokenizer, pair, prompt, spans=False)] for prompt in (False, True)]
    except InputError:  # a template that does not name the field fails at what comes with it
        return True
    return all(a == b for a, b in texts)


def _exchange(lines: list[str], wall: float) -> tuple[list[dict], str]:
    """Send `lines` to a child process; return (its replies, why there are no more). `wall` is in seconds."""
    # Without site-packages the child starts in 50 ms, and no .pth file or PYTHON* variable runs in it.
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    roots = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    worker = Path(__file__).with_name("chat_worker.py")
    command = [sys.executable, "-I", "-S", str(worker), *roots, str(worker.parent)]
    sent = "\n".join([*lines, ""]).encode()  # ASCII
    try:
        done = subprocess.run(command, input=sent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=wall)
        output, end = done.stdout, f"its process ended with code {done.returncode}; does it take too much memory?"
        if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
            end = f"it is not done after {SECONDS:g} seconds of computing; is there a loop without an end?"
    except subprocess.TimeoutExpired as e:
        output, end = e.stdout or b"", f"it is not done after {wall:.0f} seconds"
    return [json.loads(line) for line in output.split(b"\n")[:-1]], end  # the last line may be half of one


def encode_chats(tokenizer: Tokenizer, chats: Chats, bad: RowErrors = RAISE) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, weights) of each chat: weight 1 on the assistant's tokens, else 0; ([], []) for one left out."""
    rendered = render(tokenizer, chats, bad=bad)
    for (where, _), chat, encoding in zip(chats, rendered, _encodings(tokenizer, rendered), strict=True):
        ids, weights = [], []
        with bad:
            learnt = _weights(encoding.offsets, chat)
            if chat is not LEFT_OUT and not learnt.any():
                raise InputError(f"{where}: the chat template gives no words by the assistant; nothing to learn")
            ids, weights = encoding.ids, learnt.tolist()
        yield ids, weights


def encode_prompts(tokenizer: Tokenizer, chats: Chats, bad: RowErrors = RAISE) -> list[list[int]]:
    """Return the ids that a reply to each chat is generated from; [] for one left out."""
    rendered = render(tokenizer, chats, add_generation_prompt=True, bad=bad)
    return [encoding.ids for encoding in _encodings(tokenizer, rendered)]


def _encodings(tokenizer: Tokenizer, rendered: list[Rendered]) -> Iterator:
    assert tokenizer.encode_marked is not None, "a tokenizer with a template recognises special tokens"
    for k in range(0, len(rendered), _CHUNK):
        yield from tokenizer.encode_marked([chat.text for chat in rendered[k : k + _CHUNK]], False)


def _weights(offsets: list[tuple[int, int]], chat: Rendered) -> np.ndarray:
    """Return 1 for tokens that overlap a span, else 0. A character may be several tokens, which share its offsets."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(offsets), np.int64)
    for start, end in chat.spans:
        first = np.searchsorted(ends, start, side="right")
        # The mask of transformers 5.23 ends with the first token of the last character, even if that has several.
        last = np.searchsorted(ends, end - 1, side="right") + 1 if chat.marked else np.searchsorted(starts, end)
        weights[first:last] = 1
    return weights


def turn_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the special token that follows a reply in a rendered chat; () if there is none, or no chat renders."""
    words = "graftax answers"
    chat = Chat([{"role": "user", "content": "graftax asks"}, {"role": "assistant", "content": words}])
    try:
        text = _render(tokenizer, [("probe", chat)], prompt=False, spans=False)[0].text
    except InputError:
        return ()  # a prompt will not be rendered either, and the error will say why
    match = re.compile(_special(tokenizer)).search(text, text.rfind(words) + len(words)) if words in text else None
    return (tokenizer.special[match[0]],) if match else ()
