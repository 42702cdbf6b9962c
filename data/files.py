"""Reading files strictly: every refusal is one line that names the file and the row."""

import csv
import glob
import io
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .. import InputError
from ..strict_json import unique_keys
from .errors import RAISE, RowErrors
from .unpack import MOST, is_parquet, lines, suffix, whole

_BATCH = 1024  # rows of a parquet file in memory at once


def expand(spec: str) -> list[tuple[str, Path]]:
    """(id, path) of a file, folder or glob, sorted. An id starts with the folder's own name (`books/alice.txt`),
    however the folder was spelled. InputError when there is no file.
    """
    if not spec:
        raise InputError("an empty name of a source; a file, folder, pattern or hub:owner/name is wanted")
    path = Path(spec)
    try:
        file, folder = path.is_file(), path.is_dir()
    except OSError as e:  # a name of 5000 characters
        raise InputError(f"{spec[:80]}...: {e.strerror}; a file or folder is wanted") from None
    if file:
        return [(path.name, path)]
    if folder:
        root, found = path, [p for p in path.rglob("*") if _inside(p, path) and not _hidden(p.relative_to(path))]
        missing = f"the folder holds no files; a folder of text, or of {TABLES} is wanted"
    elif glob.has_magic(spec):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(p) for p in glob.glob(spec, recursive=True) if Path(p).is_file()]
        missing = f"the pattern matches no file; check it (from {Path.cwd()}), and quote it in a shell"
    else:
        raise InputError(f"{spec}: no such file or folder; check the path (from {Path.cwd()})")
    if not found:
        raise InputError(f"{spec}: {missing}")
    return [(f"{root.resolve().name}/{p.relative_to(root).as_posix()}", p) for p in sorted(found)]


def _inside(path: Path, folder: Path) -> bool:
    """Whether it is a file. InputError for a link out of the folder, or to nothing: what a folder that somebody else
    packed links to is not its data, and what is not there would be missing without a word.
    """
    if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(folder.resolve())):
        hint = "a file in the folder is wanted: copy it there, or name it by a pattern (folder/*), which follows links"
        raise InputError(
            f"{path}: a link to {path.readlink()}, {'outside of' if path.exists() else 'not in'} the folder; {hint}"
        )
    return path.is_file()


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def read_text(path: Path, bad: RowErrors = RAISE) -> str:
    """The unpacked file as strict UTF-8 without a BOM; newlines as they are. InputError names the row and the byte."""
    return _utf8(whole(path), path, bad=bad).removeprefix("\ufeff")


def _utf8(raw: bytes, path: Path, row: int = 1, at: int = 0, bad: RowErrors = RAISE) -> str:
    """Decode `raw`, which starts at row `row` and byte `at` of `path`."""
    if (nul := raw.find(b"\0")) >= 0:
        where = f"{path}:{row + raw.count(bytes([10]), 0, nul)}"
        hint = "UTF-8 text is wanted; UTF-16 is converted by iconv -f utf16 -t utf8, another binary file left out"
        bad.repair(InputError(f"{where}: a NUL byte at offset {at + nul}; {hint}"))
        raw = raw.replace(b"\0", "\ufffd".encode())
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        row += raw.count(b"\n", 0, e.start)
        bad.repair(
            InputError(
                f"{path}:{row}: not UTF-8 (byte 0x{raw[e.start]:02x} at offset {at + e.start}); UTF-8 text is wanted, "
                "convert the file, e.g. iconv -f latin1 -t utf8"
            )
        )
        return raw.decode("utf-8", "replace")


_decode = json.JSONDecoder(object_pairs_hook=unique_keys).decode


def _object(text: str, where: str) -> dict:
    try:
        row = _decode(text)
    except json.JSONDecodeError as e:
        reason = "a byte order mark" if text.startswith("\ufeff") else e.msg
        raise InputError(
            f"{where}: not valid JSON ({reason} at column {e.colno}); one JSON object a line is wanted, mend or drop it"
        ) from None
    except (ValueError, RecursionError) as e:  # a key twice, an integer of 4301 digits, a nesting of 1000
        raise InputError(f"{where}: JSON that cannot be read ({e}); one JSON object a line is wanted") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {_kind(row)}; one JSON object a line is wanted")
    return row


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def jsonl_rows(path: Path, bad: RowErrors = RAISE) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object); blank lines are passed over."""
    empty = True
    for n, at, raw in lines(path):
        if raw.removeprefix(b"\xef\xbb\xbf").isspace():
            continue
        empty = False
        bad.rows += 1
        with bad:
            text = _utf8(raw, path, n, at, bad).rstrip("\r\n")
            yield f"{path}:{n}", _object(text.removeprefix("\ufeff") if n == 1 else text, f"{path}:{n}")
    if empty:
        raise InputError(f"{path}: empty; one JSON object a line is wanted")


def holds_rows(text: str) -> bool:
    """Whether a text is JSON lines under another name: its first two lines, or its only one, are JSON objects."""
    first = list(itertools.islice((line for line in io.StringIO(text) if not line.isspace()), 2))
    try:
        return bool(first) and all(isinstance(_decode(line), dict) for line in first)
    except (ValueError, RecursionError):
        return False


def json_rows(path: Path, bad: RowErrors = RAISE) -> Iterator[tuple[str, dict]]:
    """Yield ("path:n", object) of one JSON array; n counts its objects from 1. Several JSON values: as jsonl_rows."""
    text = read_text(path, bad)
    try:
        rows = _decode(text)
    except (ValueError, RecursionError) as e:
        if isinstance(e, json.JSONDecodeError) and e.msg == "Extra data":
            yield from jsonl_rows(path, bad)
            return
        detail = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
        row = e.lineno if isinstance(e, json.JSONDecodeError) else 1
        hint = "one JSON array of objects is wanted; name a file with one object a line .jsonl"
        raise InputError(f"{path}:{row}: not valid JSON ({detail}); {hint}") from None
    if not isinstance(rows, list) or not rows:
        got = "an empty array" if rows == [] else f"a JSON {_kind(rows)}"
        raise InputError(f"{path}: {got}; one JSON array of objects is wanted")
    for n, row in enumerate(rows, 1):
        bad.rows += 1
        with bad:
            if not isinstance(row, dict):
                raise InputError(f"{path}:{n}: a JSON {_kind(row)}; an array of objects is wanted")
            yield f"{path}:{n}", row


def _text_lines(path: Path, bad: RowErrors) -> Iterator[str]:
    """Lines with their ends, also those of a lone CR."""
    for n, at, raw in lines(path):
        text = _utf8(raw, path, n, at, bad)
        yield from io.StringIO(text.removeprefix("\ufeff") if n == 1 else text, newline="")


def csv_rows(path: Path, bad: RowErrors = RAISE, delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", row) below a header line. All values are text: "3" is no number, "NA" no hole."""
    table = csv.DictReader(_text_lines(path, bad), delimiter=delimiter, strict=True)
    csv.field_size_limit(MOST)  # the default refuses a document of 128 kB
    empty = True
    try:
        names = list(table.fieldnames or ())
        _check_columns(names, f"{path}:1")
        for row in table:
            where, empty = f"{path}:{table.line_num}", False
            bad.rows += 1
            with bad:
                if None in row or None in row.values():
                    got = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None, []))
                    hint = f"{len(names)} are wanted, as in the header (quote what holds {delimiter!r})"
                    raise InputError(f"{where}: {got} cells; {hint}")
                yield where, row
    except csv.Error as e:
        raise InputError(f"{path}:{table.reader.line_num}: not valid CSV ({e}); check the quotes") from None
    if empty:
        raise InputError(f"{path}: no rows; a header line and at least one row are wanted")


def _check_columns(names: list[str], where: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{where}: the column {twice!r} stands twice; rename one")


def parquet_rows(path: Path, bad: RowErrors = RAISE) -> Iterator[tuple[str, dict]]:
    """Yield ("path:n", row), a batch in memory at a time; n counts from 1. Nothing of the file is kept in a cache."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    n = 0
    try:
        with ParquetFile(path) as table:
            _check_columns(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(_BATCH):
                for i in range(len(batch)):
                    n += 1
                    bad.rows += 1
                    with bad:
                        yield f"{path}:{n}", _row(batch, i, f"{path}:{n}")
    except (pyarrow.ArrowException, OSError) as e:
        detail = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: not readable as parquet ({detail}); check the file") from None
    if not n:
        raise InputError(f"{path}: no rows; at least one is wanted")


def _row(batch: Any, i: int, where: str) -> dict[str, Any]:
    try:
        return {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except (ValueError, OverflowError) as e:  # text that is not UTF-8, a time that no calendar has
        raise InputError(f"{where}: a value that cannot be read ({e}); mend or drop the row") from None


_READERS = {".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".json": json_rows, ".csv": csv_rows,
            ".tsv": partial(csv_rows, delimiter="\t"), ".parquet": parquet_rows}  # fmt: skip
TABLES = ", ".join(_READERS)


def reader(path: Path) -> Callable[[Path, RowErrors], Iterator[tuple[str, dict]]] | None:
    """What reads the rows of a table: by its suffix, in any case and packed or not, parquet by its first bytes too.
    None: it is plain text.
    """
    return parquet_rows if is_parquet(path) else _READERS.get(suffix(path))
