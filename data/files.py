"""Reading files strictly: every refusal is one line that names the file and the row."""

import csv
import glob
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from .. import InputError


def expand(spec: str) -> list[tuple[str, Path]]:
    """(id, path) of a file, folder or glob, sorted. An id starts with the folder's own name (`books/alice.txt`),
    however the folder was spelled. InputError when there is no file.
    """
    path = Path(spec)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        missing = "the folder holds no files; a folder of text, .jsonl, .csv or .parquet is wanted"
    elif glob.has_magic(spec):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(p) for p in glob.glob(spec, recursive=True) if Path(p).is_file()]
        missing = f"the pattern matches no file; check it (from {Path.cwd()}), and quote it in a shell"
    else:
        raise InputError(f"{spec}: no such file or folder; check the path (from {Path.cwd()})")
    if not found:
        raise InputError(f"{spec}: {missing}")
    return [(f"{root.resolve().name}/{p.relative_to(root).as_posix()}", p) for p in sorted(found)]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def read_text(path: Path) -> str:
    """The file as strict UTF-8, without a BOM; newlines as they are. InputError names the row and the byte."""
    try:
        return _utf8(path.read_bytes(), path).removeprefix("\ufeff")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None


def _utf8(raw: bytes, path: Path, row: int = 1, at: int = 0) -> str:
    """Decode `raw`, which starts at row `row` and byte `at` of `path`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        row += raw.count(b"\n", 0, e.start)
        raise InputError(
            f"{path}:{row}: not UTF-8 (byte 0x{raw[e.start]:02x} at offset {at + e.start}); UTF-8 text is wanted, "
            "convert the file, e.g. iconv -f latin1 -t utf8"
        ) from None


def _object(text: str, where: str) -> dict:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(
            f"{where}: not valid JSON ({e.msg} at column {e.colno}); one JSON object a line is wanted"
        ) from None
    except (ValueError, RecursionError) as e:  # an integer of 4301 digits, a nesting of 1000 levels
        raise InputError(f"{where}: JSON that cannot be read ({e}); one JSON object a line is wanted") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}; one JSON object a line is wanted")
    return row


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object); blank lines are passed over."""
    empty, at = True, 0
    try:
        with path.open("rb") as lines:
            for n, raw in enumerate(lines, 1):
                text = _utf8(raw, path, n, at)
                at += len(raw)
                text = text.removeprefix("\ufeff") if n == 1 else text
                if text.strip():
                    empty = False
                    yield f"{path}:{n}", _object(text.rstrip("\r\n"), f"{path}:{n}")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None
    if empty:
        raise InputError(f"{path}: empty; one JSON object a line is wanted")


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("path:n", object) of one JSON array; n counts its objects from 1."""
    text = read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        detail = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
        row = e.lineno if isinstance(e, json.JSONDecodeError) else 1
        hint = "one JSON array of objects is wanted; name a file with one object a line .jsonl"
        raise InputError(f"{path}:{row}: not valid JSON ({detail}); {hint}") from None
    if not isinstance(rows, list) or not rows:
        got = "an empty array" if rows == [] else f"a JSON {type(rows).__name__}"
        raise InputError(f"{path}: {got}; one JSON array of objects is wanted")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{n}: a JSON {type(row).__name__}; an array of objects is wanted")
        yield f"{path}:{n}", row


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", row) below a header line. All values are text: "3" is no number, "NA" no hole."""
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    csv.field_size_limit(1 << 30)  # the default refuses a document of 128 kB
    empty = True
    try:
        for row in table:
            where, empty = f"{path}:{table.line_num}", False
            if None in row or None in row.values():
                wanted, got = len(table.fieldnames or ()), sum(v is not None for k, v in row.items() if k is not None)
                got += len(row.get(None, []))
                raise InputError(f"{where}: {got} cells; {wanted} are wanted, as in the header (quote commas)")
            yield where, row
    except csv.Error as e:
        raise InputError(f"{path}:{table.reader.line_num}: not valid CSV ({e}); check the quotes") from None
    if empty:
        raise InputError(f"{path}: no rows; a header line and at least one row are wanted")


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("path:n", row) through `datasets`; n counts from 1."""
    import datasets  # 2 s to import: only when it is needed

    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as e:  # whatever arrow or datasets raise, the cause is the file
        detail = (str(e.__cause__ or e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: not readable as parquet ({detail}); check the file") from None
    if not len(table):
        raise InputError(f"{path}: no rows; at least one is wanted")
    for n, row in enumerate(table, 1):
        yield f"{path}:{n}", dict(row)


READERS = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
