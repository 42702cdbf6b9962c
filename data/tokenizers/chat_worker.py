"""Renders chat templates in a process of its own, which a hostile template may stall, fill or crash; see chat.py.

It imports the standard library, jinja2 and chat_spans.py alone. stdin: one line {"template", "variables", "date",
"special", "prompt", "spans", "seconds", "bytes"}, then one line a conversation, {"messages", "tools", "variables",
"learnt"}. stdout: {"names"} once the template compiles, all that its source names, or {"error"} and no more; then one
line each, {"text", "spans", "marked"} or {"error"}.
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
    sys.path += sys.argv[1:]  # where jinja2 and this file are: the interpreter was started with neither
    from chat_spans import Refused, derived_spans, learnt_marks, marked_spans  # type: ignore[import-not-found]
else:
    from .chat_spans import Refused, derived_spans, learnt_marks, marked_spans

from jinja2 import TemplateError, TemplateSyntaxError, ext, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: as if it were not there, and noted down."""

    tags = {"generation"}  # noqa: RUF012
    environment: Any

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.marked = True
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    @pass_eval_context
    def mark(self, context: Any, caller: Callable[[], str]) -> str:
        text = caller()
        self.environment.marks.append((sum(map(len, self.environment.parts)), text))
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """`marked`: the template has {% generation %}; `parts`: what came out so far; `marks`: (start, text) of blocks."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.marked, self.parts, self.marks = False, [], []
        self.filters["tojson"] = tojson
        more: Any = {
            "raise_exception": raise_exception,
            "dict": Dict(),
            "namespace": Names,
        }
        self.globals.update(more)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """jinja2's own is undefined, and an undefined value prints as nothing: here an attempt is an error."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")


# The rest of transformers' environment. Its `dict` and `namespace` give no way to attributes of Python's own.


class Names(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # so that `namespace(self=...)` works
        own, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            Names._check(name)
        Namespace.__init__(own, given)

    def __setitem__(self, name: str, value: Any) -> None:
        Names._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")


class Dict:
    """`dict(...)` and `dict.fromkeys(...)`, not the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


def renderer(header: dict[str, Any]) -> tuple[Sandbox, Callable[..., str]]:
    """(the environment, (messages, add_generation_prompt, further variables) -> text).

    Templates that write a date get the one of the run, so that its rows are the same on another day.
    """
    env = Sandbox()
    now: Any = datetime.datetime.fromisoformat(header["date"]).strftime
    env.globals["strftime_now"] = now
    template = env.from_string(header["template"])

    def render(messages: list, prompt: bool, variables: dict[str, Any] = {}) -> str:  # noqa: B006
        arm(header["seconds"])
        env.parts, env.marks = [], []
        given = {"tools": None, "documents": None, **variables, "messages": messages, "add_generation_prompt": prompt}
        for part in template.generate(header["variables"] | given):
            env.parts.append(part)
        return "".join(env.parts)

    return env, render


def names(env: Sandbox, template: str) -> list[str]:
    """Every variable, attribute and constant text in a template's source."""
    tree = env.parse(template)
    found = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return sorted(found | texts)


def arm(seconds: float) -> None:
    """The kernel ends this process after so much of its own time, whatever it is doing then."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory(size: int) -> None:
    """At most `size` bytes of addresses, where the system can say so."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except (ImportError, OSError, ValueError):
        pass


def reason(e: BaseException) -> str:
    """One line for what went wrong in a template."""
    said = "".join(c if c.isprintable() else "?" for c in " ".join(str(e)[:400].split()))
    if isinstance(e, TemplateSyntaxError):
        return f"line {e.lineno}: {said}"
    if isinstance(e, SecurityError):
        return f"it reaches for what a template may not ({said})"
    if isinstance(e, MemoryError):
        return "it needs too much memory"
    return said if type(e) in (Refused, TemplateError) else f"{type(e).__name__}: {said}"


def answer(env: Sandbox, render: Callable[..., str], header: dict, special: re.Pattern, line: bytes) -> dict:
    """The reply to one conversation."""
    chat = json.loads(line)
    turns, learnt = chat["messages"], chat["learnt"]
    usual = partial(render, variables={"tools": chat["tools"]})
    one = partial(render, variables={"tools": chat["tools"], **chat["variables"]})
    text = one(turns, header["prompt"])
    if len(text) > (16 << 20) + 64 * len(line):
        raise Refused(f"{len(text)} characters come of {len(line)}")
    if not header["spans"]:
        return {"text": text, "spans": [], "marked": False}
    if env.marked:
        spans = marked_spans(text, learnt_marks(one, env, turns, learnt))
    else:
        spans = derived_spans(one, turns, text, special, learnt, usual)
    return {"text": text, "spans": spans, "marked": env.marked}


def main() -> None:
    """Answer every line of stdin."""
    header = json.loads(sys.stdin.buffer.readline())
    limit_memory(header["bytes"])
    try:
        arm(header["seconds"])
        env, render = renderer(header)
        special = re.compile(header["special"])
        print(json.dumps({"names": names(env, header["template"])}), flush=True)  # the template compiles
    except Exception as e:  # MemoryError and RecursionError too
        print(json.dumps({"error": reason(e)}), flush=True)
        return
    for line in sys.stdin.buffer:
        try:
            said = json.dumps(answer(env, render, header, special, line))
        except Exception as e:
            said = json.dumps({"error": reason(e)})
        print(said, flush=True)


if __name__ == "__main__":
    main()
