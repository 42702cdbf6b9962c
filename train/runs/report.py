"""What a run says at its start: what trains, what is frozen, by which rule, in counts and bytes."""

from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ...model.quantize import Quantized
from ...model.tree import match_rules, name_and_layers, named, paths
from ...peft import Chain, Method, masks


def nbytes(tree: Any) -> int:
    """Bytes of all arrays or shapes of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def size(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def stored(params: Any) -> str:
    """What the numbers of the base are stored as, most of them first: `nf4, bfloat16`."""
    bits: dict[str, int] = {}
    for leaf in named(params).values():
        kind = type(leaf).__name__.lower() if isinstance(leaf, Quantized) else leaf.dtype.name
        bits[kind] = bits.get(kind, 0) + leaf.size
    return ", ".join(sorted(bits, key=lambda kind: -bits[kind]))


def rows(method: Method, params: Any, trainable: Any, tx: Any) -> list[dict[str, Any]]:
    """One row a parameter of the base: its size, what trains there, optimizer bytes, and the rule that picked it."""
    added: dict[str, list[tuple[str, Any]]] = {}
    base = {name_and_layers(path)[0] for path in named(params)}
    states = paths(jax.eval_shape(tx.init, trainable))
    for path, leaf in paths(trainable):
        name = name_and_layers(path)[0]
        owner = next((b for b in base if f"/{b}/" in f"/{name}/"), name)
        added.setdefault(owner, []).append((name, leaf))
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in named(params).items():
        row = found.setdefault(name_and_layers(path)[0], {"base": 0, "bytes": 0})
        row["base"] += leaf.size
        row["bytes"] += nbytes(leaf)
    for name in added:  # of no parameter of the base: a prefix that one MLP makes for all layers
        found.setdefault(name, {"base": 0, "bytes": 0})
    picked = _picked(method, params)
    for name, row in found.items():
        own = added.get(name, [])
        row |= {"name": name, "trains": sum(leaf.size for _, leaf in own), "rule": picked.get(name, "") if own else ""}
        row["optimizer"] = sum(leaf.size * leaf.dtype.itemsize for path, leaf in states
                               if f"/{name}/" in f"/{name_and_layers(path)[0]}/")  # fmt: skip
    return list(found.values())


def _picked(method: Method, params: Any) -> dict[str, str]:
    """{parameter: the rule of the method's `where` that picked it}."""
    if isinstance(method, Chain):
        return {k: v for _, m in reversed(method.methods) for k, v in _picked(m, params).items()}
    where = getattr(method, "where", "")
    if not where:
        return {}
    rules = [(rule, rule) for rule, value in masks.rules(where) if value]
    found = match_rules(rules, params, default="")
    return {
        name_and_layers(path)[0]: next((v for v in values if v), "") for path, values in found.items() if any(values)
    }


def show(console: Console, title: str, method: Method, params: Any, trainable: Any, tx: Any) -> dict[str, int]:
    """Print the table and return its totals."""
    lines = rows(method, params, trainable, tx)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("parameter", "in the base", "trains", "optimizer", "rule"):
        table.add_column(column, justify="left" if column in ("parameter", "rule") else "right")
    for r in lines:
        if r["trains"]:
            table.add_row(
                r["name"], f"{r['base']:,}" if r["base"] else "-", f"{r['trains']:,}", size(r["optimizer"]), r["rule"]
            )
    frozen = [r for r in lines if not r["trains"]]
    if frozen:
        names = ", ".join(r["name"] for r in frozen[:3]) + (f" and {len(frozen) - 3} more" if len(frozen) > 3 else "")
        table.add_row(names, f"{sum(r['base'] for r in frozen):,}", "frozen", "0 B", "", style="dim")
    total, trains = sum(r["base"] for r in lines), sum(x.size for x in jax.tree.leaves(trainable))
    optimizer = nbytes(jax.eval_shape(tx.init, trainable))
    table.add_section()
    table.add_row("total", f"{total:,}", f"{trains:,} ({trains / total:.2%})", size(optimizer), "")
    table.add_row("the base stored", size(nbytes(params)), stored(params), "", "", style="dim")
    console.print(table)
    sizes = {"base_bytes": nbytes(params), "trainable_bytes": nbytes(trainable), "optimizer_bytes": optimizer}
    return {"base": total, "trainable": trains, **sizes}
