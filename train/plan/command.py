"""`graftax plan`: what a run needs, before it runs: memory by kind, FLOPs, traffic, time, and whether it fits."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from ... import InputError
from ...peft import Subset
from ..config import Run, did_you_mean, from_json, method_class
from ..progress import console
from ..recipes import recipes
from ..runs.report import format_bytes
from .planner import KINDS, planned
from .search import search
from .topology import WANTED, Target, target

HELP = f"""graftax plan RECIPE [flags of graftax pretrain or finetune]: what a run needs, before it runs

Example: graftax plan sft --base llama-3.1-8b --method lora --data.T 4096 --data.batch 16 --topology v5e:4x4

  --base       a preset's name, a Hugging Face folder or a run (its config alone is read)
  --topology   where: {WANTED}; the devices here, if not given
  --mesh       data fsdp tensor [context], as a run has it
  --methods    a table of several: names with commas between, of methods and pretrain, full, qlora; or `all`
  --search     try meshes, recomputation, batches; print the few that fit, fastest first
  --model      do not compile
  --json       one object on stdout

No array is made. With a compiler for the target (this machine's devices; TPU slices by libtpu) the numbers are those of
the compiled program, else those of a model of it, and the plan says which. FLOPs are of products alone, recomputation
included; MFU counts 4 N a token and 2 a parameter that trains, without recomputation. A step is expected to take
max(FLOPs / peak, bytes through memory / bandwidth) + bytes sent / link: links are not hidden."""
USUAL = ("pretrain", "full", "lntuning", "houlsby", "lora", "qlora", "dora", "ia3", "prefix", "prompt")


def plan(args: list[str]) -> Any:
    """The command: print the plan, or the table of several; returns it as JSON."""
    from ..flags import run_of, take

    if "--help" in args or "-h" in args:
        print(HELP)
        raise SystemExit(0)
    topology, rest = take(args, "--topology")
    methods, rest = take(rest, "--methods")
    compiling, searching = "--model" not in rest, "--search" in rest
    rest = [a for a in rest if a not in ("--model", "--search")]
    if topology and not topology.startswith("gpu"):
        jax.config.update("jax_platforms", "cpu")  # this machine only traces; a TPU library must not look for a TPU
    where = target(topology or "")
    run = run_of(phase_of(rest), rest)
    if methods:
        names = USUAL if methods == "all" else tuple(name.strip() for name in methods.split(","))
        return show_table("method", {name: one(run, where, name, compiling) for name in names}, where)
    if searching:
        found, tried = search(run, where, compiling)
        if not found:
            raise InputError(f"--search: none of {tried} ways to run this fits {where.name}; take more devices, a "
                             "shorter --data.T, a method that trains less, or --quantize nf4")  # fmt: skip
        console.print(f"{tried} ways tried; the fastest that fit:")
        return show_table("mesh · remat · batch", {_way(r): r for r in found}, where)
    row = planned(run, where, compiling)
    show(row)
    return row


def phase_of(args: list[str]) -> str:
    """The phase of the recipe, or of the config.json, that the arguments begin with."""
    name = args[0] if args else ""
    if name.endswith(".json"):
        return from_json(Path(name)).phase
    if name not in recipes:
        raise InputError(f"graftax plan wants a recipe, not {name!r}{did_you_mean(name, recipes)}; there are "
                         f"{', '.join(recipes)} (graftax plan --help)")  # fmt: skip
    return recipes[name]().phase


def one(run: Run, where: Target, name: str, compiling: bool) -> dict[str, Any]:
    """The plan of the run with another method: `pretrain`, `full`, `qlora`, or a method's name."""
    if name == "pretrain":
        run = dataclasses.replace(run, phase="pretrain", method=Subset("all"), quantize="")
    elif name == "full":
        run = dataclasses.replace(run, method=Subset("all"), quantize="")
    elif name == "qlora":
        run = dataclasses.replace(run, method=method_class("lora")(), quantize="nf4")
    else:
        run = dataclasses.replace(run, method=method_class(name)())
    return planned(run, where, compiling)


def show(row: dict[str, Any]) -> None:
    """Print one plan."""
    axes, b, seconds = "x".join(map(str, row["mesh"].values())), row["bytes"], row["seconds"]
    base, more = row["base"] or row["recipe"], f" · {row['quantize']}" if row["quantize"] else ""
    lines = [
        f"{base} · {row['phase']} {row['method']}{more} · {row['devices']} x {row['chip']} · mesh {axes} "
        f"({' x '.join(row['mesh'])}) · rows of {row['T']} · batch {row['batch']} in {row['accumulate']} · "
        f"{row['dtype']} · remat {row['remat']}",
        says(row),
        f"parameters   {row['parameters']:,}, of which train {row['trainable']:,}"
        f" ({row['trainable'] / row['parameters']:.3%})",
        "a device     " + " · ".join(f"{kind} {format_bytes(b[kind])}" for kind in KINDS),
        f"             {format_bytes(b['total'])} of {format_bytes(row['memory'])}: " + fits(row),
        f"a step       {row['flops']['step']:.3g} FLOPs, {row['flops']['device']:.3g} a device "
        f"({row['flops']['model']:.3g} without recomputation); {format_bytes(row['moved'])} through a device's memory",
        "links        " + (" · ".join(f"{axis}: " + ", ".join(f"{kind} {format_bytes(n)}" for kind, n in by.items())
                                      for axis, by in row["sent"].items()) or "none"),
        f"time         products {seconds['compute']:.3g} s, memory {seconds['memory']:.3g} s, links "
        f"{seconds['links']:.3g} s: expected {seconds['expected']:.3g} s, at best {seconds['best']:.3g} s; "
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}",
    ]  # fmt: skip
    for line in lines:
        console.print(line, soft_wrap=True)


def says(row: dict[str, Any]) -> str:
    """From where the numbers are."""
    if row["source"] == "model":
        return f"from a model  ({row['compiler']})"
    said = f"from the compiled program  ({row['compiler']}, {row['compile_seconds']} s)"
    return f"{said}; FLOPs, memory traffic and the parts of what is temporary are a model's"


def fits(row: dict[str, Any]) -> str:
    """Whether a plan fits, and by how much."""
    return (
        f"fits, {format_bytes(row['left'])} to spare"
        if row["fits"]
        else f"DOES NOT FIT, {format_bytes(-row['left'])} too much"
    )


def _way(row: dict[str, Any]) -> str:
    axes = "x".join(map(str, row["mesh"].values()))
    return f"{axes} · {row['remat']} · {row['batch']}" + (f"/{row['accumulate']}" if row["accumulate"] > 1 else "")


def show_table(what: str, found: dict[str, dict[str, Any]], where: Target) -> dict[str, Any]:
    """Print several plans side by side."""
    first = next(iter(found.values()))
    made = ", ".join(sorted({r["source"] for r in found.values()}))
    title = f"{first['base'] or first['recipe']} · {where.n} x {where.chip.name} ({where.name}) · rows of {first['T']}"
    table = Table(title=f"{title} · bytes of a device ({made})", title_justify="left", box=None, pad_edge=False)
    columns = ("trains", "weights", "+ its state", "at work", "total", "fits", "FLOPs", "links", "seconds", "tokens/s",
               "artifact")  # fmt: skip
    for i, column in enumerate((what, *columns)):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for name, r in found.items():
        b = r["bytes"]
        state = b["trainable"] + b["optimizer"] + b["gradients"]
        sent = sum(sum(by.values()) for by in r["sent"].values())
        sizes = map(format_bytes, (b["weights"], state, b["activations"] + b["temporaries"], b["total"]))
        table.add_row(name, f"{r['trainable'] / 1e6:,.2f} M", *sizes,
                      "yes" if r["fits"] else f"+{format_bytes(-r['left'])}",
                      f"{r['flops']['step']:.2g}", format_bytes(sent), f"{r['seconds']['expected']:.3g}",
                      f"{r['tokens_per_second']:,.0f}", format_bytes(4 * r["trainable"]))  # fmt: skip
    console.print(table)
    console.print("its state: what trains, its gradient, the optimizer · at work: activations, temporaries · "
                  "artifact: what a checkpoint keeps of it, fp32")  # fmt: skip
    return found
