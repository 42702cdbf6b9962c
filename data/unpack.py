"""Bytes of a file, decompressed where it is gzip or zstd. Archives, pickles and other binary files are refused."""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import InputError

MAX_READ = 1 << 30  # bytes of one line, and of a compressed file that is read whole
_COMPRESSED = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}  # suffix -> (format, first bytes)
# Refused by name: most archives and pickles hold bytes that are, in part, valid UTF-8.
_ARCHIVES = (".tar", ".tgz", ".zip", ".bz2", ".xz", ".7z")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".safetensors")
_MAGIC = {  # refused by their first bytes, whatever the name says
    rb"PAR1": "parquet", rb"ARROW1": "an Arrow table", rb"Obj\x01": "an Avro table", rb"SQLite format 3\0": "SQLite",
    rb"\x1f\x8b": "gzip", rb"\x28\xb5\x2f\xfd": "zstd", rb"BZh\d1AY&SY": "bzip2", rb"\xfd7zXZ": "xz",
    rb"7z\xbc\xaf": "7z", rb"PK\x03\x04": "a zip archive (or .xlsx, .docx, .npz)", rb"%PDF-": "a PDF",
    rb"\x93NUMPY": "a NumPy array",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a": "an image", rb"\x7fELF": "a program",
}  # fmt: skip


def content_name(name: str) -> str:
    """Return a file's name in lower case without the suffix of its compression: `a.jsonl` for `A.JSONL.gz`."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in _COMPRESSED if name.endswith(suffix)), name)


def content_suffix(path: Path) -> str:
    """Return the suffix that names the content, in lower case: `.jsonl` for `A.JSONL.gz`."""
    return Path(content_name(path.name)).suffix


def is_parquet(path: Path) -> bool:
    """Return whether a file is parquet, by its first bytes."""
    with _read_errors(path), path.open("rb") as file:
        return file.read(4) == b"PAR1"


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Raise InputError for a file that cannot be opened or decompressed."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        if isinstance(e, OSError) and e.strerror:
            raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None
        raise InputError(f"{path}: cannot be decompressed, it is truncated or damaged ({e}); fetch it again") from None


@contextlib.contextmanager
def _open_content(path: Path) -> Iterator[io.BufferedReader]:
    """Open a text file for reading bytes; gzip and zstd, known by their first bytes, are decompressed while reading.

    Raises InputError: an archive, a pickle or another binary file; a file named .gz or .zst that is none; a truncated
    file.
    """
    if content_suffix(path) in _ARCHIVES:
        raise InputError(f"{path}: an archive; expected text files, so unpack it first (none is unpacked here)")
    if content_suffix(path) in _PICKLES:
        raise InputError(f"{path}: arrays or a pickle, which can run code when it is read; expected a text file")
    with _read_errors(path), path.open("rb") as file:
        head = file.peek(64)
        compression = next((name for name, magic in _COMPRESSED.values() if head.startswith(magic)), "")
        if not compression and (suffix := path.suffix.lower()) in _COMPRESSED:
            problem = f"named {suffix}, but its first bytes are not those of {_COMPRESSED[suffix][0]}"
            raise InputError(f"{path}: {problem}; rename it, or fetch it again")
        content = _decompressed(file, compression) if compression else file
        if kind := next((kind for magic, kind in _MAGIC.items() if re.match(magic, content.peek(64))), ""):
            inside = f" inside {compression}" if compression else ""
            raise InputError(f"{path}: {kind}{inside}, not text; convert or unpack it, or leave it out")
        yield content


def _decompressed(file: io.BufferedReader, compression: str) -> io.BufferedReader:
    raw: Any = None
    if compression == "gzip":
        raw = gzip.GzipFile(fileobj=file)
    else:
        import pyarrow

        raw = pyarrow.CompressedInputStream(file, compression)
    return io.BufferedReader(raw)


def read_bytes(path: Path) -> bytes:
    """Return all bytes of a text file. Raises InputError if it decompresses to more than 1 GiB."""
    with _open_content(path) as file:
        if isinstance(file.raw, io.FileIO):
            return file.read()
        data = bytearray()
        while chunk := file.read(1 << 20):
            data += chunk
            if len(data) > MAX_READ:
                hint = "unpack it, or give rows, which are read one by one (.jsonl.gz, .csv.gz)"
                raise InputError(f"{path}: decompresses to more than {MAX_READ:,} bytes; {hint}")
    return bytes(data)


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, byte offset, line with its end), one line in memory at a time."""
    n = offset = 0
    with _open_content(path) as file:
        while line := file.readline(MAX_READ + 1):
            n += 1
            if len(line) > MAX_READ:
                raise InputError(f"{path}:{n}: a line of more than {MAX_READ:,} bytes; expected one row per line")
            yield n, offset, line
            offset += len(line)
