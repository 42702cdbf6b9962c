"""A jaxpr as a list of nodes, and a model of which of them a compiler allocates, and which it fuses or makes views."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend import core

# Fused into their readers; a chain of them that ends in an array is one loop over it.
_ELEMENTWISE = """abs acos add add_any and
atan2 broadcast_in_dim ceil clamp convert_element_type copy cos div eq erf exp exp2
expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not
optimization_barrier or pad pow real rem reshape rev round rsqrt select_n sharding_constraint
shift_left shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub tanh transpose xor
device_put name"""
FUSED = frozenset(_ELEMENTWISE.split())
VIEWS = frozenset(
    ("expand_dims", "reshape", "squeeze", "stop_gradient", "device_put")
)  # the same bytes under another shape
IN_PLACE = frozenset(("dynamic_update_slice", "scatter", "scatter-add"))  # overwrite their operand if they read it last
SLICES = frozenset(("gather", "dynamic_slice", "slice"))  # read only as many elements as they return
COSTLY = frozenset(
    ("exp", "exp2", "tanh", "logistic", "erf", "log", "pow", "sin", "cos")
)  # not computed again for a second reader
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))


class Value:
    """A value of the program; compared by identity."""

    def __init__(self, aval: Any):
        self.aval = aval


class Node(NamedTuple):
    """An equation."""

    name: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    params: Any
    fused: bool


def inline_calls(jaxpr: Any, inputs: Iterable[Value], nodes: list[Node]) -> list[Value]:
    """Append the equations of a jaxpr to `nodes`, with called functions inlined; return its outputs."""
    env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=False))
    read = lambda v: Value(v.aval) if isinstance(v, core.Literal) else env.setdefault(v, Value(v.aval))  # noqa: E731
    for eqn in jaxpr.eqns:
        ins, name = [read(v) for v in eqn.invars], eqn.primitive.name
        called = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)
        if called is not None and name != "scan":
            sub = getattr(called, "jaxpr", called)
            consts = [Value(v.aval) for v in sub.constvars]
            env |= dict(zip(eqn.outvars, inline_calls(sub, (*consts, *ins), nodes), strict=True))
            continue
        env |= {v: Value(v.aval) for v in eqn.outvars}
        nodes.append(Node(name, tuple(ins), tuple(env[v] for v in eqn.outvars), eqn.params, name in FUSED))
    return [read(v) for v in jaxpr.outvars]


def reusable_inputs(node: Node) -> tuple[Value, ...]:
    """Return the inputs of a node whose memory its outputs may take, if nothing else reads them."""
    if node.name == "scan":
        consts, carry = scan_arity(node.params)
        return node.ins[consts : consts + carry]
    return node.ins if node.fused or node.name in IN_PLACE else ()


def scan_arity(params: Any) -> tuple[int, int]:
    """Return the numbers of (constants, carried values), the first inputs of a scan. From JAX 0.12 they are trees."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def is_allocated(node: Node, readers: list[Node]) -> bool:
    """Return true if the output of a node with these readers is an array in memory, not fused and not a view."""
    if is_view(node):
        return False
    if not node.fused or any(not r.fused and not _streams(r, node) for r in readers):
        return True
    return len(readers) > 1 and node.name in COSTLY


def is_view(node: Node) -> bool:
    """Return true if the output of a node is its input's bytes under another shape."""
    if node.name == "transpose":  # of the last two axes at most: matrix products take either order
        order = node.params["permutation"]
        return order[:-2] == tuple(range(len(order) - 2))
    return node.name in VIEWS and not _copies_to_host(node)


def _streams(reader: Node, node: Node) -> bool:
    """Return true if a reader that is not elementwise computes its operand while it reads it.

    These are reductions, and additions into an array of zeros.
    """
    zeros = node.name == "broadcast_in_dim" and node.ins[0].aval.shape == ()
    return reader.name.startswith(("reduce_", "arg")) or (zeros and reader.name in IN_PLACE)


def _copies_to_host(node: Node) -> bool:
    """Return true if a node copies between device and host memory."""
    return node.name == "device_put" and node.ins[0].aval.memory_space != node.outs[0].aval.memory_space


def product_flops(node: Node) -> float:
    """Return the FLOPs of a product: 2 for each multiplication."""
    out, shape = math.prod(node.outs[0].aval.shape), node.ins[0].aval.shape
    if node.name != "dot_general":
        return 2.0 * out * math.prod(node.ins[1].aval.shape[1:])
    return 2.0 * out * math.prod(shape[i] for i in node.params["dimension_numbers"][0][0])
