"""The collectives of a compiled program, from its HLO text: bytes, mesh axes and executions of each."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {
    "pred": 8,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}  # the names of other types end with their number of bits: f32, s8, u4
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(calls|to_apply|body|branch_computations|true_computation|false_computation|"
                     r"called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    axes: tuple[str, ...]  # the mesh axes of its groups; (): one device, nothing is sent
    size: int  # devices in a group
    nbytes: float  # bytes of the whole array on one device: gathered, reduced, or sent
    times: int  # executions per step

    @property
    def sent(self) -> float:
        """Bytes that each device sends per step in a ring: (n-1)/n of the array, twice for an all-reduce."""
        ring = 1.0 if self.kind == "collective-permute" else (self.size - 1) / self.size
        return self.nbytes * ring * self.times * (2 if self.kind == "all-reduce" else 1)


class Instruction(NamedTuple):
    """One instruction of an HLO module."""

    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return ({name of a computation: its instructions}, the name of the entry) of a module's text."""
    bodies: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head := _HEAD.match(line):
                body = bodies.setdefault(head[1], [])
                entry = head[1] if line.startswith("ENTRY") else entry
        elif match := _LINE.match(line):
            body.append(Instruction(*match.groups()))
    return bodies, entry


def collectives(text: str, mesh: Any) -> list[Collective]:
    """Return all collectives that a step of a compiled program runs.

    The TPU compiler spreads a collective over the fusions that run meanwhile, even over a loop: the same channel is in
    all of them. It counts where it starts (`AsyncCollectiveStart`), otherwise once per loop body.
    """
    bodies, entry = computations(text)
    instructions = [instruction for body in bodies.values() for instruction in body]
    started = {name for x in instructions if "AsyncCollectiveStart" in x.rest
               for name in re.findall(r"%([\w.\-]+)", x.rest.split("custom_call_target")[0])}  # fmt: skip
    started_channels = {_channel(x) for x in instructions if x.name in started} - {None}
    results: dict[Any, Collective] = {}
    for i, (instruction, times, loop) in enumerate(_walk(bodies, entry, 1, entry)):
        kind = next((k for k in KINDS if instruction.op in (k, f"{k}-start")), "")
        channel = _channel(instruction)
        if not kind or (channel in started_channels and instruction.name not in started):
            continue
        axes, size = _axes(instruction.rest, mesh)
        if size > 1:
            key = (loop, kind, i if channel is None else channel)
            results[key] = Collective(kind, axes, size, _array_bytes(kind, instruction, size), times)
    return list(results.values())


def _channel(instruction: Instruction) -> str | None:
    match = re.search(r"channel_id=(\d+)", instruction.rest)
    return match and match[1]


def _walk(
    bodies: dict[str, list[Instruction]], name: str, times: int, loop: str
) -> Iterator[tuple[Instruction, int, str]]:
    """Yield (instruction, executions, its loop body) of a computation and of all that it calls."""
    for instruction in bodies.get(name, []):
        yield instruction, times, loop
        inner_times, inner_loop = times, loop
        if instruction.op == "while":
            inner_times, inner_loop = times * trip_count(instruction, bodies), f"{loop}/{instruction.name}"
        for _, group, single in _CALLED.findall(instruction.rest):
            for called in re.findall(r"[\w.\-]+", group or single):
                yield from _walk(bodies, called, inner_times, inner_loop)


def trip_count(loop: Instruction, bodies: dict[str, list[Instruction]]) -> int:
    """Return the trip count of a while loop: the compiler's, or the only constant of its condition, or 1."""
    if match := re.search(r"known_trip_count\D+(\d+)", loop.rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = bodies.get(condition[1], []) if condition else []
    bounds = [int(m[1]) for x in body if x.op == "constant" and (m := re.match(r"(\d+)\)", x.rest))]
    return bounds[0] if len(bounds) == 1 else 1


def nbytes(shape: str) -> list[float]:
    """Return the bytes of each array of a shape: `f32[8,4]{1,0}` or a tuple of them."""
    sizes = []
    for kind, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shape):
        bits = _BITS.get(kind) or int((re.findall(r"^[a-z]+(\d+)", kind) or ["0"])[0])
        sizes.append(bits / 8 * math.prod(int(d) for d in dims.split(",") if d))
    return sizes


def _array_bytes(kind: str, instruction: Instruction, size: int) -> float:
    """Return the bytes of the whole array that a collective gathers, reduces or sends, on one device."""
    sizes = nbytes(instruction.shape)
    if instruction.op.endswith("-start") and kind != "all-reduce":  # (operands, results[, words of context])
        sizes = [s for s in sizes if s > 8] or sizes
        half = len(sizes) // 2
        sizes = sizes[half:] if kind != "collective-permute" else sizes[:half]
    return sum(sizes) * (size if kind == "reduce-scatter" else 1)


def _axes(rest: str, mesh: Any) -> tuple[tuple[str, ...], int]:
    """Return (the mesh axes that the groups of a collective run over, devices in a group)."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        groups = np.array([[int(x) for x in p.split(",")] for p in re.findall(r"(\d+,\d+)", pairs[1])])
        moves = groups[groups[:, 0] != groups[:, 1]]
        return _varying(moves, mesh), 2 if len(moves) else 1
    groups = replica_groups(rest, math.prod(mesh.shape.values()))
    return _varying(groups, mesh), groups.shape[1]


def replica_groups(rest: str, n: int) -> np.ndarray:
    """Return the [groups, devices] of a `replica_groups` attribute of a program on n devices.

    Forms: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=4,'b'=2] {'a'}`, and `{}`, which is one group of all.
    """
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
    """Return the axes whose coordinate differs within a group. A device's number is its index in the flat mesh."""
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())))
    return tuple(axis for axis, c in zip(mesh.shape, coordinates, strict=True) if (c != c[:, :1]).any())
