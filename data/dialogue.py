"""A dialogue as a chat template takes it, and the checks that its messages, tools and variables pass."""

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .. import InputError
from .errors import RAISE, RowErrors
from .sources import text_of

ROLES = ("system", "user", "assistant")

Message = dict[str, Any]  # {"role", "content"} and maybe other fields of _FIELDS
_SENDERS = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}  # ShareGPT's
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_FIELDS = {  # field of a message -> the roles that may have it
    "role": (*ROLES, "tool"),
    "content": (*ROLES, "tool"),
    "name": (*ROLES, "tool"),
    "weight": ROLES,
    "train": ROLES,
    "tool_calls": ("assistant",),
    **dict.fromkeys(_THOUGHTS, ("assistant",)),
    "tool_call_id": ("tool",),
}
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")  # of every template; a row does not set them
_DEPTH = 64  # of nested JSON


@dataclasses.dataclass(frozen=True)
class Chat:
    """A dialogue.

    messages: {"role", "content"}, and what a template may read besides: tool_calls, reasoning_content, name, ...
    tools: descriptions of the functions that the assistant may call.
    variables: further variables of the template, e.g. {"enable_thinking": False}.
    context: indices of the assistant's messages that are read but not learnt.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: tuple[int, ...] = ()

    @property
    def learnt(self) -> list[bool]:
        """Whether each message is a target of the loss."""
        return [turn["role"] == "assistant" and n not in self.context for n, turn in enumerate(self.messages)]

    @property
    def prompt(self) -> "Chat":
        """The dialogue without its last reply."""
        last = len(self.messages) - (self.messages[-1]["role"] == "assistant")
        return dataclasses.replace(self, messages=self.messages[:last])

    @property
    def replies_in_text(self) -> bool:
        """Whether the last message is text alone, without calls or thoughts."""
        return self.messages[-1].keys() == {"role", "content"}

    def answered(self, text: str) -> "Chat":
        """The dialogue with another last reply."""
        return dataclasses.replace(self, messages=[*self.prompt.messages, {"role": "assistant", "content": text}])

    @property
    def beyond_text(self) -> dict[str, None]:
        """Names of what it says besides the text of its messages: a template may not read them. In order, each once.

        An id that links a result to its call, and the name of a called function, only repeat what stands elsewhere.
        """
        found = dict.fromkeys(["tools"] if self.tools else []) | dict.fromkeys(self.variables)
        for turn in self.messages:
            link = {"tool_call_id", "name"} if turn["role"] == "tool" else set()
            found |= dict.fromkeys(key for key in turn if key not in {"role", "content"} | link)
        return found

    def without(self, name: str) -> "Chat":
        """The dialogue without one of those."""
        return dataclasses.replace(
            self,
            messages=[{k: v for k, v in turn.items() if k != name} for turn in self.messages],
            tools=() if name == "tools" else self.tools,
            variables={k: v for k, v in self.variables.items() if k != name},
        )


def as_chat(dialogue: Chat | Sequence[Message]) -> Chat:
    """A dialogue; a list of messages is one whose assistant is learnt throughout."""
    return dialogue if isinstance(dialogue, Chat) else Chat(dialogue)


def strings(value: Any) -> Iterator[str]:
    """All text in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def dialogue(
    turns: Any, where: str, bad: RowErrors = RAISE, ignore: Collection[str] = (), name: str = "messages"
) -> Chat:
    """The dialogue of a list of messages. InputError names `where` and the message.

    A message is {"role", "content"} or ShareGPT's {"from", "value"}. The assistant's messages are learnt but for those
    with "weight": 0 or "train": false. What follows the last one learnt is left out: no target sees it.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise InputError(f"{where}: {name!r} is {kind_of(turns)}; a list of {{role, content}} is wanted")
    messages, context = [], []
    for n, turn in enumerate(turns):
        message, learnt = _message(turn, f"{where}: message {n}", bad, ignore)
        if message["role"] == "system" and n:
            raise InputError(f"{where}: message {n} is from system; only the first may be")
        messages.append(message)
        if message["role"] == "assistant" and not learnt:
            context.append(n)
    chat = Chat(messages, context=tuple(context))
    targets = [n for n, learnt in enumerate(chat.learnt) if learnt]
    silent = next((n for n in targets if not _says_something(messages[n])), None)
    if not targets or silent is not None:
        place = f"{where}: " if silent is None else f"{where}: message {silent}: "
        raise InputError(f"{place}no words by the assistant, so nothing to learn; drop the row or fill it in")
    end = targets[-1] + 1 if messages[-1]["role"] == "assistant" else len(messages)
    return Chat(messages[:end], context=tuple(n for n in context if n < end))


def _says_something(turn: Message) -> bool:
    return bool((turn["content"] or "").strip() or turn.get("tool_calls"))


def _message(turn: Any, place: str, bad: RowErrors, ignore: Collection[str]) -> tuple[Message, bool]:
    """(one message as a template takes it, whether it is learnt if it is the assistant's)."""
    if isinstance(turn, dict):  # in a table, null is what a message does not have
        turn = {k: v for k, v in turn.items() if (v is not None or k == "content") and k not in ignore}
        turn = _from_sharegpt(turn, place) if "from" in turn else turn
    if not isinstance(turn, dict) or "role" not in turn or not {"content", "tool_calls"} & set(turn):
        raise InputError(f"{place} is {kind_of(turn)}; {{role, content}} is wanted")
    role = turn["role"]
    if role not in _FIELDS["role"]:
        wanted = ", ".join(_FIELDS["role"])
        raise InputError(f"{place} has role {reprlib.repr(role)}; one of {wanted} is wanted")
    for key in turn:
        if role not in _FIELDS.get(key, ()):
            known = [name for name, roles in _FIELDS.items() if role in roles]
            raise InputError(f"{place}: nothing reads {key!r} of {role}{near(key, known)}; rename it, or leave it out "
                             f"with --data.ignore {key}")  # fmt: skip
    content = turn.get("content")
    calls = calls_of(turn["tool_calls"], place, bad) if "tool_calls" in turn else []
    if not calls or (content is not None and content != ""):
        content = text_of(turn, "content", place, bad)
    message = {"role": role, "content": content or None if calls else content}
    rest = {k: text_of(turn, k, place, bad) for k in (*_THOUGHTS, "name", "tool_call_id") if k in turn}
    return message | rest | ({"tool_calls": calls} if calls else {}), _is_learnt(turn, place)


def _is_learnt(turn: Message, place: str) -> bool:
    """Whether `weight` or `train` lets a message be learnt."""
    for key, kinds in (("weight", (int, float)), ("train", (bool,))):
        value = turn.get(key, True)
        if key in turn and (type(value) not in kinds or value not in (0, 1)):
            said = "0 or 1" if key == "weight" else "true or false"
            raise InputError(f"{place}: {key!r} is {reprlib.repr(value)}; {said} is wanted")
        if key in turn and value and turn["role"] != "assistant":
            raise InputError(f"{place}: {key!r} is {value}, but only the assistant's words are learnt; remove it")
    said = {bool(turn[key]) for key in ("weight", "train") if key in turn}
    if len(said) > 1:
        raise InputError(f"{place}: 'weight' and 'train' contradict each other; remove one")
    return False not in said


def _from_sharegpt(turn: Message, place: str) -> Message:
    sender, text = turn.pop("from"), turn.pop("value", None)
    if {"role", "content"} & set(turn):
        raise InputError(f"{place} has {{from, value}} and {{role, content}}; one of the two is wanted")
    role = _SENDERS.get(sender, sender) if isinstance(sender, str) else sender
    if sender == "function_call":
        call = parsed(text, f"{place}: 'value'", (dict, list))
        return {"role": role, "content": None, "tool_calls": call if isinstance(call, list) else [call], **turn}
    return {"role": role, "content": text, **turn}


def calls_of(value: Any, place: str, bad: RowErrors) -> list[Message]:
    """The calls of functions of one message: each {"name", "arguments"}, alone or as OpenAI's {"function": {...}}.

    Arguments written as JSON text become an object: templates write them as JSON themselves.
    """
    calls = json_of(value, f"{place}: 'tool_calls'", bad, list)
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
            raise InputError(f"{place}: a call is {kind_of(call)}; {{name, arguments}} is wanted")
        known = {"name", "arguments"} | ({"id", "type", "index"} if inner is call else set())
        for keys, names in ((set(inner), known), (set(call) - {"function"}, known | {"id", "type", "index"})):
            if unknown := sorted(keys - names):
                raise InputError(f"{place}: nothing reads {unknown[0]!r} of a call{near(unknown[0], names)}; remove it")
        inner["arguments"] = json_of(inner["arguments"], f"{place}: the arguments of {inner['name']!r}", bad, dict)
    return calls


def json_of(value: Any, place: str, bad: RowErrors, kind: Any) -> Any:
    """A copy of a list or object as JSON has it, which may be written as text; its text is Unicode."""
    return _plain(parsed(value, place, kind), place, bad, 0)


def parsed(value: Any, place: str, kind: Any) -> Any:
    """A list or an object, which may be written as JSON text."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = value
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "an object or a list" if kind == (dict, list) else "a list"
        raise InputError(f"{place} is {kind_of(found)}; {wanted} is wanted, maybe as JSON text")
    return found


def _plain(value: Any, place: str, bad: RowErrors, depth: int) -> Any:
    if depth > _DEPTH:
        raise InputError(f"{place}: nested deeper than {_DEPTH} levels; write it flatter")
    if isinstance(value, str):
        return text_of({"": value}, "", place, bad)
    if isinstance(value, dict):
        return {_plain(str(k), place, bad, depth): _plain(v, place, bad, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, place, bad, depth + 1) for v in value]
    if value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{place} holds a {type(value).__name__}; text, numbers, lists and objects are wanted")
    return value


def variables_of(value: Any, where: str, bad: RowErrors, ignore: Collection[str]) -> dict[str, Any]:
    """The variables of a row's `chat_template_kwargs`."""
    found = json_of(value, f"{where}: 'chat_template_kwargs'", bad, dict)
    if taken := next((name for name in _OWN_VARIABLES if name in found), None):
        raise InputError(f"{where}: 'chat_template_kwargs' sets {taken!r}, which is no variable of its own; remove it")
    return {name: inner for name, inner in found.items() if name not in ignore}


def kind_of(value: Any) -> str:
    """What a value is that is not what it should be, for a message."""
    if isinstance(value, dict):
        return f"an object with {reprlib.repr(sorted(map(str, value)))}"
    return "empty" if value == [] else "null" if value is None else f"a {type(value).__name__}"


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean x?` or nothing; upper and lower case are the same."""
    lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(str(name).lower(), lower, 1)
    return f"; did you mean {lower[found[0]]!r}?" if found else ""
