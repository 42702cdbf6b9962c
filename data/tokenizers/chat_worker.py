"""The child process of chat.py: renders chat templates, which may stall, fill or crash it.

It imports the standard library, jinja2 and chat_spans.py only. stdin: a line {"template", "variables", "date",
"special", "prompt", "spans", "seconds", "bytes"}, then a line for each conversation, {"messages", "tools", "variables",
"learnt"}. stdout: {"names"} once the template compiles, with all that its source names, or {"error"} and no more; then
a line for each conversation, {"text", "spans", "marked"} or {"error"}.
"""

import datetime
import json
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # the folders of jinja2 and of this file: the interpreter starts without them
    from chat_spans import Refused, derived_spans, learnt_marks, marked_spans  # type: ignore[import-not-found]
else:
    from .chat_spans import Refused, derived_spans, learnt_marks, marked_spans

from jinja2 import TemplateError, TemplateSyntaxError, ext, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: renders its content and records where it is."""

    tags = {"generation"}  # noqa: RUF012
    environment: Any

    def parse(self, parser: Any) -> Any:
        """Parse a block into a call of `mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.marked = True
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    @pass_eval_context
    def mark(self, context: Any, caller: Callable[[], str]) -> str:
        """Render the block, and record its text and where it starts."""
        text = caller()
        self.environment.marks.append((sum(map(len, self.environment.parts)), text))
        return text


class SafeNamespace(Namespace):
    """`namespace(...)` as in transformers: no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # so that `namespace(self=...)` works
        """Make a namespace from mappings and keyword arguments."""
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            SafeNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute."""
        SafeNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")


class SafeDict:
    """`dict(...)` and `dict.fromkeys(...)` as in transformers: not the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        """Return `dict(...)`."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """Return `dict.fromkeys(...)`."""
        return dict.fromkeys(*args)


class Sandbox(ImmutableSandboxedEnvironment):
    """The jinja2 environment in which transformers renders chat templates, with a fixed date.

    marked: the template has {% generation %}. parts: the output so far. marks: (start, text) of marked blocks.
    """

    def __init__(self, date: str) -> None:
        """Make the environment; `date` is in ISO format."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.marked, self.parts, self.marks = False, [], []
        self.filters["tojson"] = _tojson
        more: Any = {
            "raise_exception": _raise_exception,
            "dict": SafeDict(),
            "namespace": SafeNamespace,
            "strftime_now": datetime.datetime.fromisoformat(date).strftime,
        }
        self.globals.update(more)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise: jinja2 returns an undefined value, which prints as nothing."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise TemplateError(message)


def renderer(header: dict[str, Any]) -> tuple[Sandbox, Callable[..., str]]:
    """Return (the environment, a function (messages, add_generation_prompt, further variables) -> text)."""
    env = Sandbox(header["date"])
    template = env.from_string(header["template"])

    def render(messages: list, prompt: bool, variables: dict[str, Any] = {}) -> str:  # noqa: B006
        limit_time(header["seconds"])
        env.parts, env.marks = [], []
        usual = {"tools": None, "documents": None}
        chat = {"messages": messages, "add_generation_prompt": prompt}
        for part in template.generate(header["variables"] | usual | variables | chat):
            env.parts.append(part)
        return "".join(env.parts)

    return env, render


def names_in(env: Sandbox, template: str) -> list[str]:
    """Return every variable, attribute and constant text in a template's source."""
    tree = env.parse(template)
    names = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return sorted(names | texts)


def limit_time(seconds: float) -> None:
    """Have the kernel end this process after so many further seconds of CPU time, whatever it is doing then."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory(size: int) -> None:
    """Limit the address space to `size` bytes, if the system can."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except (ImportError, OSError, ValueError):
        pass


def reason(e: BaseException) -> str:
    """Return one line that says what went wrong in a template."""
    message = "".join(c if c.isprintable() else "?" for c in " ".join(str(e)[:400].split()))
    if isinstance(e, TemplateSyntaxError):
        return f"line {e.lineno}: {message}"
    if isinstance(e, SecurityError):
        return f"it reaches for what a template may not ({message})"
    if isinstance(e, MemoryError):
        return "it needs too much memory"
    return message if type(e) in (Refused, TemplateError) else f"{type(e).__name__}: {message}"


def answer(env: Sandbox, render: Callable[..., str], header: dict, special: re.Pattern, line: bytes) -> dict:
    """Return the reply to one conversation."""
    chat = json.loads(line)
    turns, learnt = chat["messages"], chat["learnt"]
    usual = partial(render, variables={"tools": chat["tools"]})
    render = partial(render, variables={"tools": chat["tools"], **chat["variables"]})
    text = render(turns, header["prompt"])
    if len(text) > (16 << 20) + 64 * len(line):
        raise Refused(f"{len(text)} characters come of {len(line)}")
    spans = []
    if header["spans"] and env.marked:
        spans = marked_spans(text, learnt_marks(render, env, turns, learnt))
    elif header["spans"]:
        spans = derived_spans(render, turns, text, special, learnt, usual)
    return {"text": text, "spans": spans, "marked": env.marked}


def main() -> None:
    """Answer every line of stdin."""
    header = json.loads(sys.stdin.buffer.readline())
    limit_memory(header["bytes"])
    try:
        limit_time(header["seconds"])
        env, render = renderer(header)
        special = re.compile(header["special"])
        print(json.dumps({"names": names_in(env, header["template"])}), flush=True)  # the template compiles
    except Exception as e:  # also MemoryError and RecursionError
        print(json.dumps({"error": reason(e)}), flush=True)
        return
    for line in sys.stdin.buffer:
        try:
            reply = json.dumps(answer(env, render, header, special, line))
        except Exception as e:
            reply = json.dumps({"error": reason(e)})
        print(reply, flush=True)


if __name__ == "__main__":
    main()
