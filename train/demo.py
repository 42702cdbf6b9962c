"""The whole path in minutes: text -> tokenizer -> base -> a task tuned by every method -> one table, two pictures."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from .. import InputError, peft
from ..bounds import Checked, Count, Seed
from ..data.tasks.base import floors
from ..model import generate
from ..peft import Method, Subset
from .config import Data, Optim, Run
from .inputs import load_task
from .progress import console, format_time, read_metrics
from .recipes import recipes
from .runs.load import load_run
from .runs.report import format_bytes
from .runs.train import train

TASK = "embedded:next_token"
OPENING = "def read(self, size):\n"


@dataclasses.dataclass(frozen=True)
class Demo(Checked):
    """Pretrain a small base on the standard library of this Python, then tune it by every method on a task about it.

    Two CPU cores, no download. Example: graftax demo --out runs/demo"""

    out: str = ""  # empty: runs/demo, or the first of runs/demo-2, runs/demo-3, ... that is free
    pretrain_steps: Count = 1000
    steps: Count = 160  # of each tuning
    lr: float = 1e-3  # of full fine-tuning; a method's is `rate` times it
    seed: Seed = 0


def tunings() -> dict[str, tuple[Method, float]]:
    """{name: (method, learning rate over full fine-tuning's)}: full, a mask, and every method in peft/."""
    found: dict[str, tuple[Method, float]] = {"full": (Subset("all"), 1.0), "norms": (Subset("norms"), 30.0)}
    return found | {
        name: (cls(), cls.lr_multiplier) for name, cls in peft.methods.items() if cls.demo and cls is not Subset
    }


def demo(config: Demo) -> dict[str, Any]:
    """Run it; returns the table as rows. Everything is under `config.out`."""
    began = time.perf_counter()
    free = (Path("runs", name) for name in ("demo", *(f"demo-{i}" for i in range(2, 1000))))
    out = Path(config.out) if config.out else next(path for path in free if not path.exists())
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty; take another folder, or delete it")
    _title("1. Pretrain a base on the standard library of this Python")
    base = recipes["embedded"]()
    train(dataclasses.replace(base, out=str(out / "base"), steps=config.pretrain_steps, seed=config.seed, eval_every=0))
    data = Data(task=TASK, T=192, batch=10)
    task = load_task(data)
    floor = floors(task)
    _title(f"2. Tune it on {TASK}: {len(task.train):,} functions to learn from, {len(task.test)} unseen ones to score")
    console.print("   (the unseen functions stand in no row of pretraining or tuning)")
    results: dict[str, dict[str, Any]] = {}
    for name, (method, rate) in tunings().items():
        optim = Optim(lr=config.lr * rate, warmup=0.1, weight_decay=0.0)
        run = Run(
            recipe=name,
            phase="finetune",
            out=str(out / name),
            base=str(out / "base"),
            method=method,
            data=data,
            optim=optim,
            steps=config.steps,
            seed=config.seed,
            eval_tokens=16384,
            eval_base_first=not results,
            tensorboard=False,
        )
        results[name] = json.loads((train(run) / "summary.json").read_text("utf-8"))
    _title("3. Compare")
    rows = table(results, floor)
    show(rows, floor)
    plot(out, rows, floor, list(results))
    samples(out, results)
    (out / "table.json").write_text(json.dumps({"floors": floor, "rows": rows}, indent=1) + "\n", "utf-8")
    console.print(f"\n{format_time(time.perf_counter() - began)} in all. Written: {out}/table.json, {out}/score.png, "
                  f"{out}/losses.png, and a run directory a method", soft_wrap=True)  # fmt: skip
    return {"floors": floor, "rows": rows, "out": str(out)}


def table(results: dict[str, dict[str, Any]], floor: dict[str, float]) -> list[dict[str, Any]]:
    """One row a method: what it costs, what it scores, what the base forgot."""
    full, first = results["full"], results["full"]["before"]
    before = next(iter(first["scores"].values()))
    return [
        {
            "method": name,
            "trainable": r["trainable"],
            "share": r["trainable"] / r["base"],
            "relative_step": r["seconds_per_step"] / full["seconds_per_step"],
            "peak_bytes": r["step_peak_bytes"],
            "artifact_bytes": r["trainable_bytes"],
            "before": before,
            "after": next(iter(r["after"]["scores"].values())),
            "forgetting": r["after"]["held_out_loss"] - first["held_out_loss"],
        }
        for name, r in results.items()
    ]


def show(rows: list[dict[str, Any]], floor: dict[str, float]) -> None:
    """Print the table."""
    view = Table(box=None, pad_edge=False)
    heads = (
        "method",
        "trainable",
        "of the base",
        "step / full",
        "peak memory",
        "artifact",
        "base scores",
        "tuned",
        "forgetting",
    )
    for head in heads:
        view.add_column(head, justify="left" if head == "method" else "right")
    for r in rows:
        view.add_row(
            r["method"], f"{r['trainable']:,}", f"{r['share']:.2%}", f"{r['relative_step']:.2f}",
            format_bytes(r["peak_bytes"]), format_bytes(r["artifact_bytes"]), f"{r['before']:.3f}",
            f"{r['after']:.3f}", f"{r['forgetting']:+.3f}",
        )  # fmt: skip
    console.print(view)
    console.print(
        f"floors: majority class {floor['majority']:.3f}, unigram naive Bayes {floor['naive_bayes']:.3f}. "
        "Forgetting: change of the base's own held-out loss, nats a token.",
        soft_wrap=True,
    )


def plot(out: Path, rows: list[dict[str, Any]], floor: dict[str, float], names: list[str]) -> None:
    """score.png: score against trainable parameters; losses.png: the base's curve and every tuning's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for r in rows:
        axes.scatter(r["trainable"], r["after"], s=50)
        axes.annotate(r["method"], (r["trainable"], r["after"]), textcoords="offset points", xytext=(7, 4))
    for label, value in (
        ("naive Bayes", floor["naive_bayes"]),
        ("majority", floor["majority"]),
        ("base", rows[0]["before"]),
    ):
        axes.axhline(value, linestyle=":", color="gray")
        axes.annotate(label, (0.005, value), xycoords=("axes fraction", "data"), color="gray", va="bottom")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy on unseen functions", ylim=(0, None))
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(out / "score.png", dpi=130)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, runs, title in ((left, ["base"], "pretraining"), (right, names, "tuning")):
        for name in runs:
            points = [(m["step"], m["loss"]) for m in read_metrics(out / name) if "loss" in m]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set(xlabel="step", ylabel="loss, nats a token", title=title, yscale="linear" if axis is left else "log")
        axis.grid(alpha=0.3)
    right.legend()
    figure.savefig(out / "losses.png", dpi=130)


def samples(out: Path, results: dict[str, dict[str, Any]]) -> None:
    """The task before and after, and free text of the base before and after full tuning."""
    before = results["full"]["before"]["samples"]
    after = {name: results[name]["after"]["samples"] for name in ("full", "lora") if name in results}
    for i, sample in enumerate(before[:3]):
        tail = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        got = " · ".join(f"{name}: {rows[i]['got']!r}" for name, rows in after.items())
        console.print(f"\n... {' / '.join(tail.strip().splitlines()[-2:])}", style="dim", soft_wrap=True)
        console.print(
            f"  wanted {sample['wanted']!r} · base: {sample['got'][:40]!r} · {got}", soft_wrap=True, markup=False
        )
    for name in ("base", "full"):
        run = load_run(out / name)
        ids = [run.tokenizer.bos, *run.tokenizer.encode(OPENING)]
        model, bound, context = run.bound
        new = generate(model, bound, [ids], 48, stop=(run.tokenizer.eos,), key=jax.random.key(0), context=context)
        console.print(f"\n{name} goes on:", style="bold")
        console.print(OPENING + run.tokenizer.decode(new[0]), soft_wrap=True)


def _title(text: str) -> None:
    console.print(f"\n{text}", style="bold")
