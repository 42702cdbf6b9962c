"""`python -m graftax.train.bench.quantize BASE`: bytes and loss of a base in int8 and nf4 (quantize.md)."""

import argparse
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...model import forward, presets, shapes_of
from ...model.quantize import MATRICES, kinds, quantize
from ...model.tree import name_and_layers, named
from ...peft.methods.lora import LoRA
from ..config import Data, Optim, Run
from ..evaluate import held_out_losses, mean_loss
from ..progress import read_metrics
from ..runs.load import load_run
from ..runs.report import nbytes
from ..runs.train import train


def sizes(shapes: Any) -> list[str]:
    """Return table rows: bytes of the matrices and of all parameters, as bfloat16, int8 and nf4."""
    half = jax.eval_shape(lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), shapes)
    lines, first = [], (0, 0)
    for kind in ("", *kinds):
        made = named(jax.eval_shape(partial(quantize, kind=kind), half) if kind else half)
        matrices = nbytes([w for path, w in made.items() if re.fullmatch(MATRICES, name_and_layers(path)[0])])
        first = first if kind else (matrices, nbytes(made))
        mb = [f"{n / 1e6:,.2f} MB ({n / of:.4f})" for n, of in zip((matrices, nbytes(made)), first, strict=True)]
        lines.append(f"| {kind or 'bfloat16'} | {' | '.join(mb)} |")
    return lines


def errors(base: str, rows: int = 20) -> list[str]:
    """Return table rows: error of the logits over their root mean square, and held-out loss of each domain."""
    lines, plain, before = [], None, {}
    for kind in ("", *kinds):
        got = load_run(base, quantize=kind)
        ids = np.stack([row["ids"] for domain in got.held_out.values() for row in domain.rows[:rows]])
        model, bound, _ = got.bound
        logits = np.asarray(jax.jit(lambda b, ids, m=model: forward(m, b, ids)[0])(bound, ids), np.float32)
        held = {name: d["loss"] for name, d in held_out_losses(*got.bound, got.held_out, 8).items()}
        if plain is None:
            plain, before = logits, held
            losses = [f"{x:.4f}" for x in (*held.values(), np.mean([*held.values()]))]
            lines.append(f"| none | 0 | 0 | {' | '.join(losses)} |")
            continue
        size = np.sqrt(np.mean(plain**2))
        rms, most = np.sqrt(np.mean((logits - plain) ** 2)) / size, np.abs(logits - plain).max() / size
        rise = [held[name] - before[name] for name in held]
        lines.append(f"| {kind} | {rms:.5f} | {most:.4f} | {' | '.join(f'{x:+.4f}' for x in (*rise, np.mean(rise)))} |")
    return [f"| base | rms | largest | {' | '.join(before)} | mean |", "|---|" + "--:|" * (len(before) + 3), *lines]


def tuned(base: str, root: str, task: str, steps: int) -> list[str]:
    """Return table rows: loss of LoRA training on each base, by quarters, and the rise of the held-out loss."""
    lines = []
    for kind in ("", *kinds):
        with tempfile.TemporaryDirectory() as out:
            run = Run(
                recipe="quantize", phase="finetune", base=base, out=f"{out}/run", method=LoRA(), quantize=kind,  # type: ignore[arg-type]
                data=Data(task=task, root=root, T=192, batch=8), optim=Optim(lr=5e-3, warmup=0.1, weight_decay=0.05),
                steps=steps, log_every=steps // 4, eval_rows=1, eval_tokens=8192, eval_base_first=False,
                tensorboard=False,
            )  # fmt: skip
            train(run)
            found = read_metrics(Path(run.out))
        losses = [f"{row['loss']:.4f}" for row in found if "loss" in row]
        held = [mean_loss(row["held_out"]) for row in found if "held_out" in row]
        lines.append(f"| {kind or 'none'} | {' | '.join(losses)} | {held[0]:.4f} | {held[-1] - held[0]:+.4f} |")
    return lines


def main() -> None:
    """Print the tables of quantize.md."""
    parser = argparse.ArgumentParser(prog="python -m graftax.train.bench.quantize", description=__doc__)
    parser.add_argument("base", help="a run directory with held-out rows")
    parser.add_argument("--root", default="", help="the folder of the task; empty: no training")
    parser.add_argument("--task", default="snips")
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    for name, shapes in ((args.base, shapes_of(load_run(args.base).config)),
                         ("llama-3.1-8b", shapes_of(presets["llama-3.1-8b"]))):  # fmt: skip
        print(f"\n{name}\n\n| stored as | matrices in the layers | with all else |\n|---|--:|--:|")
        print("\n".join(sizes(shapes)))
    print("\n" + "\n".join(errors(args.base)))
    if args.root:
        quarters = " | ".join(f"loss {i}/4" for i in (1, 2, 3, 4))
        print(f"\n| base | {quarters} | held-out before | rise |\n|---|{'--:|' * 6}")
        print("\n".join(tuned(args.base, args.root, args.task, args.steps)))


if __name__ == "__main__":
    main()
