"""Rows of tuning data: the shapes that are known, the columns of each, and the dialogue that a row becomes."""

import dataclasses
import re
import reprlib
from typing import Any

from .. import InputError
from .dialogue import Chat, dialogue, variables_of
from .errors import RAISE, RowErrors
from .fields import json_of, kind_of, near, parsed, text_of

_BESIDE = ("system", "tools", "chat_template_kwargs")
_SHAPES = {  # columns that make a shape -> those that may stand beside them
    ("messages",): _BESIDE,
    ("conversations",): _BESIDE,
    ("prompt", "completion"): ("history", "reasoning_content", *_BESIDE),
    ("instruction", "output"): ("input", "history", *_BESIDE),
}
COLUMNS = tuple(dict.fromkeys(name for shape, beside in _SHAPES.items() for name in (*shape, *beside)))
_WANTED = (
    'one of {"prompt", "completion"}, {"instruction", "input", "output"}, {"messages": [{"role", "content"}, ...]} and '
    '{"conversations": [{"from", "value"}, ...]} is wanted'
)
# Columns about a row, which say nothing of its words: they are not read, and need not be named.
_ABOUT = re.compile(
    "id|.*_id|idx|index|uuid|hash|meta|metadata|source|origin|dataset|subset|split|category|task|type|topic|domain|"
    "tags|lang|language|license|url|date|timestamp|version|author|where|_.*"
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """How a file names its columns. InputError for a name that no shape has.

    names: `ours=theirs` pairs; a row without `theirs` keeps its own names.
    ignore: columns, fields of messages and template variables that are left out.
    """

    names: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pairs = [name.partition("=") for name in self.names]
        for (ours, equals, theirs), text in zip(pairs, self.names, strict=True):
            if not equals or not theirs:
                raise InputError(f"--data.columns {text}: OURS=THEIRS is wanted, e.g. prompt=question")
            if ours not in COLUMNS:
                raise InputError(f"--data.columns {text}: no column {ours!r}{near(ours, COLUMNS)}; ours are "
                                 f"{', '.join(COLUMNS)}")  # fmt: skip
        if len({ours for ours, *_ in pairs}) < len(pairs):
            raise InputError(f"--data.columns {' '.join(self.names)}: a column of ours is there twice; name it once")

    def applied(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """The row under our names."""
        row = {key: value for key, value in row.items() if key not in self.ignore}
        pairs = [(ours, theirs) for ours, _, theirs in (name.partition("=") for name in self.names) if theirs in row]
        named, taken = {ours: row[theirs] for ours, theirs in pairs}, {theirs for _, theirs in pairs}
        rest = {key: value for key, value in row.items() if key not in taken}
        if both := sorted(set(named) & set(rest)):
            raise InputError(f"{where}: {both[0]!r} is there, and --data.columns reads it from another column; leave "
                             f"one out with --data.ignore {both[0]}")  # fmt: skip
        return rest | named


def chat_of(row: dict[str, Any], where: str, bad: RowErrors = RAISE, columns: Columns = Columns()) -> Chat:
    """The dialogue of a row of any known shape. InputError names `where`, what is wrong, and what is wanted.

    A column that nothing reads is an error, unless it is null or about the row (an id, its source, ...).
    """
    if isinstance(row.get("chat"), Chat):  # read before, from a file
        return row["chat"]
    row = columns.applied(row, where)
    there = {key for key, value in row.items() if value is not None}  # in a table, null is what a row does not have
    shape = next((s for held in (there, set(row)) for s in _SHAPES if held.issuperset(s)), None)
    fields = f"{where}: fields {reprlib.repr(sorted(row))}"
    if shape is None:
        raise InputError(f"{fields}; {_WANTED}, or name yours with --data.columns prompt=THEIRS completion=THEIRS")
    known = {*shape, *_SHAPES[shape]}
    if unread := sorted(key for key in there - known if not _ABOUT.fullmatch(key.lower())):
        raise InputError(f"{fields}: nothing reads {unread[0]!r} beside {shape[0]!r}{near(unread[0], known)}; {_WANTED}"
                         f"; rename it, or leave it out with --data.ignore {unread[0]}")  # fmt: skip
    row = {key: value for key, value in row.items() if key in shape or key in there & known}
    chat = dialogue(_turns(row, shape, where, bad), where, bad, columns.ignore, shape[0])
    tools = json_of(row["tools"], f"{where}: 'tools'", bad, list) if _given(row, "tools") else []
    if odd := next((tool for tool in tools if not isinstance(tool, dict)), None):
        raise InputError(f"{where}: 'tools' holds {kind_of(odd)}; an object that describes a function is wanted")
    given = row.get("chat_template_kwargs") if _given(row, "chat_template_kwargs") else {}
    variables = variables_of(given, where, bad, columns.ignore)
    return dataclasses.replace(chat, tools=tools, variables=variables)


def _given(row: dict[str, Any], name: str) -> bool:
    return row.get(name) not in (None, "", [], {})


def _turns(row: dict[str, Any], shape: tuple[str, ...], where: str, bad: RowErrors) -> Any:
    """A row's messages, as they stand there."""
    if len(shape) == 1:
        turns = row[shape[0]]
        if not _given(row, "system"):
            return turns
        if not isinstance(turns, list | tuple) or any(isinstance(t, dict) and _is_system(t) for t in turns[:1]):
            raise InputError(f"{where}: 'system' beside messages that begin with one; remove one of the two")
    else:
        turns = [*_history(row, where), *_asked(row, shape, where, bad), *_replied(row, shape, where, bad)]
    system = text_of(row, "system", where, bad) if _given(row, "system") else ""
    return [{"role": "system", "content": system}, *turns] if system else turns


def _is_system(turn: dict[str, Any]) -> bool:
    return "system" in (turn.get("role"), turn.get("from"))


def _asked(row: dict[str, Any], shape: tuple[str, ...], where: str, bad: RowErrors) -> list[Any]:
    """What stands before the reply: a question, or earlier turns."""
    if shape[0] == "prompt" and isinstance(row["prompt"], list):
        return row["prompt"]
    text = text_of(row, shape[0], where, bad)
    more = text_of(row, "input", where, bad) if "input" in row else ""
    return [{"role": "user", "content": f"{text}\n\n{more}" if more else text}]


def _replied(row: dict[str, Any], shape: tuple[str, ...], where: str, bad: RowErrors) -> list[Any]:
    """The reply: text, maybe with thoughts beside it; or messages."""
    reply = row[shape[1]]
    thoughts = {"reasoning_content": row["reasoning_content"]} if "reasoning_content" in row else {}
    turns = isinstance(reply, list) and bool(reply) and all(isinstance(turn, dict) for turn in reply)
    if shape[1] == "completion" and turns and not thoughts:
        return reply
    return [{"role": "assistant", "content": text_of(row, shape[1], where, bad), **thoughts}]


def _history(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Earlier questions and replies."""
    pairs = parsed(row["history"], f"{where}: 'history'", (list, tuple)) if _given(row, "history") else []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{where}: 'history' is {reprlib.repr(pairs)}; a list of [question, reply] pairs is wanted")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
