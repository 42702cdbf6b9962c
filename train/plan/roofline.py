"""Accelerators by name, and the time that a step takes at best on them."""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

GiB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do: FLOP/s in bf16 without sparsity, bytes of memory that a program may use, bytes/s of that
    memory, and bytes/s that it sends over its links while a ring runs over one mesh axis."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    half: float = 1.0  # what of the FLOP/s is left in fp32


# TPUs: cloud.google.com/tpu/docs (system architecture of each); memory is what XLA lets a program have, as its error
# message says it; links: both directions of one torus axis, "How to Scale Your Model" (Austin et al., 2025), table of
# TPU specs. A product of fp32 is by default one pass in bf16 on a TPU, and TF32 on a GPU.
# GPUs: NVIDIA's data sheets of the SXM parts; links: NVLink, one direction.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GiB, 1228e9, 90e9),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GiB, 819e9, 90e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GiB, 2765e9, 180e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GiB, 1640e9, 180e9),
    "a100": Chip("NVIDIA A100 80GB", 312e12, 80e9, 2039e9, 300e9, 0.5),
    "h100": Chip("NVIDIA H100 SXM", 989e12, 80e9, 3350e9, 450e9, 0.5),
    "h200": Chip("NVIDIA H200 SXM", 989e12, 141e9, 4800e9, 450e9, 0.5),
    "b200": Chip("NVIDIA B200", 2250e12, 180e9, 7700e9, 900e9, 0.5),
}
TPUS, GPUS = ("v4", "v5e", "v5p", "v6e"), ("a100", "h100", "h200", "b200")


def cpu_chip(n: int) -> Chip:
    """One of n devices that share this machine: its FLOP/s in fp32 by timing a product of 1024 x 1024, its memory."""
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, x))
    began = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(multiply(x, x))
    flops = 3 * 2 * 1024**3 / (time.perf_counter() - began)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Two channels of DDR4; copies between devices are copies in memory.
    return Chip("CPU of this machine", flops / n, total / n, 20e9 / n, 10e9 / n)


def chip_of(kind: str) -> Chip | None:
    """The chip of a device's `device_kind`."""
    found = {"v5 lite": "v5e", "v6 lite": "v6e"} | {name: name for name in CHIPS} | {"tpu v5": "v5p"}
    return next((CHIPS[name] for said, name in found.items() if said in kind.lower()), None)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a step needs for its products, for its memory traffic, and for its collectives."""

    compute: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """All three at once: no step is faster."""
        return max(self.compute, self.memory, self.links)

    @property
    def expected(self) -> float:
        """Collectives after computation, products and memory traffic at once: nothing hides the links."""
        return max(self.compute, self.memory) + self.links


def times(chip: Chip, flops: float, moved: float, sent: float, dtype: Any) -> Times:
    """The roofline of one device: FLOPs / peak, bytes through memory / bandwidth, bytes sent / link."""
    peak = chip.flops * (chip.half if jnp.dtype(dtype).itemsize > 2 else 1.0)
    return Times(flops / peak, moved / chip.bandwidth, sent / chip.links)
