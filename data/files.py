"""Reading files strictly: every refusal is one line that names the file and the row."""

import csv
import glob
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import InputError
from .bad import STRICT, Bad

# Never opened as text: most archives and pickles hold bytes that are, in part, valid UTF-8.
_ARCHIVES = (".tar", ".tgz", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".safetensors")


def expand(spec: str) -> list[tuple[str, Path]]:
    """(id, path) of a file, folder or glob, sorted. An id starts with the folder's own name (`books/alice.txt`),
    however the folder was spelled. InputError when there is no file.
    """
    path = Path(spec)
    try:
        file, folder = path.is_file(), path.is_dir()
    except OSError as e:  # a name of 5000 characters
        raise InputError(f"{spec[:80]}...: {e.strerror}; a file or folder is wanted") from None
    if file:
        return [(path.name, path)]
    if folder:
        root, found = path, [p for p in path.rglob("*") if _inside(p, path) and not _hidden(p.relative_to(path))]
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


def read_text(path: Path, bad: Bad = STRICT) -> str:
    """The file as strict UTF-8, without a BOM; newlines as they are. InputError names the row and the byte."""
    if path.suffix in _ARCHIVES:
        raise InputError(f"{path}: an archive; files are wanted, unpack it first (none is unpacked here)")
    if path.suffix in _PICKLES:
        raise InputError(f"{path}: arrays or a pickle, which can run code when it is read; a file of text is wanted")
    try:
        return _utf8(path.read_bytes(), path, bad=bad).removeprefix("\ufeff")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None


def _utf8(raw: bytes, path: Path, row: int = 1, at: int = 0, bad: Bad = STRICT) -> str:
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ: of two equal ones Python keeps the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {twice!r} stands twice")
    return found


_decode = json.JSONDecoder(object_pairs_hook=_once).decode


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


def jsonl_rows(path: Path, bad: Bad = STRICT) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object); blank lines are passed over."""
    empty, at = True, 0
    try:
        with path.open("rb") as lines:
            for n, raw in enumerate(lines, 1):
                start, at = at, at + len(raw)
                if raw.removeprefix(b"\xef\xbb\xbf").isspace():
                    continue
                empty = False
                bad.rows += 1
                with bad:
                    text = _utf8(raw, path, n, start, bad).rstrip("\r\n")
                    yield f"{path}:{n}", _object(text.removeprefix("\ufeff") if n == 1 else text, f"{path}:{n}")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None
    if empty:
        raise InputError(f"{path}: empty; one JSON object a line is wanted")


def json_rows(path: Path, bad: Bad = STRICT) -> Iterator[tuple[str, dict]]:
    """Yield ("path:n", object) of one JSON array; n counts its objects from 1."""
    text = read_text(path, bad)
    try:
        rows = _decode(text)
    except (ValueError, RecursionError) as e:
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


def csv_rows(path: Path, bad: Bad = STRICT) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", row) below a header line. All values are text: "3" is no number, "NA" no hole."""
    table = csv.DictReader(io.StringIO(read_text(path, bad), newline=""), strict=True)
    csv.field_size_limit(1 << 30)  # the default refuses a document of 128 kB
    empty = True
    try:
        names = list(table.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{path}:1: the column {twice!r} stands twice; rename one")
        for row in table:
            where, empty = f"{path}:{table.line_num}", False
            bad.rows += 1
            with bad:
                if None in row or None in row.values():
                    got = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None, []))
                    hint = f"{len(names)} are wanted, as in the header (quote commas)"
                    raise InputError(f"{where}: {got} cells; {hint}")
                yield where, row
    except csv.Error as e:
        raise InputError(f"{path}:{table.reader.line_num}: not valid CSV ({e}); check the quotes") from None
    if empty:
        raise InputError(f"{path}: no rows; a header line and at least one row are wanted")


def parquet_rows(path: Path, bad: Bad = STRICT) -> Iterator[tuple[str, dict]]:
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
        bad.rows += 1
        with bad:
            yield f"{path}:{n}", dict(row)


READERS = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
