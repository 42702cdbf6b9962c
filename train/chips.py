"""Accelerators by name: peak FLOP/s, memory, memory bandwidth and link bandwidth."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp

GiB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak rates of one device."""

    name: str
    flops: float  # FLOP/s in bf16, without sparsity
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes/s of that memory
    links: float  # bytes/s that the device sends while a ring runs over one mesh axis
    fp32_share: float = 1.0  # FLOP/s in fp32 over those in bf16


# TPUs: cloud.google.com/tpu/docs (system architecture of each). Memory is the limit in XLA's out-of-memory error.
# Links count both directions of one torus axis: "How to Scale Your Model" (Austin et al., 2025), table of TPU specs.
# By default a product of fp32 matrices is one pass in bf16 on a TPU, and TF32 on a GPU.
# GPUs: NVIDIA's data sheets of the SXM parts. Links count one direction of NVLink.
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
    """Return one of n devices that share this machine. Its FLOP/s are measured by a product of 1024 x 1024 matrices."""
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, x))
    began = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(multiply(x, x))
    flops = 3 * 2 * 1024**3 / (time.perf_counter() - began)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Bandwidth: two channels of DDR4. A copy between devices is a copy in memory.
    return Chip("CPU of this machine", flops / n, total / n, 20e9 / n, 10e9 / n)


def chip_of(kind: str) -> Chip | None:
    """Return the chip of a device's `device_kind`, or None for an unknown kind."""
    names = {"v5 lite": "v5e", "v6 lite": "v6e"} | {name: name for name in CHIPS} | {"tpu v5": "v5p"}
    return next((CHIPS[name] for part, name in names.items() if part in kind.lower()), None)
