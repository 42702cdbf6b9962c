"""Progress on stderr, metrics in metrics.jsonl, TensorBoard and Weights & Biases, and loss curves as PNG."""

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
from .chips import chip_of

console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else 120)


def peak_flops() -> float | None:
    """Return the peak bf16 FLOP/s of all devices together, or None for an unknown device."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops * jax.device_count() if chip else None


def step_flops(config: Any, total: int, trained: int, tokens: int, T: int) -> float:
    """Return the model FLOPs of a step, as in PaLM's MFU (arXiv:2204.02311): recomputation does not count.

    A token costs 4 FLOPs per base parameter (forward, and backward to the activations), 2 per trained parameter, and
    attention. The embedding table of an untied model is only looked up and costs nothing.
    """
    matrices = total - (0 if config.tied else config.V * config.D)
    return tokens * (4.0 * matrices + 2.0 * trained + 12.0 * config.L * config.N * config.H * T / 2)


def format_time(seconds: float) -> str:
    """Return seconds as '1:15', or from an hour on as '1:00:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def start_wandb(project: str, folder: Path) -> Any:
    """Start a Weights & Biases run named after the run folder."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise InputError("--wandb: the package is not installed; pip install 'graftax[wandb]'") from None
    return wandb.init(project=project, name=folder.name, config=json.loads((folder / "config.json").read_text("utf-8")))


class Metrics:
    """Write the metrics of one run."""

    def __init__(self, folder: Path, start: int, flops: float = 0.0, tensorboard: bool = False, wandb: str = ""):
        self.flops = flops
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            later = start + 1 if start else None  # drops what a killed run wrote after its checkpoint
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=later)
        self.wandb = start_wandb(wandb, folder) if wandb else None
        self.last, self.last_step = time.perf_counter(), start
        self.row: dict[str, Any] = {"loss": float("nan")}  # the last one that was written

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> dict[str, float]:
        """Write one object for the steps since the last call, and return it."""
        now = time.perf_counter()
        seconds, steps = now - self.last, step - self.last_step
        row = {
            "step": step,
            **metrics,
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds_per_step": round(seconds / steps, 5),
        }
        if self.flops and (peak := peak_flops()):
            row["mfu"] = round(self.flops * steps / seconds / peak, 4)
        self.write(row)
        self.last, self.last_step, self.row = now, step, row
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append an object to metrics.jsonl, and its numbers to TensorBoard and Weights & Biases."""
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
    """Metrics with a progress bar, or with lines where stderr is no terminal."""

    def __init__(
        self, folder: Path, title: str, steps: int, start: int, flops: float, tensorboard: bool, wandb: str = ""
    ):
        super().__init__(folder, start, flops, tensorboard, wandb)
        self.steps, self.start, self.title = steps, start, title
        text = TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f} {task.fields[text]}")
        self.bar = Progress(text, BarColumn(None), console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=steps, completed=start, text="")
        self.bar.start()
        self.start_time, self.printed_step = self.last, start

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> dict[str, float]:
        """Write and show the metrics of the steps since the last call."""
        row = super().step(step, metrics, tokens)
        left = (self.last - self.start_time) / (step - self.start) * (self.steps - step)
        mfu = f" · MFU {row['mfu']:.1%}" if "mfu" in row else ""
        text = (
            f"· loss {metrics['loss']:.4f} · {row['tokens_per_second']:,.0f} tokens/s{mfu} · {format_time(left)} left"
        )
        self.bar.update(self.task, completed=step, text=text)
        # Without a terminal, print about 20 lines per run.
        if not console.is_terminal and (step - self.printed_step >= self.steps / 20 or step == self.steps):
            console.print(f"{self.title} {step}/{self.steps} {text}")
            self.printed_step = step
        return row

    def note(self, step: int, evaluation: dict[str, Any]) -> None:
        """Print and write an evaluation, if it is not empty."""
        lines = []
        if domains := evaluation.get("held_out"):
            bits = " · ".join(f"{k} {v['bits_per_byte']:.3f} (zlib {v['zlib']:.2f})" for k, v in domains.items())
            lines.append(f"held-out loss {evaluation['held_out_loss']:.4f} · bits per byte: {bits}")
        if "valid_loss" in evaluation:
            lines.append(f"validation loss of the task {evaluation['valid_loss']:.4f}")
        if scores := evaluation.get("scores"):
            lines.append(" · ".join(f"{name} {score:.4f}" for name, score in scores.items()))
        for line in lines:
            console.print(f"step {step}: {line}", soft_wrap=True)
        if evaluation:
            self.write({"step": step, **evaluation})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block (an evaluation, a save) from the rate and the time left."""
        start = time.perf_counter()
        yield
        pause = time.perf_counter() - start
        self.last, self.start_time = self.last + pause, self.start_time + pause

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.stop()
        super().close()


class NoLog:
    """The log of every process but process 0: it writes nothing."""

    def __init__(self, *_: Any): ...

    def step(self, *_: Any) -> None: ...

    def note(self, *_: Any) -> None: ...

    def paused(self) -> Any:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def close(self) -> None: ...


def cut_metrics(folder: Path, step: int) -> None:
    """Drop what a killed run wrote to metrics.jsonl after the checkpoint of this step."""
    path, kept = folder / "metrics.jsonl", []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def plot_losses(path: Path, curves: dict[str, list[tuple[int, float]]], title: str) -> None:
    """Plot loss against step, one line per curve, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 130) -> None:
    """Write a matplotlib figure as a PNG file, atomically."""
    png = io.BytesIO()
    figure.savefig(png, dpi=dpi)
    atomic_write(path, png.getvalue())
