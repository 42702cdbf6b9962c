"""FLOPs, memory traffic and peak memory of a traced step, from its jaxpr.

A model of the compiler: matrix products, reductions, gathers and loops allocate arrays; elementwise operations are
fused into their readers. An array lives from the node that allocates it to the last node that reads it, in trace order.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from .jaxpr_memory import (
    PRODUCTS,
    SLICES,
    Node,
    Value,
    inline_calls,
    is_allocated,
    is_view,
    product_flops,
    reusable_inputs,
    scan_arity,
)


@dataclasses.dataclass
class Cost:
    """The cost of a step on one device."""

    flops: float = 0.0  # of matrix products
    moved: float = 0.0  # bytes through memory
    peak: float = 0.0  # bytes at the peak, beyond the inputs
    gradients: float = 0.0  # bytes of the peak in arrays with the shape of a trained parameter
    activations: float = 0.0  # bytes of the peak in arrays that wait for the backward pass

    def times(self, n: float) -> "Cost":
        """Return the cost of n executions; their peak is that of one."""
        return dataclasses.replace(self, flops=self.flops * n, moved=self.moved * n)


@dataclasses.dataclass(frozen=True)
class DeviceSizes:
    """The bytes of arrays on one device."""

    kept_share: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)
    """{shape of a gradient: the share of it that a device keeps}"""
    gradient_copies: int = 0  # whole arrays that the sum of a gradient over devices needs besides
    early_casts: bool = False  # casts of gathered parameters depend on nothing else and run at the beginning
    tokens: int = 0  # arrays of at least as many elements are split over context, unless in `weight_shapes`
    context: int = 1
    weight_shapes: frozenset[tuple[int, ...]] = frozenset()

    def context_share(self, aval: Any) -> float:
        """Return the share of an array that one device of the context axis computes."""
        split = self.context > 1 and aval.shape not in self.weight_shapes and math.prod(aval.shape) >= self.tokens
        return 1 / self.context if split else 1.0

    def computed(self, aval: Any) -> float:
        """Return the bytes of an array when it is computed; 0 in host memory."""
        return 0.0 if aval.memory_space == jax.memory.Space.Host else nbytes(aval) * self.context_share(aval)

    def kept(self, aval: Any) -> float:
        """Return the bytes of an array after it was scattered over devices, as gradients of split parameters are."""
        return self.computed(aval) * self.kept_share.get(aval.shape, 1.0)

    def reducing(self, aval: Any) -> float:
        """Return the bytes that a gradient needs besides while devices add theirs: it is whole until then."""
        copies = self.computed(aval) * self.gradient_copies if aval.shape in self.kept_share else 0.0
        return self.computed(aval) - self.kept(aval) + copies


def trace_cost(closed: Any, sizes: DeviceSizes, donated: Sequence[int] = (), gathered: Sequence[int] = ()) -> Cost:
    """Return the cost of a closed jaxpr.

    donated: indices of the outputs that overwrite inputs and so take no memory. gathered: indices of the inputs that
    are gathered from all devices before they are read, and so take memory besides.
    """
    walk = Walk(closed.jaxpr, sizes)
    walk.preallocated = {walk.outs[i] for i in donated}
    walk.gathered = {walk.ins[len(closed.jaxpr.constvars) + i] for i in gathered}
    return walk.run()


class Walk:
    """One pass over a jaxpr and the bodies of its loops."""

    def __init__(self, jaxpr: Any, sizes: DeviceSizes):
        self.sizes, self.nodes = sizes, []
        self.ins = [Value(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
        self.outs = inline_calls(jaxpr, self.ins, self.nodes)
        self.preallocated: set[Value] = set()  # overwrite an input, or go straight into the stack of a loop
        self.gathered: set[Value] = set()  # inputs that take memory from their first use: a layer's slice of a stack
        self.roots: dict[Value, frozenset[Value]] = {}  # {value: the arrays that it is computed from}
        self.last: dict[Value, int] = {}  # {array: the last node that reads it}

    def run(self) -> Cost:
        """Walk the nodes: allocate their outputs, and free each array after its last reader."""
        self.find_lifetimes()
        early = {v for n in self.nodes if n.fused and self.gathered.issuperset(self.sources(n.ins)) for v in n.outs}
        casts = self.allocated(early) if self.sizes.early_casts else []
        total, live, waiting = Cost(), {v: self.sizes.computed(v.aval) for v in casts}, set()
        for i, node in enumerate(self.nodes):
            inner, stacks = self.inner_cost(node)
            total.flops, total.moved = total.flops + inner.flops, total.moved + inner.moved
            gathered = self.sources(node.ins) & self.gathered
            live |= {v: self.sizes.computed(v.aval) for v in gathered if self.last.get(v, -1) >= i}
            overwritten = self.sources(reusable_inputs(node)) - self.gathered
            live = {v: b for v, b in live.items() if self.last[v] > i or v not in overwritten}
            allocated = self.allocated(node.outs)
            live |= {v: 0.0 if v in self.preallocated else self.sizes.kept(v.aval) for v in allocated}
            if node.name in PRODUCTS:
                inner.peak = sum(self.sizes.reducing(v.aval) for v in allocated)
            # An activation is an array that is stacked by a loop, or read much later.
            waiting |= {v for v in node.outs if v in stacks or self.last.get(v, 0) > i + len(self.nodes) // 8}
            if sum(live.values()) + inner.peak > total.peak:
                total = self.with_peak(total, live, waiting, inner)
            live = {v: b for v, b in live.items() if self.last[v] > i}
        return total

    def with_peak(self, total: Cost, live: dict[Value, float], waiting: set[Value], inner: Cost) -> Cost:
        """Return the total with a new peak: the live arrays and those inside a node, by kind."""
        shapes = self.sizes.kept_share
        gradients = sum(b for v, b in live.items() if v.aval.shape in shapes)
        activations = sum(b for v, b in live.items() if v in waiting and v.aval.shape not in shapes)
        return dataclasses.replace(
            total,
            peak=sum(live.values()) + inner.peak,
            gradients=gradients + inner.gradients,
            activations=activations + inner.activations,
        )

    def allocated(self, values: Iterable[Value]) -> list[Value]:
        """Return those of the values that are arrays of their own in memory."""
        return [v for v in values if self.roots[v] == {v}]

    def find_lifetimes(self) -> None:
        """Set `roots` and `last`: which values are arrays in memory, and who reads them last."""
        readers: dict[Value, list[Node]] = {}
        for node in reversed(self.nodes):  # a reader of a view reads the viewed array
            reading = [r for v in node.outs for r in readers.get(v, [])] if is_view(node) else [node]
            for v in node.ins:
                readers.setdefault(v, []).extend(reading)
        outs = set(self.outs)
        for i, node in enumerate(self.nodes):
            allocated = [v for v in node.outs if v in outs or is_allocated(node, readers.get(v, []))]
            read = self.sources(node.ins)
            self.roots |= {v: frozenset((v,)) if v in allocated else read for v in node.outs}
            self.last |= dict.fromkeys(allocated, i)
            if allocated or not node.fused:
                # An update reads the device's shard of a parameter, not the gathered array.
                self.last |= dict.fromkeys(read - self.gathered if node.fused else read, i)
        for v in outs:
            self.last |= dict.fromkeys(self.roots.get(v, frozenset((v,))), len(self.nodes))

    def sources(self, values: Iterable[Value]) -> frozenset[Value]:
        """Return the arrays that values are computed from, through fused nodes."""
        return frozenset().union(*(self.roots.get(v, frozenset((v,))) for v in values))

    def inner_cost(self, node: Node) -> tuple[Cost, list[Value]]:
        """Return (the cost of a node besides its outputs, those of its outputs that a loop stacks)."""
        params = node.params
        if node.name == "scan":
            walk = Walk(params["jaxpr"].jaxpr, self.sizes)
            consts, carry = scan_arity(params)
            walk.preallocated = set(walk.outs[carry:])
            walk.gathered = set(walk.ins[consts + carry :])
            return walk.run().times(params["length"]), list(node.outs[carry:])
        if node.name == "while":
            return Walk(params["body_jaxpr"].jaxpr, self.sizes).run(), []
        if node.name == "cond":
            return max((Walk(b.jaxpr, self.sizes).run() for b in params["branches"]), key=lambda c: c.peak), []
        allocated = self.allocated(node.outs)
        read = node.outs if node.name in SLICES else self.sources(node.ins)
        moved = sum(self.sizes.kept(v.aval) for v in (*allocated, *read)) if allocated else 0.0
        flops = 0.0
        if node.name in PRODUCTS:
            flops = product_flops(node) * min(self.sizes.context_share(v.aval) for v in (*node.ins, *node.outs))
        return Cost(flops, moved), []


def nbytes(aval: Any) -> float:
    """Return the bytes of an abstract value; a PRNG key is two words."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8.0 * math.prod(aval.shape)
    return float(math.prod(aval.shape) * aval.dtype.itemsize)
