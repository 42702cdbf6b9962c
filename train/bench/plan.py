"""`python -m graftax.train.bench.plan`: memory as `graftax plan` predicts it, as compiled, and as a run takes it.

Each case is a process of its own with a host device for each device of its mesh; it runs three steps on random weights.
"""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...model import init, shapes_of
from ...model.quantize import quantize
from ...model.sharding import put_batch, shardings
from ...peft import methods
from ..config import Data, Run
from ..machine import cpu_name
from ..plan.planner import compile_from_shapes, make_plan, resolve_architecture
from ..plan.topology import parse_topology
from ..setup import BATCH_DTYPES, base_shapes, layout
from .table import RESULTS, write


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset, a method and a mesh."""

    name: str
    preset: str
    method: str
    mesh: tuple[int, ...]
    batch: int
    remat: Any
    stacked: bool = True
    quantize: Any = ""
    accumulate: int = 1
    chunk: int = 8192

    @property
    def run(self) -> Run:
        """The run of this case."""
        layers: Any = "stacked" if self.stacked else "unrolled"
        return Run(
            phase="finetune", base=self.preset, method=methods[self.method](), mesh=self.mesh, layers=layers,
            remat=self.remat, quantize=self.quantize, accumulate=self.accumulate, chunk=self.chunk, steps=100,
            data=Data(T=256, batch=self.batch),
        )  # fmt: skip


CASES = [
    Case("full, one device", "s", "subset", (1, 1, 1), 8, "full"),
    Case("full, nothing recomputed", "s", "subset", (8, 1, 1), 16, "none"),
    Case("full, fsdp 8", "m", "subset", (1, 8, 1), 8, "full"),
    Case("full, 2 x 2 x 2", "s", "subset", (2, 2, 2), 8, "full"),
    Case("LoRA, products kept", "s", "lora", (1, 1, 1), 8, "dots"),
    Case("LoRA, fsdp 4, two parts", "m", "lora", (1, 4, 1), 8, "full", accumulate=2, chunk=512),
    Case("DoRA, 2 x 1 x 2", "m", "dora", (2, 1, 2), 8, "dots"),
    Case("prefix, fsdp 4", "m", "prefix", (1, 4, 1), 8, "full"),
    Case("LoRA on int8, fsdp 2", "m", "lora", (1, 2, 1), 4, "full", quantize="int8"),
    Case("LoRA on nf4", "m", "lora", (1, 1, 1), 4, "full", quantize="nf4"),
    Case("LoRA, context 4", "s", "lora", (1, 1, 1, 4), 4, "dots"),
    Case("full, unrolled, nothing recomputed", "s", "subset", (1, 1, 1), 8, "none", stacked=False),
]


def resident(field: str) -> int:
    """Return VmRSS or VmHWM (the peak) of this process in bytes (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def measure(case: Case) -> dict[str, Any]:
    """Predict, compile, and run three steps. Return bytes per device, but of all devices for what was run."""
    target = parse_topology(f"cpu:{math.prod(case.mesh)}")
    predicted, compiled = make_plan(case.run, target, compiling=False), make_plan(case.run, target)
    run, config = resolve_architecture(case.run)
    mesh = target.mesh(case.mesh)
    with jax.set_mesh(mesh):
        placed = layout(run, mesh, base_shapes(run, config))
        step = compile_from_shapes(run, config, mesh, placed)
        params = jax.jit(init, static_argnums=0, out_shardings=shardings(mesh, shapes_of(config)))(
            config, jax.random.key(0))  # fmt: skip
        params = quantize(params, run.quantize) if run.quantize else params
        frozen, state = jax.jit(placed.begin, out_shardings=placed.shardings)(params)
        jax.block_until_ready((frozen, state))
        del params
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        put, shape = put_batch(mesh), (run.data.batch, run.data.T)
        for i in range(3):
            rows = np.random.default_rng(i).integers(1, config.V, shape)
            batch = {
                k: np.ones(shape, v) if k in ("weights", "segments") else rows.astype(v)
                for k, v in BATCH_DTYPES.items()
            }
            batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
            state, metrics = step(state, frozen, put(batch))
            jax.block_until_ready(metrics)
    temporaries = compiled["temporaries"]
    return {"model": predicted["bytes"]["total"], "compiled": compiled["arguments"] + temporaries,
            "temporaries": temporaries, "all_temporaries": temporaries * target.n,
            "rss_growth": resident("VmHWM") - before}  # fmt: skip


def table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Return the results as Markdown, in MiB."""
    head = ["case", "base", "mesh", "rows", "remat", "predicted", "compiled", "of which temporary", "difference",
            "temporaries of all devices", "RSS grew by", "difference"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|---|" + "--:|" * (len(head) - 5)]
    for case, r in rows:
        mib = {k: v / 2**20 for k, v in r.items()}
        lines.append("| " + " | ".join([
            case.name, case.preset, "x".join(map(str, case.mesh)), str(case.batch), case.remat,
            f"{mib['model']:.1f}", f"{mib['compiled']:.1f}", f"{mib['temporaries']:.1f}",
            f"{r['model'] / r['compiled'] - 1:+.1%}", f"{mib['all_temporaries']:.0f}", f"{mib['rss_growth']:.0f}",
            f"{r['rss_growth'] / r['all_temporaries'] - 1:+.0%}",
        ]) + " |")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the cases, each in its own process, and print the table; `--write` puts it into plan.md."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.plan", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/plan.md")
    parser.add_argument("--case", type=int, default=-1, help="measure this one alone, as JSON")
    args = parser.parse_args(argv)
    if args.case >= 0:
        print(json.dumps(measure(CASES[args.case])))
        return
    rows = []
    for i, case in enumerate(CASES):
        command = [sys.executable, "-m", "graftax.train.bench.plan", "--case", str(i)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append((case, json.loads(done.stdout.splitlines()[-1])))
        print(case.name, rows[-1][1], file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if args.write:
        write(f"{cpu_name()}; jax {jax.__version__}.\n\n{text}\n", "plan", RESULTS / "plan.md")


if __name__ == "__main__":
    main()
