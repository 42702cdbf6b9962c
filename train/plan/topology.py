"""The devices that a plan is for: `v5e:4x4`, `gpu:h200x8`, `cpu:8`, with a compiler for them where there is one."""

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
from ..chips import CHIPS, GPUS, TPUS, Chip, chip_of, cpu_chip
from ..config import did_you_mean

TOPOLOGY_FORMS = f"one of {', '.join(f'{t}:AxB' for t in TPUS)} (v4, v5p: AxBxC), gpu:h200x8, cpu:8"


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a plan is for."""

    name: str
    chip: Chip
    n: int
    platform: str
    devices: Any = None  # None: there is no compiler for them here
    source: str = ""  # the compiler, or why there is none

    def mesh(self, shape: tuple[int, ...]) -> Any:
        """Return a mesh of the devices; without a compiler an abstract one, which has only sizes."""
        mesh = make_mesh(shape, self.devices or [_Device(i) for i in range(self.n)])
        return mesh if self.devices else AbstractMesh(tuple(mesh.shape.values()), AXES, (AxisType.Auto,) * len(AXES))


class _Device:
    """A device known only by its number."""

    platform = "none"

    def __init__(self, number: int):
        self.id = number


def parse_topology(name: str) -> Target:
    """Return the devices of a topology's name; "" means those here. Raises InputError for an unknown name."""
    if not name:
        devices = jax.devices()
        n, platform = len(devices), devices[0].platform
        chip = chip_of(devices[0].device_kind) or cpu_chip(n)
        return Target(f"{platform}:{n}", chip, n, platform, devices, _xla(platform))
    family, _, size = name.partition(":")
    if family in TPUS and re.fullmatch(r"\d+(x\d+)*", size):
        return _tpu(name, family, math.prod(map(int, size.split("x"))))
    if family == "gpu" and (match := re.fullmatch(r"([a-z0-9]+?)x(\d+)", size)) and match[1] in GPUS:
        return _gpu(name, CHIPS[match[1]], int(match[2]))
    if family == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return Target(name, cpu_chip(int(size)), int(size), "cpu", _host_devices(int(size)), _xla("cpu"))
    raise InputError(f"--topology {name!r}{did_you_mean(family, (*TPUS, 'gpu', 'cpu'))}: expected {TOPOLOGY_FORMS}")


def _xla(platform: str) -> str:
    return f"XLA for {platform}, jaxlib {version('jaxlib')}"


def _gpu(name: str, chip: Chip, n: int) -> Target:
    """Return n GPUs, with a compiler if this machine has as many of that kind."""
    with contextlib.suppress(RuntimeError):
        devices = [d for d in jax.devices("gpu") if chip_of(d.device_kind) == chip][:n]
        if len(devices) == n:
            return Target(name, chip, n, "gpu", devices, _xla("gpu"))
    return Target(name, chip, n, "gpu", None, f"no compiler: this machine does not have {n} x {chip.name}")


def _host_devices(n: int) -> list[Any]:
    """Return n devices of this machine's CPU; their number is fixed when JAX starts."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise InputError(f"--topology cpu:{n}: this process started with {len(devices)} device(s); start it with "
                         f"XLA_FLAGS=--xla_force_host_platform_device_count={n}")  # fmt: skip
    return devices[:n]


def _tpu(name: str, family: str, n: int) -> Target:
    """Return a TPU slice, for which libtpu compiles ahead of time where it is installed."""
    library = libtpu()
    if not library:
        reason = "no compiler: libtpu is not installed (pip install 'graftax[tpu]')"
        return Target(name, CHIPS[family], n, "tpu", None, reason)
    from jax.experimental import topologies

    # These replace the answers of the metadata server of a TPU machine, and silence the library.
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{family}-{n}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LIBRARY_PATH": library,
    }
    for key, value in environment.items():
        os.environ.setdefault(key, value)
    try:
        with silence_stderr():
            # A device of v4 is a chip of two cores.
            cores: Any = {"chip_config_name": "megacore"} if family == "v4" else {}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices
    except Exception as error:  # libtpu has many exceptions for an unknown slice
        raise InputError(
            f"--topology {name}: libtpu does not know this slice: {str(error).splitlines()[0][:200]}"
        ) from None
    return Target(name, CHIPS[family], len(devices), "tpu", list(devices), f"libtpu {_libtpu_version(library)}")


def libtpu() -> str:
    """Return the path of libtpu.so: $TPU_LIBRARY_PATH or that of the package; "" if there is none."""
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return path if Path(path).is_file() else ""
    try:
        return importlib.import_module("libtpu").get_library_path()
    except ImportError:
        return ""


def _libtpu_version(library: str) -> str:
    """Return the version of libtpu, from the metadata in the folder of the package."""
    metadata = sorted(Path(library).parents[1].glob("libtpu-*.dist-info"))
    with contextlib.suppress(PackageNotFoundError):
        return metadata[-1].name.split("-")[1].removesuffix(".dist") if metadata else version("libtpu")
    return "of unknown version"


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard stderr, including what C++ libraries write to the file descriptor."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
