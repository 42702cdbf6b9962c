"""`python -m graftax.train.bench.lanes`: K adapters as lanes of one step, against K runs in sequence (lanes.md)."""

import argparse
import dataclasses
import statistics
import time
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
from ..machine import cpu_name
from ..optim import make_optimizer
from ..step import init_state
from .peer import threads
from .table import RESULTS, write

LANES = (1, 2, 4, 8, 16)
# (name, architecture, rows, tokens of a row): one that fills two cores, and one that does not.
WORK = (("S, 8 x 256 tokens", presets["s"], 8, 256), ("demo, 1 x 32 tokens", presets["demo"], 1, 32))


def contenders(config: Config, B: int, T: int) -> dict[int, Any]:
    """{K: (compiled step, state, frozen, batch, numbers)}; 0 is a run by itself, without vmap."""
    run = Run(phase="finetune", method=LoRA(), data=Data(T=T, batch=B), optim=Optim(), steps=100)
    model, key = Transformer(config), jax.random.key(0)
    frozen, trainable = partition(run.method, init(config, key), key)
    state = init_state(trainable, make_optimizer(run.optim, trainable, run.steps, run.method))
    ids = np.random.default_rng(0).integers(0, config.V, (B, T))
    batch = {name: jnp.ones(x.shape, x.dtype) for name, x in batch_shapes(run).items()}
    batch |= {"ids": jnp.asarray(ids, jnp.int32), "targets": jnp.asarray(ids, jnp.int32),
              "positions": jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))}  # fmt: skip
    one, found = lane_step(model, run), {}
    for K in (0, *LANES):
        step: Any = jax.vmap(one, in_axes=(0, None, 0, 0)) if K else one
        many: Any = lambda x, K=K: jnp.stack([x] * K) if K else jnp.copy(x)  # noqa: E731
        given = (jax.tree.map(many, state), frozen, jax.tree.map(many, batch), {"optim.lr": many(jnp.float32(1e-3))})
        found[K] = (jax.jit(step, donate_argnums=0).lower(*given).compile(), *given)
    return found


def measure(live: dict[int, Any], rounds: int) -> dict[int, list[float]]:
    """{K: lane-steps a second of each round}; all take turns, so that all meet the same noise."""
    rates: dict[int, list[float]] = {K: [] for K in live}
    for i in range(rounds + 1):
        for K, (step, state, *rest) in live.items():
            times = 1 if K else 4  # a run by itself takes more steps, so that its clock is as long
            began = time.perf_counter()
            for _ in range(times):
                state, _ = step(state, *rest)
            jax.block_until_ready(state)
            live[K] = (step, state, *rest)
            if i:
                rates[K].append(max(K, 1) * times / (time.perf_counter() - began))
    return rates


def table(name: str, live: dict[int, Any], rates: dict[int, list[float]]) -> str:
    """A row a K: its rate, over that of runs one after another, and what the compiler says of its memory."""
    lines = [
        f"### {name}",
        "",
        "| lanes | lane-steps/s | against runs in sequence | temporaries, MB |",
        "|--:|--:|--:|--:|",
    ]
    for K, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates[0], strict=True))
        temp = live[K][0].memory_analysis().temp_size_in_bytes / 1e6
        shown = str(K) if K else "a run by itself"
        lines.append(f"| {shown} | {statistics.median(found):.2f} | {ratio:.2f} | {temp:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and print; --write puts the tables into lanes.md."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.lanes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", help="of the products and of the frozen base")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    device = cpu_name() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    said = [f"{time.strftime('%Y-%m-%d')}, {threads()} cores, {device}, jax {version('jax')}, {args.dtype}.\n"]
    for name, config, B, T in WORK:
        config = dataclasses.replace(config, dtype=args.dtype, param_dtype=args.dtype)
        live = contenders(config, B, T)
        said.append(table(name, live, measure(live, args.rounds)))
    print(text := "\n".join(said))
    if args.write:
        write(text, "lanes", RESULTS / "lanes.md")


if __name__ == "__main__":
    main()
