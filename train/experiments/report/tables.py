"""Tables as data: cells with a text and a value to sort by, as markdown, in HTML (compare.html) or on the console."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from ...progress import console


class Cell(NamedTuple):
    """The text of a cell, and the value that a table is sorted by."""

    text: str
    value: float | str


def number(x: float | None, form: str = ".3f", suffix: str = "") -> Cell:
    """Return a number as a cell, empty for None."""
    return Cell("", "") if x is None else Cell(f"{x:{form}}{suffix}", float(x))


def word(text: str) -> Cell:
    """Return a text as a cell."""
    return Cell(text, text)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its heads, and rows of as many cells."""

    heads: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> list[str]:
        """Return the lines of the table in markdown."""
        rows = [self.heads, ["---"] * len(self.heads), *([cell.text for cell in row] for row in self.rows)]
        escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
        return ["| " + " | ".join(row) + " |" for row in escaped]

    def print(self, title: str = "", without: Sequence[str] = (), most: int | None = None) -> None:
        """Print at most `most` rows to the console, without some columns."""
        columns = [i for i, head in enumerate(self.heads) if head not in without]
        table = RichTable(box=None, pad_edge=False, title=title or None, title_justify="left")
        for i in columns:
            table.add_column(self.heads[i], justify="right" if i else "left")
        for row in self.rows[:most]:
            table.add_row(*(row[i].text for i in columns))
        console.print(table)

    def records(self) -> list[dict[str, Any]]:
        """Return the values of each row as {head: value}."""
        return [dict(zip(self.heads, (cell.value for cell in row), strict=True)) for row in self.rows]
