"""Progress for people (stderr), metrics for programs (metrics.jsonl, TensorBoard), and the loss curve as a picture."""

import contextlib
import importlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .. import InputError
from ..atomic import atomic_write
from .plan.roofline import chip_of

console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else 120)


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together in bf16, where it is known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops * jax.device_count() if chip else None


def step_flops(config: Any, total: int, trained: int, tokens: int, T: int) -> float:
    """Model FLOPs of a step: a token costs 4 a base parameter (forward, states backward), 2 a trained one, attention.

    The table of an untied model is only looked up; recomputation does not count (PaLM's MFU, arXiv:2204.02311).
    """
    matrices = total - (0 if config.tied else config.V * config.D)
    return tokens * (4.0 * matrices + 2.0 * trained + 12.0 * config.L * config.N * config.H * T / 2)


def clock(seconds: float) -> str:
    """75 -> '1:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def start_wandb(project: str, folder: Path) -> Any:
    """A Weights & Biases run of the run directory."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise InputError("--wandb: the package is not installed; pip install 'graftax[wandb]'") from None
    return wandb.init(project=project, name=folder.name, config=json.loads((folder / "config.json").read_text("utf-8")))


class Metrics:
    """One run's metric files."""

    def __init__(self, folder: Path, start: int, flops: float = 0.0, tensorboard: bool = False, wandb: str = ""):
        self.flops = flops
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            later = start + 1 if start else None  # what a killed run wrote after its checkpoint counts no more
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=later)
        self.wandb = start_wandb(wandb, folder) if wandb else None
        self.last, self.at = time.perf_counter(), start
        self.row: dict[str, Any] = {"loss": float("nan")}  # the last

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> dict[str, float]:
        """Write one object for the steps since the last; returns it."""
        now = time.perf_counter()
        row = {"step": step, **metrics, "tokens_per_second": round(tokens / (now - self.last), 1),
               "seconds_per_step": round((now - self.last) / (step - self.at), 5)}  # fmt: skip
        if self.flops and (peak := peak_flops()):
            row["mfu"] = round(self.flops * (step - self.at) / (now - self.last) / peak, 4)
        self.write(row)
        self.last, self.at, self.row = now, step, row
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append an object to metrics.jsonl, and its numbers to TensorBoard."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, row["step"])
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if k != "samples"}, step=row["step"])

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


class Log(Metrics):
    """The same, with a progress bar (lines where there is no terminal)."""

    def __init__(
        self, folder: Path, title: str, steps: int, start: int, flops: float, tensorboard: bool, wandb: str = ""
    ):
        super().__init__(folder, start, flops, tensorboard, wandb)
        self.steps, self.start, self.title = steps, start, title
        text = TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f} {task.fields[text]}")
        self.bar = Progress(text, BarColumn(None), console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=steps, completed=start, text="")
        self.bar.start()
        self.began, self.spoken = self.last, start

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> dict[str, float]:
        """Write and show the steps since the last."""
        row = super().step(step, metrics, tokens)
        left = (self.last - self.began) / (step - self.start) * (self.steps - step)
        mfu = f" · MFU {row['mfu']:.1%}" if "mfu" in row else ""
        text = f"· loss {metrics['loss']:.4f} · {row['tokens_per_second']:,.0f} tokens/s{mfu} · {clock(left)} left"
        self.bar.update(self.task, completed=step, text=text)
        # Without a terminal: about 20 lines a run.
        if not console.is_terminal and (step - self.spoken >= self.steps / 20 or step == self.steps):
            console.print(f"{self.title} {step}/{self.steps} {text}")
            self.spoken = step
        return row

    def note(self, step: int, found: dict[str, Any]) -> None:
        """Say and write an evaluation."""
        if held := found.get("held_out"):
            bits = " · ".join(f"{k} {v['bits_per_byte']:.3f} (zlib {v['zlib']:.2f})" for k, v in held.items())
            said = f"held-out loss {found['held_out_loss']:.4f} · bits per byte: {bits}"
            console.print(f"step {step}: {said}", soft_wrap=True)
        if "valid_loss" in found:
            console.print(f"step {step}: validation loss of the task {found['valid_loss']:.4f}")
        if scores := found.get("scores"):
            console.print(f"step {step}: " + " · ".join(f"{k} {v:.4f}" for k, v in scores.items()), soft_wrap=True)
        if found:
            self.write({"step": step, **found})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens here (an evaluation, a save) from the rate and the time left."""
        stopped = time.perf_counter()
        yield
        gap = time.perf_counter() - stopped
        self.last, self.began = self.last + gap, self.began + gap

    def close(self) -> None:
        """Close bar and files."""
        self.bar.stop()
        super().close()


class NoLog:
    """The log of every process but the first."""

    def __init__(self, *_: Any): ...

    def step(self, *_: Any) -> None: ...

    def note(self, *_: Any) -> None: ...

    def paused(self) -> Any:
        """Nothing to leave out."""
        return contextlib.nullcontext()

    def close(self) -> None: ...


def cut_metrics(folder: Path, step: int) -> None:
    """Drop what a killed run wrote after its checkpoint of this step, or half wrote: no step is there twice."""
    path, kept = folder / "metrics.jsonl", []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def plot_losses(path: Path, curves: dict[str, list[tuple[int, float]]], title: str) -> None:
    """A PNG of loss against step, one line a curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 130) -> None:
    """A figure as a PNG file, whole or not there."""
    made = io.BytesIO()
    figure.savefig(made, dpi=dpi)
    atomic_write(path, made.getvalue())
