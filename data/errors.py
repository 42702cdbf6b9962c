"""Rows that cannot be used: an error, or one row fewer, or the row repaired; counted, said, and capped."""

from types import TracebackType
from typing import Literal

from .. import InputError

Policy = Literal["error", "skip", "repair"]
_SAID = 5  # places that are told


class RowErrors:
    """What is done, and what was; `with bad:` goes around all that is done with one row, or file of plain text.

    `error`: the first bad row is raised. `skip`: it is left out. `repair`: what is no Unicode becomes U+FFFD, a number
    its text, a row that is too long is cut; what has no repair is left out.
    """

    def __init__(self, policy: Policy = "error", cap: float = 0.01):
        self.policy, self.cap = policy, cap
        self.rows = self.left_out = self.repaired = 0  # rows: whoever reads one first counts it
        self.first: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Leave out the row that is an InputError, unless the policy is `error`."""
        if not isinstance(error, InputError) or self.policy == "error":
            return False
        self.left_out += 1
        self._note(error, "left out")
        return True

    def repair(self, error: InputError) -> None:
        """Return if the row may be repaired; else raise `error`."""
        if self.policy != "repair":
            raise error
        self.repaired += 1
        self._note(error, "repaired")

    def _note(self, error: InputError, what: str) -> None:
        if len(self.first) < _SAID:
            self.first.append(f"{what}: {error}")

    def settle(self) -> list[str]:
        """Lines to say when all is read: counts and the first places. InputError if it is more than the cap."""
        bad = self.left_out + self.repaired
        if not bad:
            return []
        rows = max(self.rows, bad)
        said = f"--data.bad-rows {self.policy}: {self.left_out} of {rows} rows left out, {self.repaired} repaired"
        if bad > self.cap * rows:
            more = f"more than --data.max-bad-fraction {self.cap:g} of them; mend the file, or raise it"
            raise InputError(f"{said}, {more}. The first, {self.first[0]}")
        return [said, *self.first]


RAISE = RowErrors()  # counts nothing that is said: the first bad row ends it
