"""Regular expressions of rules, matched within a time limit, because a rule may come from a downloaded file."""

import contextlib
import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import regex

from .. import InputError

TIME_LIMIT = 1.0  # seconds of processor time that one pattern may use, over all calls in a process
FREE_TIME = 0.01  # seconds; a call that takes less does not count
MAX_LENGTH = 10_000  # characters
MAX_REPEATS = 1_000  # `regex` expands counted repeats when it compiles, which could fill the memory


class BadPattern(InputError):
    """A pattern that is not a regular expression, or that exceeded its time limit."""


class Pattern:
    """A regular expression in the syntax of `re`, matched by `regex`, which has a time limit.

    what: the name of the pattern in errors. Raises BadPattern for text that is not a regular expression, and when
    matching takes too long.
    """

    def __init__(self, text: str, what: str = "pattern"):
        self.label, self.time_left = f"{what} {text[:200]!r}", TIME_LIMIT
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # nested sets, which `regex` reads differently
                re.compile(text)
            if brace := re.search(r"(?<!\\)\{(?!\d*,?\d*\})", text):  # in `regex`, "{e}" is an approximate match
                raise re.error("a brace without a count", text, brace.start())
            counts = [max(map(int, re.findall(r"\d+", count)), default=1) for count in re.findall(r"\{[\d,]+\}", text)]
            if math.prod(max(n, 1) for n in counts) > MAX_REPEATS or len(text) > MAX_LENGTH:
                raise re.error(
                    f"more than {MAX_LENGTH:,} characters, or counts of more than {MAX_REPEATS:,} repeats in all"
                )
            self.compiled = regex.compile(text, regex.V0)
        except (re.error, regex.error, FutureWarning, OverflowError, RecursionError) as error:
            raise BadPattern(f"{self.label} is not a regular expression: {error}") from None

    def fullmatch(self, name: str) -> bool:
        """Return whether the pattern matches all of a name."""
        return self._timed(self.compiled.fullmatch, name) is not None

    def match(self, name: str) -> "regex.Match[str] | None":
        """The match at the start of a name, as of `re.match`."""
        return self._timed(self.compiled.match, name)

    def _timed(self, matcher: Callable[..., Any], name: str) -> Any:
        began = time.process_time()
        try:
            return matcher(name, timeout=max(self.time_left, FREE_TIME))
        except TimeoutError:
            raise BadPattern(
                f"{self.label} takes more than {TIME_LIMIT:g} s to match {name!r}; "
                "rewrite it without a repeat inside a repeat"
            ) from None
        finally:
            elapsed = time.process_time() - began
            self.time_left -= elapsed if elapsed > FREE_TIME else 0


compile_pattern = functools.lru_cache(4096)(Pattern)  # equal patterns share one time limit


@contextlib.contextmanager
def pattern_source(file: str | Path) -> Iterator[None]:
    """Prefix the error of a bad pattern with the file that it comes from."""
    try:
        yield
    except BadPattern as error:
        raise InputError(f"{file}: {error}") from None
