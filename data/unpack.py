"""The bytes of a file, unpacked where it is gzip or zstd. Archives, pickles and other binary files are never text."""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import InputError

MOST = 1 << 30  # bytes of one line, and of a packed file that is read whole
_PACKED = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}  # and what such a file begins with
# Refused by name: most archives and pickles hold bytes that are, in part, valid UTF-8.
_ARCHIVES = (".tar", ".tgz", ".zip", ".bz2", ".xz", ".7z")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".safetensors")
# Refused by their first bytes, whatever the name says.
_MAGIC = {
    rb"PAR1": "parquet", rb"ARROW1": "an Arrow table", rb"Obj\x01": "an Avro table", rb"SQLite format 3\0": "SQLite",
    rb"\x1f\x8b": "gzip", rb"\x28\xb5\x2f\xfd": "zstd", rb"BZh\d1AY&SY": "bzip2", rb"\xfd7zXZ": "xz",
    rb"7z\xbc\xaf": "7z", rb"PK\x03\x04": "a zip archive (or .xlsx, .docx, .npz)", rb"%PDF-": "a PDF",
    rb"\x93NUMPY": "an array of NumPy's",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a": "an image", rb"\x7fELF": "a program",
}  # fmt: skip


def suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case and without that of its packing: .jsonl of `A.JSONL.gz`."""
    return Path(unpacked(path.name)).suffix


def unpacked(name: str) -> str:
    """A file's name in lower case, without the suffix of its packing."""
    name = name.lower()
    return next((name.removesuffix(end) for end in _PACKED if name.endswith(end)), name)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """InputError for a file that cannot be opened, or not be unpacked to its end."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        if isinstance(e, OSError) and e.strerror:
            raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from None
        raise InputError(f"{path}: cannot be unpacked, it is cut or damaged ({e}); fetch it again") from None


def is_parquet(path: Path) -> bool:
    """Whether a file is parquet, by its first bytes."""
    with readable(path), path.open("rb") as file:
        return file.read(4) == b"PAR1"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A file of text, for reading its bytes: a gzip or zstd file, known by its first bytes, is unpacked as it is read.

    InputError: an archive, a pickle or another binary file; one that is named .gz or .zst and is not; one that is cut.
    """
    if suffix(path) in _ARCHIVES:
        raise InputError(f"{path}: an archive; files are wanted, unpack it first (none is unpacked here)")
    if suffix(path) in _PICKLES:
        raise InputError(f"{path}: arrays or a pickle, which can run code when it is read; a file of text is wanted")
    with readable(path), path.open("rb") as file:
        head = file.peek(64)
        kind = next((kind for kind, magic in _PACKED.values() if head.startswith(magic)), "")
        if not kind and (end := path.suffix.lower()) in _PACKED:
            raise InputError(f"{path}: named {end}, but its first bytes are not those of {_PACKED[end][0]}; rename it, "
                             "or fetch it again")  # fmt: skip
        lines = _stream(file, kind)
        if binary := next((name for magic, name in _MAGIC.items() if re.match(magic, lines.peek(64))), ""):
            inside = f" inside of {kind}" if kind else ""
            raise InputError(f"{path}: {binary}{inside}, and no text; convert or unpack it, or leave it out")
        yield lines


def _stream(file: io.BufferedReader, kind: str) -> io.BufferedReader:
    """What a file holds, unpacked while it is read."""
    raw: Any = None
    if kind == "gzip":
        raw = gzip.GzipFile(fileobj=file)
    elif kind == "zstd":
        import pyarrow

        raw = pyarrow.CompressedInputStream(file, "zstd")
    return io.BufferedReader(raw) if kind else file


def whole(path: Path) -> bytes:
    """All bytes of a file of text. InputError if it is packed and unpacks to more than 1 GiB."""
    data = bytearray()
    with opened(path) as file:
        if isinstance(file.raw, io.FileIO):
            return file.read()
        while chunk := file.read(1 << 20):
            data += chunk
            if len(data) > MOST:
                raise InputError(f"{path}: unpacks to more than {MOST:,} bytes, and is read whole; unpack it, or give "
                                 "rows, which are read one by one (.jsonl.gz, .csv.gz)")  # fmt: skip
    return bytes(data)


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset of its first byte, bytes) of each line, one in memory at a time."""
    n = at = 0
    with opened(path) as file:
        while line := file.readline(MOST + 1):
            n += 1
            if len(line) > MOST:
                raise InputError(f"{path}:{n}: a line of more than {MOST:,} bytes; one row a line is wanted")
            yield n, at, line
            at += len(line)
