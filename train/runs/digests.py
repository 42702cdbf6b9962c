"""Digests of arrays, wherever their parts lie: a piece at a time on the host, the leaves shared out over processes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..cluster import distributed

PIECE_BYTES = 256 << 20  # bytes of an array that are on the host at once


def pieces(x: Any, rows: int = 0) -> Iterator[Any]:
    """An array along its first axis in pieces of `rows`, or of at most PIECE bytes, each whole in every process.

    All processes must take all pieces of an array that lies on several of them: each is gathered by all.
    """
    if not isinstance(x, jax.Array) or not x.ndim or not x.size:
        x = np.asarray(x)
        yield from x.reshape(-1, rows, *x.shape[1:]) if rows else [x]
        return
    if x.is_fully_replicated:
        x = x.addressable_data(0)
    rows = rows or max(PIECE_BYTES * len(x) // x.nbytes, 1)
    if x.is_fully_addressable and x.nbytes <= PIECE_BYTES:
        x, step = np.asarray(x), rows
        yield from (x[i : i + step] for i in range(0, len(x), step))
        return
    for i in range(0, len(x), rows):
        hosts = "host" in (x.sharding.memory_kind or "")  # an optimizer's state may lie there
        yield _cut(getattr(x.sharding, "mesh", None), hosts, min(rows, len(x) - i))(x, i)


@cache
def _cut(mesh: Any, hosts: bool, rows: int) -> Any:
    """x, i -> rows [i, i + rows) of x, on every device."""
    whole = NamedSharding(mesh, P()) if mesh is not None else None

    def cut(x: Any, i: Any) -> Any:
        x = jax.device_put(x, jax.memory.Space.Device) if hosts else x
        return jax.lax.dynamic_slice_in_dim(x, i, rows)

    return jax.jit(cut, out_shardings=whole)


def array_digest(array: Any, mine: bool = True) -> str:
    """sha256 of an array's dtype, shape and bytes, for any sharding; "" if another process computes it."""
    shape = list(np.shape(array))
    found = hashlib.sha256(f"{array.dtype}{shape}".encode())
    for piece in pieces(array):
        if mine:
            found.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        elif isinstance(piece, jax.Array):
            piece.block_until_ready()  # no queue of gathered pieces
    return found.hexdigest() if mine else ""


def array_digests(flat: Mapping[str, Any]) -> dict[str, str]:
    """{path: digest}; each process hashes every n-th leaf."""
    n, me = distributed.count(), distributed.index()
    mine = [array_digest(x, i % n == me) for i, x in enumerate(flat.values())]
    said = [text.split(",") for text in distributed.barrier_gather("digests", ",".join(mine))]
    return {path: said[i % n][i] for i, path in enumerate(flat)}


def folder_digest(folder: Path) -> str:
    """What a folder of a base holds, by the names and sizes of its files and what its manifests say."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors"))
    said = [(p.name, p.read_text("utf-8") if p.name == "manifest.json" else p.stat().st_size) for p in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
