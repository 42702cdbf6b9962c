"""Policy for rows that cannot be used: raise, skip or repair them, with counts and a cap."""

from types import TracebackType
from typing import Literal

from .. import InputError

Policy = Literal["error", "skip", "repair"]
_MAX_MESSAGES = 5


class RowErrors:
    """Policy for rows that cannot be used, with counts. Wrap all work on one row, or one plain-text file, in `with`.

    policy:
        `error`: raise the first InputError.
        `skip`: leave the row out.
        `repair`: replace bytes that are not Unicode by U+FFFD and a number by its text, cut a row that is too long;
            leave out a row that has no repair.
    cap: largest share of rows that may be left out or repaired.
    """

    def __init__(self, policy: Policy = "error", cap: float = 0.01):
        self.policy, self.cap = policy, cap
        self.rows = self.left_out = self.repaired = 0  # `rows` is counted by the first reader of a row
        self.messages: list[str] = []  # of the first `_MAX_MESSAGES` such rows

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Suppress an InputError and count its row as left out, unless the policy is `error`."""
        if not isinstance(error, InputError) or self.policy == "error":
            return False
        self.left_out += 1
        self._add_message("left out", error)
        return True

    def repair(self, error: InputError) -> None:
        """Count a repair that the caller then makes. Raises `error` unless the policy is `repair`."""
        if self.policy != "repair":
            raise error
        self.repaired += 1
        self._add_message("repaired", error)

    def _add_message(self, action: str, error: InputError) -> None:
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(f"{action}: {error}")

    def check_cap(self) -> None:
        """Raises InputError if more rows than the cap allows were left out or repaired."""
        if (changed := self.left_out + self.repaired) > self.cap * max(self.rows, changed):
            hint = f"more than --data.max-bad-rows {self.cap:g} of them; correct the file or raise the cap"
            raise InputError(f"{self._counts()}, {hint}. The first, {self.messages[0]}")

    def summary(self) -> list[str]:
        """Lines for the user: the counts and the first messages; none if every row was used as it is.

        Raises InputError if the cap is exceeded.
        """
        self.check_cap()
        return [self._counts(), *self.messages] if self.left_out + self.repaired else []

    def _counts(self) -> str:
        rows = max(self.rows, self.left_out + self.repaired)
        return f"--data.bad-rows {self.policy}: {self.left_out} of {rows} rows left out, {self.repaired} repaired"


RAISE = RowErrors()  # the default: the first row that cannot be used raises, so nothing is ever counted
