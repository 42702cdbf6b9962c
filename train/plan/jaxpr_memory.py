"""A jaxpr as a list of nodes with all calls inlined, and what a compiler makes of each: an array, a view, a part of a
loop over its readers."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend import core

# Fused into whoever reads them; a chain of them that ends in an array is one loop over it.
_FUSED = """abs acos add add_any and atan2 broadcast_in_dim ceil clamp convert_element_type copy cos div eq erf exp exp2
expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not
optimization_barrier or pad pow real rem reshape rev round rsqrt select_n sharding_constraint
shift_left shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub tanh transpose xor
device_put name"""
FUSED = frozenset(_FUSED.split())
VIEWS = frozenset(("expand_dims", "reshape", "squeeze", "stop_gradient", "device_put"))  # the same bytes, renamed
IN_PLACE = frozenset(("dynamic_update_slice", "scatter", "scatter-add"))  # over what they are last to read
PICKS = frozenset(("gather", "dynamic_slice", "slice"))  # they read as much as they give
COSTLY = frozenset(("exp", "exp2", "tanh", "logistic", "erf", "log", "pow", "sin", "cos"))  # not computed twice
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))


class Value:
    """An array of the program."""

    def __init__(self, aval: Any):
        self.aval = aval


class Node(NamedTuple):
    """An equation, with all calls inlined."""

    name: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    params: Any
    fused: bool


def flat(jaxpr: Any, given: Iterable[Value], nodes: list[Node]) -> list[Value]:
    """Append the equations of a jaxpr to `nodes`, those of the functions that it calls in their place; its outputs."""
    env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=False))
    read = lambda v: Value(v.aval) if isinstance(v, core.Literal) else env.setdefault(v, Value(v.aval))  # noqa: E731
    for eqn in jaxpr.eqns:
        ins, name = [read(v) for v in eqn.invars], eqn.primitive.name
        called = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)
        if called is not None and name != "scan":
            sub = getattr(called, "jaxpr", called)
            consts = [Value(v.aval) for v in sub.constvars]
            env |= dict(zip(eqn.outvars, flat(sub, (*consts, *ins), nodes), strict=True))
            continue
        env |= {v: Value(v.aval) for v in eqn.outvars}
        nodes.append(Node(name, tuple(ins), tuple(env[v] for v in eqn.outvars), eqn.params, name in FUSED))
    return [read(v) for v in jaxpr.outvars]


def written(node: Node) -> tuple[Value, ...]:
    """The inputs of a node whose memory its outputs may take, if nothing else reads them."""
    if node.name == "scan":
        first, n = carried(node.params)
        return node.ins[first : first + n]
    return node.ins if node.fused or node.name in IN_PLACE else ()


def carried(params: Any) -> tuple[int, int]:
    """(constants, carried values) of a scan, which come first among its inputs. From jax 0.12 on they are trees."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def is_array(node: Node, readers: list[Node]) -> bool:
    """Whether a node's output is in memory, by who reads it."""
    if is_view(node):
        return False
    if not node.fused or any(not r.fused and not _streams(r, node) for r in readers):
        return True
    return len(readers) > 1 and node.name in COSTLY


def is_view(node: Node) -> bool:
    """Whether a node gives the same bytes under another shape."""
    turned = node.name == "transpose" and _turned(node.params["permutation"])
    return turned or (node.name in VIEWS and not _moves(node))


def _streams(reader: Node, node: Node) -> bool:
    """Whether a reader that is not elementwise computes its operand while it reads it: reductions, and additions into
    what begins as zeros."""
    zeros = node.name == "broadcast_in_dim" and node.ins[0].aval.shape == ()
    return reader.name.startswith(("reduce_", "arg")) or (zeros and reader.name in IN_PLACE)


def _turned(order: tuple[int, ...]) -> bool:
    """Whether a transposition swaps the last two axes at most: products take either order."""
    return order[:-2] == tuple(range(len(order) - 2))


def _moves(node: Node) -> bool:
    """Whether a node copies between device and host."""
    return node.name == "device_put" and node.ins[0].aval.memory_space != node.outs[0].aval.memory_space


def flops(node: Node) -> float:
    """2 x the multiplications of a product."""
    out, shape = math.prod(node.outs[0].aval.shape), node.ins[0].aval.shape
    if node.name != "dot_general":
        return 2.0 * out * math.prod(node.ins[1].aval.shape[1:])
    return 2.0 * out * math.prod(shape[i] for i in node.params["dimension_numbers"][0][0])
