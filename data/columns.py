"""Columns of fine-tuning rows: the known shapes of a row, and the dialogue that a row becomes."""

import dataclasses
import re
import reprlib
from typing import Any

from .. import InputError
from .dialogue import Chat, Message, parse_messages
from .errors import RAISE, RowErrors
from .fields import Record, describe, did_you_mean, parse_json, plain_json, text_of

_ALWAYS = ("system", "tools", "chat_template_kwargs")
_SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {  # required columns -> optional columns
    ("messages",): _ALWAYS,
    ("conversations",): _ALWAYS,
    ("prompt", "completion"): ("history", "reasoning_content", *_ALWAYS),
    ("instruction", "output"): ("input", "history", *_ALWAYS),
}
_COLUMNS = tuple(dict.fromkeys(name for shape, optional in _SHAPES.items() for name in (*shape, *optional)))
_EXPECTED = (
    'expected one of {"prompt", "completion"}, {"instruction", "input", "output"}, '
    '{"messages": [{"role", "content"}, ...]} and {"conversations": [{"from", "value"}, ...]}'
)
# Columns about a row that say nothing of its words: they are ignored without being named.
_METADATA = re.compile(
    "id|.*_id|idx|index|uuid|hash|meta|metadata|source|origin|dataset|subset|split|category|task|type|topic|domain|"
    "tags|lang|language|license|url|date|timestamp|version|author|where|_.*"
)
_TEMPLATE_VARIABLES = ("messages", "tools", "add_generation_prompt")  # set by the renderer, so not by a row


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a file's columns. Raises InputError for a name that no shape has.

    names: `OURS=THEIRS` pairs; a row without the column THEIRS keeps its own names.
    ignore: columns, fields of messages and template variables to leave out.
    """

    names: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            ours, equals, theirs = name.partition("=")
            if not equals or not theirs:
                raise InputError(f"--data.columns {name}: expected OURS=THEIRS, e.g. prompt=question")
            if ours not in _COLUMNS:
                hint = did_you_mean(ours, _COLUMNS)
                raise InputError(
                    f"--data.columns {name}: unknown {ours!r}{hint}; expected one of {', '.join(_COLUMNS)}"
                )
        if len({ours for ours, _ in self._pairs()}) < len(self.names):
            raise InputError(f"--data.columns {' '.join(self.names)}: duplicate column of ours; name each once")

    def _pairs(self) -> list[tuple[str, str]]:
        return [(ours, theirs) for ours, _, theirs in (name.partition("=") for name in self.names)]

    def rename(self, row: Record, where: str) -> Record:
        """Return the row under our names, without the ignored columns. Raises InputError for a name clash."""
        row = {key: value for key, value in row.items() if key not in self.ignore}
        renamed = {ours: row[theirs] for ours, theirs in self._pairs() if theirs in row}
        sources = {theirs for _, theirs in self._pairs()}
        rest = {key: value for key, value in row.items() if key not in sources}
        if clash := sorted(renamed.keys() & rest.keys()):
            hint = f"--data.columns reads it from another column; leave one out with --data.ignore {clash[0]}"
            raise InputError(f"{where}: column {clash[0]!r} exists, but {hint}")
        return rest | renamed


def chat_of(row: Record, where: str, errors: RowErrors = RAISE, columns: Columns = Columns()) -> Chat:
    """Return the dialogue of a row of any known shape.

    Raises InputError naming `where`, e.g. for a column that is not read, unless it is null or metadata (an id, ...).
    """
    if isinstance(row.get("chat"), Chat):  # parsed before, when its file was read
        return row["chat"]
    row = columns.rename(row, where)
    shape = _find_shape(row, where)
    row = {key: row[key] for key in (*shape, *_SHAPES[shape]) if key in shape or row.get(key) is not None}
    chat = parse_messages(_messages(row, shape, where, errors), where, errors, columns.ignore, shape[0])
    variables = _template_variables(row, where, errors) if _has(row, "chat_template_kwargs") else {}
    return dataclasses.replace(
        chat,
        tools=_tools(row, where, errors) if _has(row, "tools") else [],
        variables={name: value for name, value in variables.items() if name not in columns.ignore},
    )


def _find_shape(row: Record, where: str) -> tuple[str, ...]:
    """Return the first shape whose columns are in the row, preferring one without nulls."""
    present = {key for key, value in row.items() if value is not None}  # null in a table: the row lacks the column
    shape = next((shape for keys in (present, set(row)) for shape in _SHAPES if keys.issuperset(shape)), None)
    fields = f"{where}: fields {reprlib.repr(sorted(row))}"
    if shape is None:
        raise InputError(f"{fields}; {_EXPECTED}; name yours with --data.columns prompt=THEIRS completion=THEIRS")
    known = {*shape, *_SHAPES[shape]}
    if unread := sorted(key for key in present - known if not _METADATA.fullmatch(key.lower())):
        problem = f"column {unread[0]!r} beside {shape[0]!r} is not read{did_you_mean(unread[0], known)}"
        raise InputError(f"{fields}: {problem}; {_EXPECTED}; rename it, or leave it out with --data.ignore {unread[0]}")
    return shape


def _has(row: Record, name: str) -> bool:
    return row.get(name) not in (None, "", [], {})


def _messages(row: Record, shape: tuple[str, ...], where: str, errors: RowErrors) -> Any:
    """Return the messages of a row, not yet parsed."""
    if len(shape) == 1:
        messages = row[shape[0]]
    else:
        asked, answer = shape
        messages = [*_history(row, where), *_question(row, asked, where, errors), *_reply(row, answer, where, errors)]
    if not _has(row, "system") or not isinstance(messages, list | tuple):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if "system" in (first.get("role"), first.get("from")):
        raise InputError(f"{where}: 'system' beside messages that begin with a system message; remove one of the two")
    return [{"role": "system", "content": text_of(row, "system", where, errors)}, *messages]


def _history(row: Record, where: str) -> list[Message]:
    """Return earlier turns, from a list of [question, reply] pairs."""
    pairs = parse_json(row["history"], f"{where}: 'history'", (list, tuple)) if _has(row, "history") else []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{where}: 'history' is {reprlib.repr(pairs)}; expected a list of [question, reply] pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _question(row: Record, column: str, where: str, errors: RowErrors) -> list[Any]:
    """Return what the reply answers: one question with its input, or, as `prompt`, a list of messages."""
    if column == "prompt" and isinstance(row["prompt"], list):
        return row["prompt"]
    text = text_of(row, column, where, errors)
    context = text_of(row, "input", where, errors) if "input" in row else ""
    return [{"role": "user", "content": f"{text}\n\n{context}" if context else text}]


def _reply(row: Record, column: str, where: str, errors: RowErrors) -> list[Any]:
    """Return the reply: text, maybe with reasoning beside it, or, as `completion`, a list of messages."""
    reply = row[column]
    reasoning = {"reasoning_content": row["reasoning_content"]} if "reasoning_content" in row else {}
    is_messages = isinstance(reply, list) and bool(reply) and all(isinstance(turn, dict) for turn in reply)
    if column == "completion" and is_messages and not reasoning:
        return reply
    return [{"role": "assistant", "content": text_of(row, column, where, errors), **reasoning}]


def _tools(row: Record, where: str, errors: RowErrors) -> list[dict[str, Any]]:
    tools = plain_json(row["tools"], f"{where}: 'tools'", errors, list)
    if other := next((tool for tool in tools if not isinstance(tool, dict)), None):
        raise InputError(f"{where}: 'tools' holds {describe(other)}; expected an object that describes a function")
    return tools


def _template_variables(row: Record, where: str, errors: RowErrors) -> dict[str, Any]:
    variables = plain_json(row["chat_template_kwargs"], f"{where}: 'chat_template_kwargs'", errors, dict)
    if reserved := next((name for name in _TEMPLATE_VARIABLES if name in variables), None):
        raise InputError(f"{where}: 'chat_template_kwargs' sets {reserved!r}, which only the renderer sets; remove it")
    return variables
