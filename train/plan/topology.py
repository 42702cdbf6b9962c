"""Where a plan is for: `v5e:4x4`, `gpu:h200x8`, `cpu:8`; its devices, if a compiler for them is at hand."""

import contextlib
import dataclasses
import importlib
import math
import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from ... import InputError
from ...model.sharding import AXES, make_mesh
from ..config import did_you_mean
from .roofline import CHIPS, GPUS, TPUS, Chip, chip_of, cpu_chip

WANTED = f"one of {', '.join(f'{t}:AxB' for t in TPUS)} (v4, v5p: AxBxC), gpu:h200x8, cpu:8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that a plan is for."""

    name: str
    chip: Chip
    n: int
    platform: str
    devices: Any = None  # None: no compiler for them here
    source: str = ""  # which compiler, or why there is none

    def mesh(self, shape: tuple[int, ...]) -> Any:
        """A mesh of the devices; without a compiler an abstract one, which has sizes alone."""
        stand_in = [_Device(i) for i in range(self.n)]
        mesh = make_mesh(shape, self.devices or stand_in)
        return mesh if self.devices else AbstractMesh(tuple(mesh.shape.values()), AXES, (AxisType.Auto,) * len(AXES))


class _Device:
    """A device of which only the number is known."""

    platform = "none"

    def __init__(self, number: int):
        self.id = number


def target(name: str) -> Target:
    """The devices of a topology's name; "" are those here. Raises InputError for a name that is none."""
    if not name:
        here = jax.devices()
        chip = chip_of(here[0].device_kind) or cpu_chip(len(here))
        return Target(f"{here[0].platform}:{len(here)}", chip, len(here), here[0].platform, here, _xla(here[0]))
    family, _, size = name.partition(":")
    if family in TPUS and re.fullmatch(r"\d+(x\d+)*", size):
        return _tpu(name, family, math.prod(map(int, size.split("x"))))
    if family == "gpu" and (found := re.fullmatch(r"([a-z0-9]+?)x(\d+)", size)) and found[1] in GPUS:
        return _gpu(name, CHIPS[found[1]], int(found[2]))
    if family == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        here = _host_devices(int(size))
        return Target(name, cpu_chip(int(size)), int(size), "cpu", here, _xla(here[0]))
    raise InputError(f"--topology {name!r}{did_you_mean(family, (*TPUS, 'gpu', 'cpu'))}: wanted {WANTED}")


def _xla(device: Any) -> str:
    return f"XLA for {device.platform}, jaxlib {version('jaxlib')}"


def _gpu(name: str, chip: Chip, n: int) -> Target:
    """GPUs, compiled for if as many of that kind are here."""
    with contextlib.suppress(RuntimeError):
        here = [d for d in jax.devices("gpu") if chip_of(d.device_kind) == chip][:n]
        if len(here) == n:
            return Target(name, chip, n, "gpu", here, _xla(here[0]))
    return Target(name, chip, n, "gpu", None, f"no compiler: {n} {chip.name} are not here")


def _host_devices(n: int) -> list[Any]:
    """n devices of this machine's CPU; they are made when jax starts."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", n)
    here = jax.devices("cpu")
    if len(here) < n:
        raise InputError(f"--topology cpu:{n}: this process began with {len(here)} device(s); start it with "
                         f"XLA_FLAGS=--xla_force_host_platform_device_count={n}")  # fmt: skip
    return here[:n]


def _tpu(name: str, family: str, n: int) -> Target:
    """A TPU slice, compiled for ahead of time by libtpu where that is installed."""
    library = libtpu()
    if not library:
        why = "no compiler: libtpu is not installed (pip install 'graftax[tpu]')"
        return Target(name, CHIPS[family], n, "tpu", None, why)
    from jax.experimental import topologies

    # What libtpu asks the metadata server of a TPU machine for; its worker is this one.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": f"{family}-{n}",
             "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
             "TPU_LIBRARY_PATH": library}  # fmt: skip
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    try:
        with silent():
            cores: Any = {"chip_config_name": "megacore"} if family == "v4" else {}  # a chip's two cores as one
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices
    except Exception as error:  # libtpu says in many ways that it knows no such slice
        raise InputError(f"--topology {name}: libtpu refuses it: {str(error).splitlines()[0][:200]}") from None
    return Target(name, CHIPS[family], len(devices), "tpu", list(devices), f"libtpu {_libtpu_version(library)}")


def libtpu() -> str:
    """The path of libtpu.so: $TPU_LIBRARY_PATH, or the package's; "" where there is none."""
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return path if Path(path).is_file() else ""
    try:
        return importlib.import_module("libtpu").get_library_path()
    except ImportError:
        return ""


def _libtpu_version(library: str) -> str:
    """The version of libtpu, from the metadata beside it."""
    beside = sorted(Path(library).parents[1].glob("libtpu-*.dist-info"))
    with contextlib.suppress(PackageNotFoundError):
        return beside[-1].name.split("-")[1].removesuffix(".dist") if beside else version("libtpu")
    return "of unknown version"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing on stderr, not even from libraries in C++, which write there whatever they are told."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
