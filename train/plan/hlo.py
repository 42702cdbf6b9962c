"""Collectives of a compiled program, from its HLO text: what each moves, over which mesh axes, how often."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # others end with their number of bits: f32, s8, u4
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(calls|to_apply|body|branch_computations|true_computation|false_computation|"
                     r"called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    axes: tuple[str, ...]  # the mesh axes that its groups run over; (): one device, nothing moves
    size: int  # devices in a group
    nbytes: float  # of the whole array on one device: gathered, reduced, or sent
    times: int  # executions in a step

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, by rings: (n-1)/n of the array, twice for an all-reduce."""
        ring = 1.0 if self.kind == "collective-permute" else (self.size - 1) / self.size
        return self.nbytes * ring * self.times * (2 if self.kind == "all-reduce" else 1)


class Line(NamedTuple):
    """One instruction."""

    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


def computations(text: str) -> tuple[dict[str, list[Line]], str]:
    """({computation: its instructions}, the entry) of a module's text."""
    found: dict[str, list[Line]] = {}
    entry, lines = "", []
    for row in text.splitlines():
        if row and not row[0].isspace():
            if head := _HEAD.match(row):
                lines = found.setdefault(head[1], [])
                entry = head[1] if row.startswith("ENTRY") else entry
        elif line := _LINE.match(row):
            lines.append(Line(*line.groups()))
    return found, entry


def collectives(text: str, mesh: Any) -> list[Collective]:
    """All collectives that a step of a compiled program runs, each with its number of executions.

    A TPU's compiler spreads a collective over the fusions that run meanwhile, even over a loop: the same channel stands
    in all of them. It counts where it starts (`AsyncCollectiveStart`), or else once a loop body.
    """
    known, entry = computations(text)
    lines = [line for body in known.values() for line in body]
    started = {name for line in lines if "AsyncCollectiveStart" in line.rest
               for name in re.findall(r"%([\w.\-]+)", line.rest.split("custom_call_target")[0])}  # fmt: skip
    apart = {_channel(line) for line in lines if line.name in started} - {None}
    found: dict[Any, Collective] = {}
    for i, (line, times, loop) in enumerate(_walk(known, entry, 1, entry)):
        kind = next((k for k in KINDS if line.op in (k, f"{k}-start")), "")
        channel = _channel(line)
        if not kind or (channel in apart and line.name not in started):
            continue
        axes, size = _axes(line.rest, mesh)
        if size > 1:
            key = (loop, kind, i if channel is None else channel)
            found[key] = Collective(kind, axes, size, _moved(kind, line, size), times)
    return list(found.values())


def _channel(line: Line) -> str | None:
    found = re.search(r"channel_id=(\d+)", line.rest)
    return found and found[1]


def _walk(known: dict[str, list[Line]], name: str, times: int, loop: str) -> Iterator[tuple[Line, int, str]]:
    """(instruction, executions, the loop body it is in) of a computation and of all that it calls."""
    for line in known.get(name, []):
        yield line, times, loop
        runs, inside = times, loop
        if line.op == "while":
            runs, inside = times * trips(line, known), f"{loop}/{line.name}"
        for _, several, one in _CALLED.findall(line.rest):
            for other in re.findall(r"[\w.\-]+", several or one):
                yield from _walk(known, other, runs, inside)


def trips(line: Line, known: dict[str, list[Line]]) -> int:
    """How often a while loop runs: what the compiler says, or the one constant that its condition compares with."""
    if said := re.search(r"known_trip_count\D+(\d+)", line.rest):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
    lines = known.get(condition[1], []) if condition else []
    bounds = [int(m[1]) for c in lines if c.op == "constant" and (m := re.match(r"(\d+)\)", c.rest))]
    return bounds[0] if len(bounds) == 1 else 1


def nbytes(shape: str) -> list[float]:
    """Bytes of each array of a shape: `f32[8,4]{1,0}` or a tuple of them."""
    found = []
    for kind, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shape):
        bits = _BITS.get(kind) or int((re.findall(r"^[a-z]+(\d+)", kind) or ["0"])[0])
        found.append(bits / 8 * math.prod(int(d) for d in dims.split(",") if d))
    return found


def _moved(kind: str, line: Line, size: int) -> float:
    """Bytes of the whole array that a collective gathers, reduces or sends, on one device."""
    sizes = nbytes(line.shape)
    if line.op.endswith("-start") and kind != "all-reduce":  # (operands, results[, words of context])
        sizes = [s for s in sizes if s > 8] or sizes
        half = len(sizes) // 2
        sizes = sizes[half:] if kind != "collective-permute" else sizes[:half]
    return sum(sizes) * (size if kind == "reduce-scatter" else 1)


def _axes(rest: str, mesh: Any) -> tuple[tuple[str, ...], int]:
    """(the mesh axes over which the groups of a collective run, devices in a group)."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        groups = np.array([[int(x) for x in p.split(",")] for p in re.findall(r"(\d+,\d+)", pairs[1])])
        moves = groups[groups[:, 0] != groups[:, 1]]
        return _varying(moves, mesh), 2 if len(moves) else 1
    groups = replica_groups(rest, math.prod(mesh.shape.values()))
    return _varying(groups, mesh), groups.shape[1]


def replica_groups(rest: str, n: int) -> np.ndarray:
    """[groups, devices]: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, or `mesh['a'=4,'b'=2] {'a'}`; `{}` is all of them."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(tuple(map(int, iota[3].split(",")))) if iota[3] else ids).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = [list(sizes).index(axis) for axis in over]
        ids = np.moveaxis(ids, last, range(len(sizes) - len(last), len(sizes)))
        return ids.reshape(-1, math.prod(sizes[axis] for axis in over))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if not listed:
        return np.arange(n)[None]
    return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])


def _varying(groups: np.ndarray, mesh: Any) -> tuple[str, ...]:
    """The axes whose coordinate differs within a group. A device's number is its place in the mesh."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())))
    return tuple(axis for axis, p in zip(mesh.shape, places, strict=True) if (p != p[:, :1]).any())
