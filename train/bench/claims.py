"""`python -m graftax.train.bench.claims`: test two published claims about LoRA at this scale (claims.md).

(a) The best learning rate of LoRA is about ten times that of full fine-tuning and hardly depends on the rank.
(b) At equal numbers of trainable parameters LoRA on MLPs, or everywhere, beats LoRA on attention alone.
(J. Schulman and Thinking Machines Lab, "LoRA Without Regret", 2025.) Every training is a trial of `graftax sweep`.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import InputError, peft
from ...peft import Subset
from ...peft.methods.lora import LoRA
from ..config import Data, Optim, Run
from ..machine import cpu_cores, cpu_name
from ..recipes import recipes
from .table import RESULTS, write

FULL = tuple(2.5e-4 * 2**i for i in range(7))  # rates; of LoRA ten times these
RANKS, WHERE = (2, 8, 32), ("attention", "mlp", "linear")
BUDGETS = (7, 24)  # ranks of `attention`; the others get the rank with the nearest number of parameters


class Line(NamedTuple):
    """Losses over learning rates: {rate: the loss of each seed}."""

    name: str
    parameters: int
    losses: dict[float, list[float]]

    @property
    def means(self) -> dict[float, float]:
        """Return {rate: mean loss over seeds}, sorted by rate."""
        return {rate: float(np.mean(losses)) for rate, losses in sorted(self.losses.items())}

    @property
    def best(self) -> float:
        """Return the rate with the lowest mean loss."""
        return min(self.means, key=lambda rate: self.means[rate])

    @property
    def shown(self) -> str:
        """Return the best rate as text, marked ↓ or ↑ at an end of the grid, beyond which a better one may lie."""
        ends = {min(self.means): " ↓", max(self.means): " ↑"}
        return f"{self.best:.2g}{ends.get(self.best, '')}"

    def vertex(self, losses: Sequence[float] = ()) -> float:
        """Return the minimum of a parabola over log rate through the lowest loss and its two neighbours.

        At an end of the grid, or beside a rate that diverged, return the best rate itself. `losses` are those of one
        seed; by default the means.
        """
        rates, y = np.log(list(self.means)), np.array(losses or list(self.means.values()))
        i = int(y.argmin())
        if not 0 < i < len(y) - 1 or not np.isfinite(y[i - 1 : i + 2]).all():
            return float(np.exp(rates[i]))
        a, b, _ = np.polyfit(rates[i - 1 : i + 2], y[i - 1 : i + 2], 2)
        return float(np.exp(-b / (2 * a)))


def around(rate: float) -> list[float]:
    """Return four rates from 0.5 to 1.4 times the best one, finer than its grid; above that LoRA diverges."""
    return [rate * 2 ** (i / 2) for i in (-2, -1, 0, 1)]


def swept(run: Run, name: str, over: Sequence[str], out: Path, params: Any) -> Line:
    """Run a sweep, or read its results if it is done; return its losses."""
    from ..experiments.sweep.command import Sweep

    run = dataclasses.replace(run, out=str(out / name.replace(" ", "_")), resume="auto")
    Sweep(run, tuple(over)).run()
    rows = [json.loads(line) for line in (Path(run.out) / "results.jsonl").read_text("utf-8").splitlines()]
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(float(row["optim.lr"]), []).append(row.get("valid_loss", float("inf")))
    return Line(name, peft.count(run.method, params), losses)


def axis(rates: Sequence[float], factor: float = 1.0) -> str:
    """`optim.lr=...`."""
    return "optim.lr=" + ",".join(f"{rate * factor:.4g}" for rate in rates)


def matched(params: Any, where: str, budget: int) -> int:
    """Return the rank at which LoRA on these matrices has the nearest number of parameters."""
    return max(round(budget / peft.count(LoRA(rank=1, where=where), params)), 1)


def rates_table(full: Line, ranks: Sequence[Line]) -> str:
    """Return the table of claim (a)."""
    lines = ["| what trains | parameters | best rate of the grid | least of a parabola | by seed | of full's | "
             "validation loss there |", "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for line in (full, *ranks):
        seeds = [line.vertex([losses[i] for _, losses in sorted(line.losses.items())])
                 for i in range(len(next(iter(line.losses.values()))))]  # fmt: skip
        least, loss = line.vertex(), line.means[line.best]
        shown = (line.name, f"{line.parameters:,}", line.shown, f"{least:.2g}",
                 " ".join(f"{x:.2g}" for x in seeds), f"{least / full.vertex():.1f}", f"{loss:.3f}")  # fmt: skip
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def places_table(groups: Sequence[Sequence[Line]]) -> str:
    """Return the table of claim (b): each at its best rate."""
    lines = ["| LoRA on | parameters | best rate | validation loss | by seed |", "|---|--:|--:|--:|--:|"]
    for group in groups:
        for line in group:
            seeds, loss = " ".join(f"{x:.3f}" for x in line.losses[line.best]), line.means[line.best]
            lines.append(f"| {line.name} | {line.parameters:,} | {line.shown} | {loss:.3f} | {seeds} |")
    return "\n".join(lines)


def picture(path: Path, groups: Mapping[str, Sequence[Line]]) -> None:
    """Draw loss over learning rate as a PNG, one panel for each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True)
    for ax, (title, lines) in zip(axes, groups.items(), strict=True):
        for line in lines:
            rates = list(line.means)
            (drawn,) = ax.plot(rates, list(line.means.values()), marker="o", markersize=3, label=line.name)
            low, high = ([f(line.losses[rate]) for rate in rates] for f in (min, max))
            ax.fill_between(rates, low, high, alpha=0.15, color=drawn.get_color())
        ax.set(xscale="log", xlabel="learning rate", title=title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    low = min(min(line.means.values()) for lines in groups.values() for line in lines)
    axes[0].set(
        ylabel="validation loss, nats per token", ylim=(low - 0.1, low + 1.5)
    )  # diverged runs lie above the frame
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Run the sweeps that are not done; print the tables, and with --write store them and the picture."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.claims", description="See docs/results/claims.md.")
    parser.add_argument("--base", required=True, help="a run directory")
    parser.add_argument("--root", required=True, help="the data folder")
    parser.add_argument("--task", default="snips")
    parser.add_argument("--out", default="runs/claims", help="the sweeps; what is done there is not done again")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put tables and picture beside claims.md")
    args = parser.parse_args(argv)
    from ..runs.load import load_run

    params, out = load_run(args.base).merged, Path(args.out)
    seeds = f"seed=0..{args.seeds - 1}"
    run = dataclasses.replace(
        recipes["trial"](), base=args.base, steps=args.steps, data=Data(task=args.task, root=args.root, T=160, batch=3),
        optim=Optim(weight_decay=0.0, warmup=0.1), eval_tokens=8192,
    )  # fmt: skip
    lora = lambda rank, where="linear": dataclasses.replace(run, method=LoRA(rank=rank, where=where))  # noqa: E731
    full = swept(dataclasses.replace(run, method=Subset("all")), "full", (axis(FULL), seeds), out, params)
    ranks = [swept(lora(r), f"LoRA rank {r}", (axis(FULL, 10), seeds), out, params) for r in RANKS]
    rates = axis(around(ranks[1].best))
    groups = []
    for attention in BUDGETS:
        budget = peft.count(LoRA(rank=attention, where="attention"), params)
        group = []
        for where in WHERE:
            rank = matched(params, where, budget)
            place = {"linear": "everywhere"}.get(where, where)
            group.append(swept(lora(rank, where), f"{place} rank {rank}", (rates, seeds), out, params))
        groups.append(group)
    about = (f"{time.strftime('%Y-%m-%d')}, {cpu_cores()} cores, {cpu_name()}, jax {version('jax')}: {args.task}, "
             f"{args.steps} steps of 3 x 160 tokens, {args.seeds} seeds")  # fmt: skip
    text = "\n".join([f"{about}.\n", "### (a)\n", rates_table(full, ranks), "\n### (b)\n", places_table(groups), ""])
    print(text)
    if args.write:
        write(text, f"claims {args.task}", RESULTS / "claims.md")
        panels = {"(a) full and ranks": [full, *ranks]} | {f"(b) {g[0].parameters:,} parameters": g for g in groups}
        picture(RESULTS / f"claims_{args.task}.png", panels)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
