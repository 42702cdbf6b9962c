"""Plans as text: one in full, or several as a table."""

from typing import Any

from rich.table import Table

from ..progress import console
from ..runs.report import format_bytes
from .planner import KINDS
from .topology import Target


def print_plan(plan: dict[str, Any]) -> None:
    """Print one plan."""
    memory, seconds, flops = plan["bytes"], plan["seconds"], plan["flops"]
    quantize = f" · {plan['quantize']}" if plan["quantize"] else ""
    links = (
        f"{axis}: " + ", ".join(f"{kind} {format_bytes(n)}" for kind, n in sent.items())
        for axis, sent in plan["sent"].items()
    )
    lines = [
        f"{plan['base'] or plan['recipe']} · {plan['phase']} {plan['method']}{quantize} · "
        f"{plan['devices']} x {plan['chip']} · mesh {_mesh(plan)} ({' x '.join(plan['mesh'])}) · "
        f"rows of {plan['T']} tokens · batch {plan['batch']} in {plan['accumulate']} · {plan['dtype']} · "
        f"remat {plan['remat']}",
        _source(plan),
        f"parameters   {plan['parameters']:,}; trained: {plan['trainable']:,} "
        f"({plan['trainable'] / plan['parameters']:.3%})",
        "per device   " + " · ".join(f"{kind} {format_bytes(memory[kind])}" for kind in KINDS),
        f"             {format_bytes(memory['total'])} of {format_bytes(plan['memory'])}: " + _fit(plan),
        f"per step     {flops['step']:.3g} FLOPs, {flops['device']:.3g} per device ({flops['model']:.3g} without "
        f"recomputation); {format_bytes(plan['moved'])} through the memory of a device",
        "links        " + (" · ".join(links) or "none"),
        f"time         products {seconds['compute']:.3g} s, memory {seconds['memory']:.3g} s, links "
        f"{seconds['links']:.3g} s: expected {seconds['expected']:.3g} s, at best {seconds['best']:.3g} s; "
        f"{plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.0%}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def print_table(column: str, plans: dict[str, dict[str, Any]], target: Target) -> dict[str, Any]:
    """Print several plans side by side, and return them; `column` says what their names are."""
    first = next(iter(plans.values()))
    sources = ", ".join(sorted({plan["source"] for plan in plans.values()}))
    devices = f"{target.n} x {target.chip.name} ({target.name})"
    title = (
        f"{first['base'] or first['recipe']} · {devices} · rows of {first['T']} tokens · bytes per device ({sources})"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = [
        "trained",
        "weights",
        "+ state",
        "+ working",
        "total",
        "fits",
        "FLOPs",
        "links",
        "seconds",
        "tokens/s",
        "artifact",
    ]
    for i, name in enumerate((column, *columns)):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for name, plan in plans.items():
        memory, trainable = plan["bytes"], plan["trainable"]
        state = memory["trainable"] + memory["optimizer"] + memory["gradients"]
        sent = sum(sum(kinds.values()) for kinds in plan["sent"].values())
        table.add_row(
            name,
            f"{trainable / 1e6:,.2f} M",
            format_bytes(memory["weights"]),
            format_bytes(state),
            format_bytes(memory["activations"] + memory["temporaries"]),
            format_bytes(memory["total"]),
            "yes" if plan["fits"] else f"+{format_bytes(-plan['left'])}",
            f"{plan['flops']['step']:.2g}",
            format_bytes(sent),
            f"{plan['seconds']['expected']:.3g}",
            f"{plan['tokens_per_second']:,.0f}",
            format_bytes(4 * trainable),
        )
    console.print(table)
    console.print(
        "state: trained parameters, their gradients, the optimizer · working: activations, temporaries · "
        "artifact: what a checkpoint keeps of the method, in fp32"
    )
    return plans


def format_variant(plan: dict[str, Any]) -> str:
    """Return mesh, recomputation and batch of a plan: `2x4x1x1 · dots · 16/2`."""
    parts = f"/{plan['accumulate']}" if plan["accumulate"] > 1 else ""
    return f"{_mesh(plan)} · {plan['remat']} · {plan['batch']}{parts}"


def _mesh(plan: dict[str, Any]) -> str:
    return "x".join(map(str, plan["mesh"].values()))


def _source(plan: dict[str, Any]) -> str:
    if plan["source"] == "model":
        return f"from a model of the program ({plan['compiler']})"
    return (
        f"from the compiled program ({plan['compiler']}, {plan['compile_seconds']} s); FLOPs, memory traffic and the "
        "kinds of temporary memory are from a model"
    )


def _fit(plan: dict[str, Any]) -> str:
    return (
        f"fits, {format_bytes(plan['left'])} free"
        if plan["fits"]
        else f"DOES NOT FIT, {format_bytes(-plan['left'])} over"
    )
