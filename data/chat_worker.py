"""Renders chat templates in a process of its own, which a hostile template may stall, fill or crash; see chat.py.

It imports the standard library and jinja2 alone. stdin: one line {"template", "variables", "special", "prompt",
"spans", "seconds", "bytes"}, then one line a conversation. stdout: {} once the template compiles, or {"error"} and no
more; then one line each, {"text", "spans", "marked"} or {"error"}.
"""

import datetime
import json
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # where jinja2 is: the interpreter was started without site-packages

from jinja2 import TemplateError, TemplateSyntaxError, ext, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Span = tuple[int, int]


class Refused(Exception):
    """Why no mask can be had."""


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
            "strftime_now": strftime_now,
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


def strftime_now(form):
    return datetime.datetime.now().strftime(form)


def renderer(header: dict[str, Any]) -> tuple[Sandbox, Callable[[list, bool], str]]:
    """(the environment, (messages, add_generation_prompt) -> text)."""
    env = Sandbox()
    template = env.from_string(header["template"])

    def render(messages: list, prompt: bool) -> str:
        arm(header["seconds"])
        env.parts, env.marks = [], []
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
        for part in template.generate(**header["variables"], **given):
            env.parts.append(part)
        return "".join(env.parts)

    return env, render


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


def marked_spans(text: str, marks: list[tuple[int, str]]) -> list[Span]:
    """What {% generation %} marks, as HF finds it."""
    for start, words in marks:
        if not text.startswith(words, start):
            raise Refused("{% generation %} is inside a macro or a filter, so where its words are is not known")
    if not any(words for _, words in marks):
        raise Refused("{% generation %} marks no words")
    return [(start, start + len(words)) for start, words in marks if words]


def derived_spans(render: Callable[[list, bool], str], turns: list, text: str, special: re.Pattern) -> list[Span]:
    """What each assistant turn adds to the prompt before it, with the token that ends it. `text` is of all `turns`."""
    spans = []
    for n, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render(turns[:n], True)
        after = text if n + 1 == len(turns) else render(turns[: n + 1], False)
        try:
            ends = _ends(before, after, turn["content"].strip(), special, lambda n=n: render(turns[:n], False))
            spans.append(_in_all(text, before, after, ends, turn["content"], special))
        except Refused as e:
            hint = "{% generation %} in the template would say which words to learn"
            raise Refused(f"message {n}: the template {e}; {hint}") from None
    return spans


def _ends(before: str, after: str, words: str, special: re.Pattern, bare: Callable[[], str]) -> list[int]:
    """Where the turn in `after` may end: after each of the special tokens, side by side, that follow its words.

    Without one it is where white space begins, which is not learnt.
    """
    if not after.startswith(before):
        raise Refused("does not write a reply where its generation prompt ends")
    start = len(before)
    at = after.find(words, start)
    found = list(special.finditer(after, start if at < 0 else at + len(words)))
    run = 1
    while run < len(found) and found[run].start() == found[run - 1].end():
        run += 1
    unclear = run < len(found) and (at < 0 or not words)
    if (at < 0 or after[start:at].strip() or unclear) and before == bare():
        raise Refused("takes no notice of add_generation_prompt, so where a reply begins is not known")
    if at < 0 and (unclear or not found):
        raise Refused("changes the words of this turn, and where it ends is not clear")
    return [one.end() for one in found[:run]] or [max(start, len(after.rstrip()))]


def _in_all(text: str, before: str, after: str, ends: list[int], content: str, special: re.Pattern) -> Span:
    """The same turn in the whole conversation, where a template may write it differently (Qwen3 drops thoughts)."""
    start = len(before)
    for end in reversed(ends):
        if text.startswith(after[:end]):
            return start, end
    ends_with, found = special.search(after, start), special.search(text, start)
    close = after[ends_with.start() : ends[-1]] if ends_with else ""
    if not text.startswith(before) or not close or not found or not text.startswith(close, found.start()):
        raise Refused("writes the turns before it differently once later ones follow")
    if text[start : found.start()].strip() not in content:
        raise Refused("writes this turn differently once later ones follow")
    return start, found.start() + len(close)


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


def answer(env: Sandbox, render: Callable[[list, bool], str], header: dict, special: re.Pattern, line: bytes) -> dict:
    """The reply to one conversation."""
    turns = json.loads(line)
    text = render(turns, header["prompt"])
    marks = env.marks
    if len(text) > (16 << 20) + 64 * len(line):
        raise Refused(f"{len(text)} characters come of {len(line)}")
    if not header["spans"]:
        return {"text": text, "spans": [], "marked": False}
    spans = marked_spans(text, marks) if env.marked else derived_spans(render, turns, text, special)
    return {"text": text, "spans": spans, "marked": env.marked}


def main() -> None:
    """Answer every line of stdin."""
    header = json.loads(sys.stdin.buffer.readline())
    limit_memory(header["bytes"])
    try:
        arm(header["seconds"])
        env, render = renderer(header)
        special = re.compile(header["special"])
        print("{}", flush=True)  # the template compiles
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
