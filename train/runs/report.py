"""The table at the start of a run: what trains, what is frozen, by which rule, in counts and bytes."""

from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ...model.quantize import Quantized
from ...model.tree import match_rules, name_and_layers, named, paths
from ...peft import Chain, Method, masks


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays or shapes of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def format_bytes(n: float) -> str:
    """Return 1536 as '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def storage_dtypes(params: Any) -> str:
    """Return the dtypes or quantisations of the base, the most frequent first: `nf4, bfloat16`."""
    sizes: dict[str, int] = {}
    for leaf in named(params).values():
        kind = type(leaf).__name__.lower() if isinstance(leaf, Quantized) else leaf.dtype.name
        sizes[kind] = sizes.get(kind, 0) + leaf.size
    return ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))


def parameter_rows(method: Method, params: Any, trainable: Any, tx: Any) -> list[dict[str, Any]]:
    """Return a row for each parameter of the base: its size, what trains there, optimizer bytes, and the rule that
    selected it. Trainable arrays that belong to no parameter (one MLP that makes the prefix of all layers) follow."""
    rows: dict[str, dict[str, Any]] = {}
    for path, leaf in named(params).items():
        name = name_and_layers(path)[0]
        row = rows.setdefault(name, {"name": name, "base": 0, "trains": 0, "optimizer": 0, "rule": ""})
        row["base"] += leaf.size
    base, rules = list(rows), _rules(method, params)

    def row_of(path: str) -> dict[str, Any]:
        name = name_and_layers(path)[0]
        owner = next((b for b in base if f"/{b}/" in f"/{name}/"), name)
        return rows.setdefault(owner, {"name": owner, "base": 0, "trains": 0, "optimizer": 0, "rule": ""})

    for path, leaf in paths(trainable):
        row = row_of(path)
        row["trains"] += leaf.size
        row["rule"] = rules.get(row["name"], "")
    states = [(name_and_layers(path)[0], leaf) for path, leaf in paths(jax.eval_shape(tx.init, trainable))]
    for name, row in rows.items():
        row["optimizer"] = sum(nbytes(leaf) for path, leaf in states if f"/{name}/" in f"/{path}/")
    return list(rows.values())


def _rules(method: Method, params: Any) -> dict[str, str]:
    """Return {parameter: the rule of the method's `where` that selected it}."""
    if isinstance(method, Chain):
        return {k: v for _, m in reversed(method.methods) for k, v in _rules(m, params).items()}
    where = getattr(method, "where", "")
    if not where:
        return {}
    matches = match_rules([(rule, rule) for rule, value in masks.rules(where) if value], params, default="")
    return {name_and_layers(path)[0]: next(filter(None, values)) for path, values in matches.items() if any(values)}


def print_parameters(
    console: Console, title: str, method: Method, params: Any, trainable: Any, tx: Any
) -> dict[str, int]:
    """Print the table and return its totals."""
    rows = parameter_rows(method, params, trainable, tx)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("parameter", "in the base", "trains", "optimizer", "rule"):
        table.add_column(column, justify="left" if column in ("parameter", "rule") else "right")
    for row in rows:
        if row["trains"]:
            size = f"{row['base']:,}" if row["base"] else "-"
            table.add_row(row["name"], size, f"{row['trains']:,}", format_bytes(row["optimizer"]), row["rule"])
    frozen = [row for row in rows if not row["trains"]]
    if frozen:
        names = ", ".join(row["name"] for row in frozen[:3])
        names += f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        table.add_row(names, f"{sum(row['base'] for row in frozen):,}", "frozen", "0 B", "", style="dim")
    total, trains = sum(row["base"] for row in rows), sum(x.size for x in jax.tree.leaves(trainable))
    optimizer = nbytes(jax.eval_shape(tx.init, trainable))
    table.add_section()
    table.add_row("total", f"{total:,}", f"{trains:,} ({trains / total:.2%})", format_bytes(optimizer), "")
    table.add_row("the base stored", format_bytes(nbytes(params)), storage_dtypes(params), "", "", style="dim")
    console.print(table)
    sizes = {"base_bytes": nbytes(params), "trainable_bytes": nbytes(trainable), "optimizer_bytes": optimizer}
    return {"base": total, "trainable": trains, **sizes}
