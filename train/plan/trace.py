"""What a traced step costs: FLOPs, bytes read and written, and the most memory that lives at once, by its jaxpr.

A model of the compiler: products, reductions, gathers and loops make arrays; what is elementwise is fused into what
reads it. An array lives from where it is made to where it is last read, in the order of the trace.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from .jaxpr_memory import PICKS, PRODUCTS, Node, Value, carried, flat, flops, is_array, is_view, written


@dataclasses.dataclass
class Cost:
    """Of one device: FLOPs of products, bytes that go through memory, and the memory at the peak, beyond the inputs."""

    flops: float = 0.0
    moved: float = 0.0
    peak: float = 0.0
    gradients: float = 0.0  # of the peak: what has the shape of a parameter that trains
    kept: float = 0.0  # of the peak: what waits for the backward pass

    def times(self, n: float) -> "Cost":
        """Done n times: the peak stays."""
        return dataclasses.replace(self, flops=self.flops * n, moved=self.moved * n)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of an array on a device."""

    part: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)  # shape -> what of it a device keeps
    copies: int = 0  # of a whole gradient, that adding it up over devices makes
    early: bool = False  # casts of gathered parameters need nothing else, and are made at once
    tokens: int = 0  # arrays of as many elements or more, but of no shape in `whole`, are split over `stretches`
    stretches: int = 1
    whole: frozenset[tuple[int, ...]] = frozenset()

    def share(self, aval: Any) -> float:
        """What of an array is on a device when it is computed."""
        split = self.stretches > 1 and aval.shape not in self.whole and math.prod(aval.shape) >= self.tokens
        return 1 / self.stretches if split else 1.0

    def made(self, aval: Any) -> float:
        """Its bytes when it is computed; in host memory it has none."""
        return 0.0 if aval.memory_space == jax.memory.Space.Host else nbytes(aval) * self.share(aval)

    def adding(self, aval: Any) -> float:
        """Bytes that a gradient needs besides while the devices add theirs up: it is whole until then."""
        added = self.made(aval) * self.copies if aval.shape in self.part else 0.0
        return self.made(aval) - self.kept(aval) + added

    def kept(self, aval: Any) -> float:
        """Its bytes when it has been scattered over the devices, as gradients of split parameters are."""
        return self.made(aval) * self.part.get(aval.shape, 1.0)


def cost(closed: Any, sizes: Sizes, donated: Sequence[int] = (), gathered: Sequence[int] = ()) -> Cost:
    """The cost of a closed jaxpr.

    donated: the outputs that are written where inputs were, and take no memory. gathered: the inputs that are put
    together from all devices before they are read, and so take memory besides.
    """
    walk = Walk(closed.jaxpr, sizes)
    walk.free = {walk.outs[i] for i in donated}
    walk.lazy = {walk.ins[len(closed.jaxpr.constvars) + i] for i in gathered}
    return walk.run()


class Walk:
    """One pass over a jaxpr, and over the bodies of its loops."""

    def __init__(self, jaxpr: Any, sizes: Sizes):
        self.sizes, self.nodes = sizes, []
        self.ins = [Value(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
        self.outs = flat(jaxpr, self.ins, self.nodes)
        self.free: set[Value] = set()  # written where an input was, or straight into a loop's stack
        self.lazy: set[Value] = set()  # inputs that take memory from their first use: a layer's slice of a stack
        self.roots: dict[Value, frozenset[Value]] = {}  # of a fused value: the arrays that it is computed from
        self.last: dict[Value, int] = {}  # the last node that reads an array

    def run(self) -> Cost:
        """Allocate what is made, free what is read for the last time."""
        self.lifetimes()
        early = {v for n in self.nodes if n.fused and self.lazy.issuperset(self.sources(n.ins)) for v in n.outs}
        made = [v for v in early if self.sizes.early and self.roots[v] == {v}]
        total, live, kept = Cost(), {v: self.sizes.made(v.aval) for v in made}, set()
        for i, node in enumerate(self.nodes):
            sub, stacks = self.inside(node)
            total.flops, total.moved = total.flops + sub.flops, total.moved + sub.moved
            gathered = self.sources(node.ins) & self.lazy
            live |= {v: self.sizes.made(v.aval) for v in gathered if self.last.get(v, -1) >= i}
            over = self.sources(written(node)) - self.lazy
            live = {v: b for v, b in live.items() if self.last[v] > i or v not in over}
            made = [v for v in node.outs if self.roots[v] == {v}]
            live |= {v: 0.0 if v in self.free else self.sizes.kept(v.aval) for v in made}
            if node.name in PRODUCTS:
                sub.peak = sum(self.sizes.adding(v.aval) for v in made)
            kept |= {v for v in node.outs if v in stacks or self.last.get(v, 0) > i + len(self.nodes) // 8}
            if sum(live.values()) + sub.peak > total.peak:
                total = self.peak(live, kept, sub, total)
            live = {v: b for v, b in live.items() if self.last[v] > i}
        return total

    def peak(self, live: dict[Value, float], kept: set[Value], sub: Cost, total: Cost) -> Cost:
        """The total with a new peak: what lives now and what lives inside a node, by kind."""
        gradients = sum(b for v, b in live.items() if v.aval.shape in self.sizes.part)
        saved = sum(b for v, b in live.items() if v in kept and v.aval.shape not in self.sizes.part)
        return dataclasses.replace(total, peak=sum(live.values()) + sub.peak, gradients=gradients + sub.gradients,
                                   kept=saved + sub.kept)  # fmt: skip

    def lifetimes(self) -> None:
        """Which values are arrays, and until when."""
        readers: dict[Value, list[Node]] = {}
        for node in reversed(self.nodes):  # who reads a view reads what it is of
            seen = [r for v in node.outs for r in readers.get(v, [])] if is_view(node) else [node]
            for v in node.ins:
                readers.setdefault(v, []).extend(seen)
        outs = set(self.outs)
        for i, node in enumerate(self.nodes):
            made = [v for v in node.outs if v in outs or is_array(node, readers.get(v, []))]
            read = self.sources(node.ins)
            self.roots |= {v: frozenset((v,)) if v in made else read for v in node.outs}
            self.last |= dict.fromkeys(made, i)
            if made or not node.fused:
                # An update reads a device's own part of a parameter: what was gathered is not needed for it.
                self.last |= dict.fromkeys(read - self.lazy if node.fused else read, i)
        for v in outs:
            self.last |= dict.fromkeys(self.roots.get(v, frozenset((v,))), len(self.nodes))

    def sources(self, values: Iterable[Value]) -> frozenset[Value]:
        """The arrays that values are computed from, through what is fused."""
        return frozenset().union(*(self.roots.get(v, frozenset((v,))) for v in values))

    def inside(self, node: Node) -> tuple[Cost, list[Value]]:
        """(what a node costs besides its outputs, the outputs that a loop stacks)."""
        p = node.params
        if node.name == "scan":
            walk = Walk(p["jaxpr"].jaxpr, self.sizes)
            consts, carry = carried(p)
            walk.free = set(walk.outs[carry:])
            walk.lazy = set(walk.ins[consts + carry :])
            return walk.run().times(p["length"]), list(node.outs[carry:])
        if node.name == "while":
            return Walk(p["body_jaxpr"].jaxpr, self.sizes).run(), []
        if node.name == "cond":
            return max((Walk(b.jaxpr, self.sizes).run() for b in p["branches"]), key=lambda c: c.peak), []
        made = [v for v in node.outs if self.roots[v] == {v}]
        read = node.outs if node.name in PICKS else self.sources(node.ins)
        moved = sum(self.sizes.kept(v.aval) for v in (*made, *read)) if made else 0.0
        done = flops(node) * min(map(self.sizes.share, _avals(node))) if node.name in PRODUCTS else 0.0
        return Cost(done, moved), []


def _avals(node: Node) -> list[Any]:
    return [v.aval for v in (*node.ins, *node.outs)]


def nbytes(aval: Any) -> float:
    """Bytes of an abstract value; a key is two words."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8.0 * math.prod(aval.shape)
    return float(math.prod(aval.shape) * aval.dtype.itemsize)
