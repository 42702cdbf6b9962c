"""Finding files and reading text and tables strictly: each error is one line that names the file and the row."""

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
from .fields import Record, describe
from .unpack import MAX_READ, content_suffix, is_parquet, read_bytes, read_lines

_PARQUET_BATCH = 1024  # rows of a parquet file in memory at once
_UTF8_BOM = b"\xef\xbb\xbf"
Rows = Iterator[tuple[int, Callable[[str], Record]]]  # (row number from 1, parse(where) -> row)
_parse_json = json.JSONDecoder(object_pairs_hook=unique_keys).decode


def expand(spec: str) -> list[tuple[str, Path]]:
    """Return the sorted (id, path) pairs of a file, folder or glob.

    An id starts with the folder's own name (`books/alice.txt`), however the folder was spelled. Raises InputError when
    there is no file.
    """
    if not spec:
        raise InputError("a source has an empty name; expected a file, folder, pattern or hub:owner/name")
    path = Path(spec)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as e:  # e.g. a name of 5000 characters
        raise InputError(f"{spec[:80]}...: {e.strerror}; expected a file or folder") from None
    if is_file:
        return [(path.name, path)]
    if is_folder:
        root, paths = path, [p for p in path.rglob("*") if _is_file_in(p, path) and not _hidden(p.relative_to(path))]
        missing = f"the folder holds no files; expected a folder of text or of {TABLES}"
    elif glob.has_magic(spec):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        paths = [Path(p) for p in glob.glob(spec, recursive=True) if Path(p).is_file()]
        missing = f"the pattern matches no file; check it (from {Path.cwd()}), and quote it in a shell"
    else:
        raise InputError(f"{spec}: no such file or folder; check the path (from {Path.cwd()})")
    if not paths:
        raise InputError(f"{spec}: {missing}")
    return [(f"{root.resolve().name}/{p.relative_to(root).as_posix()}", p) for p in sorted(paths)]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _is_file_in(path: Path, folder: Path) -> bool:
    """Return whether a path below a folder is a file.

    Raises InputError for a link out of the folder, which would read data that is not the folder's, and for a broken
    link, whose data would silently be missing.
    """
    if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(folder.resolve())):
        place = "outside the folder" if path.exists() else "missing"
        hint = "copy it into the folder, or name it by a pattern (folder/*), which follows links"
        raise InputError(f"{path}: a link to {path.readlink()}, which is {place}; expected a file; {hint}")
    return path.is_file()


def read_text(path: Path, errors: RowErrors = RAISE) -> str:
    """Return a text file, decompressed, as strict UTF-8 without a byte order mark; newlines are kept.

    Raises InputError with the line and the byte offset of what is not UTF-8.
    """
    return _decode(read_bytes(path), path, errors=errors).removeprefix("\ufeff")


def _decode(raw: bytes, path: Path, line: int = 1, offset: int = 0, errors: RowErrors = RAISE) -> str:
    """Decode bytes that start at a line and byte offset of `path`."""
    if (nul := raw.find(b"\0")) >= 0:
        where = f"{path}:{line + raw.count(bytes([10]), 0, nul)}"
        hint = "convert UTF-16 with iconv -f utf16 -t utf8, or leave a binary file out"
        errors.repair(InputError(f"{where}: a NUL byte at offset {offset + nul}; expected UTF-8 text; {hint}"))
        raw = raw.replace(b"\0", "\ufffd".encode())
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        where = f"{path}:{line + raw.count(bytes([10]), 0, e.start)}"
        problem = f"not UTF-8 (byte 0x{raw[e.start]:02x} at offset {offset + e.start}); expected UTF-8 text"
        errors.repair(InputError(f"{where}: {problem}; convert the file, e.g. iconv -f latin1 -t utf8"))
        return raw.decode("utf-8", "replace")


def holds_json_lines(text: str) -> bool:
    """Return whether a text is JSON lines under another name: its first two lines (or its only one) are objects."""
    first = list(itertools.islice((line for line in io.StringIO(text) if not line.isspace()), 2))
    try:
        return bool(first) and all(isinstance(_parse_json(line), dict) for line in first)
    except (ValueError, RecursionError):
        return False


def _jsonl_rows(path: Path, errors: RowErrors) -> Rows:
    for n, offset, raw in read_lines(path):
        if not raw.removeprefix(_UTF8_BOM).isspace():
            yield n, partial(_parse_line, raw, path, n, offset, errors)


def _parse_line(raw: bytes, path: Path, line: int, offset: int, errors: RowErrors, where: str) -> Record:
    text = _decode(raw, path, line, offset, errors).rstrip("\r\n")
    text = text.removeprefix("\ufeff") if line == 1 else text
    try:
        row = _parse_json(text)
    except json.JSONDecodeError as e:
        reason = "a byte order mark" if text.startswith("\ufeff") else e.msg
        problem = f"not valid JSON ({reason} at column {e.colno})"
        raise InputError(f"{where}: {problem}; expected one JSON object per line; correct or drop it") from None
    except (ValueError, RecursionError) as e:  # a duplicate key, an integer of 4301 digits, a nesting of 1000
        raise InputError(f"{where}: JSON that cannot be read ({e}); expected one JSON object per line") from None
    return _object(row, "one JSON object per line", where)


def _object(value: Any, expected: str, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {describe(value)}; expected {expected}")
    return value


def _json_rows(path: Path, errors: RowErrors) -> Rows:
    """Yield the objects of one JSON array; several JSON values are read as JSON lines."""
    text, expected = read_text(path, errors), "one JSON array of objects"
    try:
        rows = _parse_json(text)
    except (ValueError, RecursionError) as e:
        line, detail = 1, str(e)
        if isinstance(e, json.JSONDecodeError):
            if e.msg == "Extra data":
                yield from _jsonl_rows(path, errors)
                return
            line, detail = e.lineno, f"{e.msg} at column {e.colno}"
        hint = "name a file with one object per line .jsonl"
        raise InputError(f"{path}:{line}: not valid JSON ({detail}); expected {expected}; {hint}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: {describe(rows)}; expected {expected}")
    for n, row in enumerate(rows, 1):
        yield n, partial(_object, row, expected)


def _csv_rows(path: Path, errors: RowErrors, delimiter: str = ",") -> Rows:
    """Yield the rows below a header line. All values are text: "3" is not a number, "NA" is not missing."""
    table = csv.DictReader(_csv_lines(path, errors), delimiter=delimiter, strict=True)
    csv.field_size_limit(MAX_READ)  # the default refuses a document of 128 kB
    try:
        _check_header(list(table.fieldnames or ()), f"{path}:1")
        for row in table:
            yield table.line_num, partial(_check_cells, row, delimiter)
    except csv.Error as e:
        raise InputError(f"{path}:{table.reader.line_num}: not valid CSV ({e}); check the quotes") from None


def _csv_lines(path: Path, errors: RowErrors) -> Iterator[str]:
    """Yield lines with their ends; a lone CR ends a line too."""
    for n, offset, raw in read_lines(path):
        text = _decode(raw, path, n, offset, errors)
        yield from io.StringIO(text.removeprefix("\ufeff") if n == 1 else text, newline="")


def _check_header(names: list[str], where: str) -> None:
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{where}: duplicate column {duplicate!r}; rename one")


def _check_cells(row: dict[Any, Any], delimiter: str, where: str) -> Record:
    extra = row.get(None, [])  # csv.DictReader: surplus cells under the key None, missing cells as None
    if extra or None in row.values():
        columns = [name for name in row if name is not None]
        cells = sum(row[name] is not None for name in columns) + len(extra)
        hint = f"quote text that contains {delimiter!r}"
        raise InputError(f"{where}: {cells} cells; expected {len(columns)}, as in the header; {hint}")
    return row


def _parquet_rows(path: Path, errors: RowErrors) -> Rows:
    """Yield rows, with one batch in memory; unlike `datasets`, keep no copy of the file in a cache."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            _check_header(table.schema_arrow.names, str(path))
            n = itertools.count(1)
            for batch in table.iter_batches(_PARQUET_BATCH):
                for i in range(len(batch)):
                    yield next(n), partial(_parquet_row, batch, i)
    except (pyarrow.ArrowException, OSError) as e:
        detail = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: not readable as parquet ({detail}); check the file") from None


def _parquet_row(batch: Any, i: int, where: str) -> Record:
    import pyarrow

    try:
        return {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except (pyarrow.ArrowException, ValueError, OverflowError) as e:  # e.g. text that is not UTF-8
        raise InputError(f"{where}: a value that cannot be read ({e}); correct or drop the row") from None


_FORMATS: dict[str, Callable[[Path, RowErrors], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
TABLES = ", ".join(_FORMATS)


def is_table(path: Path) -> bool:
    """Return whether a file holds rows, by its suffix (in any case, compressed or not) or as parquet by its content."""
    return content_suffix(path) in _FORMATS or is_parquet(path)


def read_rows(path: Path, errors: RowErrors = RAISE) -> Iterator[tuple[str, Record]]:
    """Yield ("path:n", row) of a table; n is the line of JSON lines and CSV, and counts rows from 1 elsewhere.

    Raises InputError for a damaged file, for one without rows, and, unless `errors` leaves it out, for a damaged row.
    """
    read = _parquet_rows if is_parquet(path) else _FORMATS[content_suffix(path)]
    empty = True
    for n, parse in read(path, errors):
        empty = False
        errors.rows += 1
        with errors:
            yield f"{path}:{n}", parse(f"{path}:{n}")
    if empty:
        raise InputError(f"{path}: no rows; expected at least one")
