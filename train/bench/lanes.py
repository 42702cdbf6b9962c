"""`python -m graftax.train.bench.lanes`: K adapters as lanes of one step, against K runs in sequence (lanes.md)."""

import argparse
import dataclasses
import statistics
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...model import Config, Transformer, init, presets
from ...peft import partition
from ...peft.methods.lora import LoRA
from ..config import Data, Optim, Run
from ..experiments.sweep.programs import batch_shapes, lane_step
from ..machine import cpu_cores, cpu_name
from ..optim import make_optimizer
from ..step import init_state
from .table import RESULTS, write
from .timing import median_ratio, time_in_turns

LANES = (1, 2, 4, 8, 16)
# (name, architecture, rows, tokens per row): one that keeps two cores busy, and one that does not.
WORK = (("S, 8 x 256 tokens", presets["s"], 8, 256), ("demo, 1 x 32 tokens", presets["demo"], 1, 32))


def make_contenders(config: Config, B: int, T: int) -> dict[int, Any]:
    """Return {K lanes: (compiled step, state, frozen, batch, numbers)}; 0 is a run by itself, without vmap."""
    run = Run(phase="finetune", method=LoRA(), data=Data(T=T, batch=B), optim=Optim(), steps=100)
    model, key = Transformer(config), jax.random.key(0)
    frozen, trainable = partition(run.method, init(config, key), key)
    state = init_state(trainable, make_optimizer(run.optim, trainable, run.steps, run.method))
    ids = np.random.default_rng(0).integers(0, config.V, (B, T))
    batch = {name: jnp.ones(x.shape, x.dtype) for name, x in batch_shapes(run).items()}
    batch |= {"ids": jnp.asarray(ids, jnp.int32), "targets": jnp.asarray(ids, jnp.int32),
              "positions": jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))}  # fmt: skip
    single, contenders = lane_step(model, run), {}
    for K in (0, *LANES):
        step: Any = jax.vmap(single, in_axes=(0, None, 0, 0)) if K else single
        copies: Any = lambda x, K=K: jnp.stack([x] * K) if K else jnp.copy(x)  # noqa: E731
        args = (
            jax.tree.map(copies, state),
            frozen,
            jax.tree.map(copies, batch),
            {"optim.lr": copies(jnp.float32(1e-3))},
        )
        contenders[K] = (jax.jit(step, donate_argnums=0).lower(*args).compile(), *args)
    return contenders


def measure(contenders: dict[int, Any], rounds: int) -> dict[int, list[float]]:
    """Return {K: lane-steps per second of each round}. A run by itself takes more steps, for an equally long timing."""
    steps = {K: 1 if K else 4 for K in contenders}

    def train(K: int) -> None:
        step, state, *rest = contenders[K]
        for _ in range(steps[K]):
            state, _ = step(state, *rest)
        contenders[K] = (step, jax.block_until_ready(state), *rest)

    seconds = time_in_turns({K: partial(train, K) for K in contenders}, rounds)
    return {K: [max(K, 1) * steps[K] / s for s in times] for K, times in seconds.items()}


def table(name: str, contenders: dict[int, Any], rates: dict[int, list[float]]) -> str:
    """Return a table with a row for each K: its rate, the ratio to runs in sequence, and the compiler's memory."""
    lines = [
        f"### {name}",
        "",
        "| lanes | lane-steps/s | against runs in sequence | temporaries, MB |",
        "|--:|--:|--:|--:|",
    ]
    for K, values in rates.items():
        temporaries = contenders[K][0].memory_analysis().temp_size_in_bytes / 1e6
        ratio, label = median_ratio(values, rates[0]), str(K) if K else "a run by itself"
        lines.append(f"| {label} | {statistics.median(values):.2f} | {ratio:.2f} | {temporaries:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and print; --write puts the tables into lanes.md."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.lanes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", help="of the products and of the frozen base")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    device = cpu_name() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    sections = [f"{time.strftime('%Y-%m-%d')}, {cpu_cores()} cores, {device}, jax {version('jax')}, {args.dtype}.\n"]
    for name, config, B, T in WORK:
        config = dataclasses.replace(config, dtype=args.dtype, param_dtype=args.dtype)
        contenders = make_contenders(config, B, T)
        sections.append(table(name, contenders, measure(contenders, args.rounds)))
    print(text := "\n".join(sections))
    if args.write:
        write(text, "lanes", RESULTS / "lanes.md")


if __name__ == "__main__":
    main()
