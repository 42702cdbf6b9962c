"""`python -m graftax.train.bench.load`: time and peak memory of reading a Hugging Face checkpoint.

Write random bfloat16 weights with the shapes of a preset as shards, and read them in another process (Linux).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ...model import presets
from ...model.hf.config import config_to_hf
from ...model.hf.families import tensor_sources
from ...model.hf.files import write_tensors

_READ = r"""
import json, re, sys, time
import jax
from graftax.model.hf import load
jax.devices()
most = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
own = most()
began = time.perf_counter()
config, params = load(sys.argv[1])
jax.block_until_ready(params)
seconds = time.perf_counter() - began
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"bytes": size, "seconds": seconds, "peak": most(), "before": own}))
"""


def make(folder: Path, preset: str) -> None:
    """Write a checkpoint of random bfloat16 numbers; each tensor is generated when it is written."""
    config = presets[preset]
    rng = np.random.default_rng(0)
    _, tensors = tensor_sources(config)
    kinds = {name: (shape, np.dtype(jnp.bfloat16)) for name, shape in tensors.items()}
    noise = (0.02 * rng.standard_normal(1 << 20)).astype(jnp.bfloat16)
    write_tensors(folder, kinds, lambda name: np.resize(noise, tensors[name]), 2_000_000_000)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")), "utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write a checkpoint, read it in another process, and print one line."""
    parser = argparse.ArgumentParser("python -m graftax.train.bench.load", description=__doc__)
    parser.add_argument("--preset", default="llama-3.2-1b", choices=[k for k, c in presets.items() if c.family])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        make(Path(work), args.preset)
        done = subprocess.run([sys.executable, "-c", _READ, work], check=True, capture_output=True, text=True)
    got = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{args.preset}: {got['bytes'] / 1e9:.3f} GB of weights read in {got['seconds']:.1f} s "
        f"({got['seconds'] / got['bytes'] * 1e9:.2f} s/GB), peak RSS {got['peak'] / 1e9:.3f} GB "
        f"= {got['peak'] / got['bytes']:.2f} x the weights ({got['before'] / 1e9:.2f} GB before reading)"
    )


if __name__ == "__main__":
    main()
