"""A dialogue as a chat template reads it, and how its messages are parsed and checked."""

import dataclasses
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .. import InputError
from .errors import RAISE, RowErrors
from .fields import describe, did_you_mean, parse_json, plain_json, text_of

ROLES = ("system", "user", "assistant")
_TEMPLATE_ROLES = (*ROLES, "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELD_ROLES = {  # field of a message -> roles that may have it
    "role": _TEMPLATE_ROLES,
    "content": _TEMPLATE_ROLES,
    "name": _TEMPLATE_ROLES,
    "weight": ROLES,
    "train": ROLES,
    "tool_calls": ("assistant",),
    **dict.fromkeys(_REASONING, ("assistant",)),
    "tool_call_id": ("tool",),
}
_LOSS_FLAGS = {"weight": ((0, 1), "0 or 1"), "train": ((False, True), "true or false")}  # field -> (values, in words)
Message = dict[str, Any]  # {"role", "content"}, and maybe other fields of _FIELD_ROLES


@dataclasses.dataclass(frozen=True)
class Chat:
    """A dialogue.

    messages: {"role", "content"}, and maybe what else a template reads: tool_calls, reasoning_content, name, ...
    tools: descriptions of the functions that the assistant may call.
    variables: further variables of the template, e.g. {"enable_thinking": False}.
    context: indices of assistant messages that are input only, without loss.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: tuple[int, ...] = ()

    @property
    def learnt(self) -> list[bool]:
        """For each message, True if the loss is on it."""
        return [turn["role"] == "assistant" and n not in self.context for n, turn in enumerate(self.messages)]

    @property
    def prompt(self) -> "Chat":
        """The dialogue without its last reply."""
        last = len(self.messages) - (self.messages[-1]["role"] == "assistant")
        return dataclasses.replace(self, messages=self.messages[:last])

    @property
    def replies_in_text(self) -> bool:
        """True if the last message is text alone, without calls or reasoning."""
        return self.messages[-1].keys() == {"role", "content"}

    def answered(self, text: str) -> "Chat":
        """Return the dialogue with `text` as its last reply."""
        return dataclasses.replace(self, messages=[*self.prompt.messages, {"role": "assistant", "content": text}])

    @property
    def beyond_text(self) -> dict[str, None]:
        """Names of all content besides roles and text, which a template may ignore; an ordered set.

        The id that links a tool's result to its call, and the name of a called function, only repeat other content.
        """
        names = dict.fromkeys(["tools"] if self.tools else []) | dict.fromkeys(self.variables)
        for turn in self.messages:
            known = {"role", "content"} | ({"tool_call_id", "name"} if turn["role"] == "tool" else set())
            names |= dict.fromkeys(key for key in turn if key not in known)
        return names

    def without(self, name: str) -> "Chat":
        """Return the dialogue without one of the names of `beyond_text`."""
        return dataclasses.replace(
            self,
            messages=[{k: v for k, v in turn.items() if k != name} for turn in self.messages],
            tools=() if name == "tools" else self.tools,
            variables={k: v for k, v in self.variables.items() if k != name},
        )


def as_chat(dialogue: Chat | Sequence[Message]) -> Chat:
    """Return a dialogue; a list of messages becomes one whose assistant messages are all learnt."""
    return dialogue if isinstance(dialogue, Chat) else Chat(dialogue)


def strings(value: Any) -> Iterator[str]:
    """Yield all text in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def parse_messages(
    turns: Any, where: str, errors: RowErrors = RAISE, ignore: Collection[str] = (), column: str = "messages"
) -> Chat:
    """Return the dialogue of a list of messages, each {"role", "content"} or ShareGPT's {"from", "value"}.

    The loss is on the assistant's messages, except those with "weight": 0 or "train": false. What follows the last
    learnt message is dropped, since no target depends on it. Raises InputError naming `where` and the message.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise InputError(f"{where}: {column!r} is {describe(turns)}; expected a list of {{role, content}}")
    messages, learnt = [], []
    for n, turn in enumerate(turns):
        place = f"{where}: message {n}"
        message, has_loss = _parse_message(turn, place, errors, ignore)
        if message["role"] == "system" and n:
            raise InputError(f"{place} is from system; only the first may be")
        if message["role"] == "assistant" and has_loss:
            if not (message["content"] or "").strip() and not message.get("tool_calls"):
                raise InputError(f"{place}: no words by the assistant, so nothing to learn; drop the row or fill it in")
            learnt.append(n)
        messages.append(message)
    if not learnt:
        raise InputError(f"{where}: no words by the assistant, so nothing to learn; drop the row or fill it in")
    end = learnt[-1] + 1 if messages[-1]["role"] == "assistant" else len(messages)
    context = (n for n in range(end) if messages[n]["role"] == "assistant" and n not in learnt)
    return Chat(messages[:end], context=tuple(context))


def _parse_message(turn: Any, place: str, errors: RowErrors, ignore: Collection[str]) -> tuple[Message, bool]:
    """Return (the message as a template reads it, True unless it is marked as free of loss)."""
    if isinstance(turn, dict):  # null in a table means that the message lacks the field
        turn = {k: v for k, v in turn.items() if (v is not None or k == "content") and k not in ignore}
        turn = _from_sharegpt(turn, place) if "from" in turn else turn
    if not isinstance(turn, dict) or "role" not in turn or not {"content", "tool_calls"} & set(turn):
        raise InputError(f"{place} is {describe(turn)}; expected {{role, content}}")
    role = turn["role"]
    if role not in _TEMPLATE_ROLES:
        raise InputError(f"{place} has role {reprlib.repr(role)}; expected one of {', '.join(_TEMPLATE_ROLES)}")
    for key in turn:
        if role not in _FIELD_ROLES.get(key, ()):
            known = [name for name, roles in _FIELD_ROLES.items() if role in roles]
            problem = f"field {key!r} of {role} is not read{did_you_mean(key, known)}"
            raise InputError(f"{place}: {problem}; rename it, or leave it out with --data.ignore {key}")
    calls = _parse_calls(turn["tool_calls"], place, errors) if "tool_calls" in turn else []
    content = None
    if not calls or turn.get("content") not in (None, ""):
        content = text_of(turn, "content", place, errors)
    message = {"role": role, "content": content}
    message |= {k: text_of(turn, k, place, errors) for k in (*_REASONING, "name", "tool_call_id") if k in turn}
    return message | ({"tool_calls": calls} if calls else {}), _has_loss(turn, place)


def _has_loss(turn: Message, place: str) -> bool:
    """Return False if `weight` or `train` marks the message as free of loss."""
    flags = {}
    for key, (values, expected) in _LOSS_FLAGS.items():
        if key not in turn:
            continue
        value = turn[key]
        if value not in values or isinstance(value, bool) != (key == "train"):
            raise InputError(f"{place}: {key!r} is {reprlib.repr(value)}; expected {expected}")
        if value and turn["role"] != "assistant":
            raise InputError(f"{place}: {key!r} is {value}, but only the assistant's words are learnt; remove it")
        flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise InputError(f"{place}: 'weight' and 'train' contradict each other; remove one")
    return False not in flags.values()


def _from_sharegpt(turn: Message, place: str) -> Message:
    sender, text = turn.pop("from"), turn.pop("value", None)
    if {"role", "content"} & set(turn):
        raise InputError(f"{place} has {{from, value}} and {{role, content}}; expected one of the two")
    role = _SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    if sender == "function_call":
        call = parse_json(text, f"{place}: 'value'", (dict, list))
        return {"role": role, "content": None, "tool_calls": call if isinstance(call, list) else [call], **turn}
    return {"role": role, "content": text, **turn}


def _parse_calls(value: Any, place: str, errors: RowErrors) -> list[Message]:
    """Return a message's function calls: each {"name", "arguments"}, alone or as OpenAI's {"function": {...}}.

    Arguments written as JSON text become an object: templates write them as JSON themselves.
    """
    calls = plain_json(value, f"{place}: 'tool_calls'", errors, list)
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise InputError(f"{place}: a call is {describe(call)}; expected {{name, arguments}}")
        known = {"name", "arguments", "id", "type", "index"}
        inner = known if function is call else {"name", "arguments"}
        for keys, names in ((set(function), inner), (set(call) - {"function"}, known)):
            if unread := sorted(keys - names):
                hint = did_you_mean(unread[0], names)
                raise InputError(f"{place}: field {unread[0]!r} of a call is not read{hint}; remove it")
        arguments = f"{place}: the arguments of {function['name']!r}"
        function["arguments"] = plain_json(function["arguments"], arguments, errors, dict)
    return calls
