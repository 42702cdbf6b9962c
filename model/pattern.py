"""Regular expressions of rules, which may be somebody else's: matched within a time limit."""

import contextlib
import functools
import math
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regex

from .. import InputError

TIME_LIMIT = 1.0  # of one pattern, over all calls in a process; a call of less than FREE seconds costs nothing
FREE_TIME = 0.01
LENGTH, REPEATS = 10_000, 1_000  # `regex` writes counted repeats out as it compiles, which can fill the memory


class BadPattern(InputError):
    """A pattern is no regular expression, or has used up its time."""


class Pattern:
    """A regular expression in the syntax of `re`, which has no time limit; so `regex` does the matching.

    what: what the pattern is, for the error. Raises BadPattern for text that is no regular expression, and where a name
    takes too long to match.
    """

    def __init__(self, text: str, what: str = "pattern"):
        self.label, self.left = f"{what} {text[:200]!r}", TIME_LIMIT
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # of sets in sets, which `regex` reads another way
                re.compile(text)
            if found := re.search(r"(?<!\\)\{(?!\d*,?\d*\})", text):  # to `regex`, "{e}" is an approximate match
                raise re.error("a brace without a count", text, found.start())
            counts = [max(map(int, re.findall(r"\d+", count)), default=1) for count in re.findall(r"\{[\d,]+\}", text)]
            if math.prod(max(n, 1) for n in counts) > REPEATS or len(text) > LENGTH:
                raise re.error(f"more than {LENGTH:,} characters, or counts of more than {REPEATS:,} repeats in all")
            self.compiled = regex.compile(text, regex.V0)
        except (re.error, regex.error, FutureWarning, OverflowError, RecursionError) as error:
            raise BadPattern(f"{self.label} is not a regular expression: {error}") from None

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern matches all of a name."""
        return self._match(name, self.compiled.fullmatch) is not None

    def match(self, name: str) -> "regex.Match[str] | None":
        """The match at the start of a name, as of `re.match`."""
        return self._match(name, self.compiled.match)

    def _match(self, name: str, how: Any) -> Any:
        began = time.process_time()
        try:
            return how(name, timeout=max(self.left, FREE_TIME))
        except TimeoutError:
            raise BadPattern(f"{self.label} takes more than {TIME_LIMIT:g} s to match {name!r}; write it without a repeat "
                             "inside a repeat") from None  # fmt: skip
        finally:
            taken = time.process_time() - began
            self.left -= taken if taken > FREE_TIME else 0


compile_pattern = functools.lru_cache(4096)(Pattern)  # so that all calls of one share its time


@contextlib.contextmanager
def pattern_source(file: str | Path) -> Iterator[None]:
    """Names the file that patterns come from in the error of a bad one."""
    try:
        yield
    except BadPattern as error:
        raise InputError(f"{file}: {error}") from None
