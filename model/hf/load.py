"""Read Hugging Face checkpoints to (Config, params), streamed onto the mesh."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...strict_json import read_json
from ..config import Config
from ..init import shapes_of
from ..sharding import shardings
from ..tree import is_stacked, named, nested
from .config import config_from_hf
from .families import BUFFERS, Source, families, tensor_sources
from .files import DTYPES, Tensor, read_index
from .hub import fetch_checkpoint

_ALIGNMENT = 64  # bytes: jax uses a numpy buffer that begins at such an address without a copy


def load(
    folder: str | Path, dtype: Any = None, mesh: Any = None, each: Callable[[str, Any], Any] | None = None
) -> tuple[Config, dict[str, Any]]:
    """(Config, params) of a folder with config.json and safetensors, or of a hub id; layers stacked.

    dtype: of the parameters; None keeps that of each parameter on disk.
    mesh: the parameters are laid out on it, and only the slices on this process's devices are read. On a CPU no
    parameter exists twice.
    each: replaces each parameter by each(path, array) as soon as it is read.
    Raises InputError for an unknown architecture, key or dtype, and lists missing, unexpected and misshapen tensors.
    """
    folder = fetch_checkpoint(str(folder))
    config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = _parameters_only(config, read_index(folder))
    sources, expected = tensor_sources(config)
    _check_tensors(folder, expected, tensors, config)
    shapes = shapes_of(config)
    split = named(shardings(mesh, shapes)) if mesh is not None else {}
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {}
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for path, leaf in named(shapes).items():
            leaf_dtype = jnp.dtype(_disk_dtype([tensors[s.name] for s in sources[path]]) if dtype is None else dtype)

            def read(index: Any, path: str = path, dtype: Any = leaf_dtype, shape: Any = leaf.shape) -> np.ndarray:
                return _read_slice(sources[path], tensors, is_stacked(path), shape, index, dtype, pool)

            array = jax.make_array_from_callback(leaf.shape, split.get(path, one_device), read)
            params[path] = each(path, array) if each else array
    largest = max(params.values(), key=lambda x: x.size * x.dtype.itemsize).dtype.name
    return dataclasses.replace(config, param_dtype=largest, dtype=largest), nested(params)


def _disk_dtype(tensors: list[Tensor]) -> Any:
    """The dtype of a parameter made of these tensors; float64 becomes float32."""
    dtypes = [DTYPES[t.dtype] for t in tensors]
    return jnp.result_type(*(np.float32 if d is np.float64 else d for d in dtypes))


def _parameters_only(config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without buffers, and with the prefix that a model saved without its head leaves out."""
    tensors = {name: t for name, t in tensors.items() if not re.fullmatch(BUFFERS, name)}
    prefix = next(iter(families[config.family].names)).split(".")[0] + "."
    if tensors and not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name == "lm_head.weight" else prefix + name: t for name, t in tensors.items()}
    return tensors


def _check_tensors(folder: Path, expected: Mapping[str, Any], tensors: dict[str, Tensor], config: Config) -> None:
    """Raise InputError that lists every missing, unexpected, misshapen or non-float tensor."""
    head = tensors.pop("lm_head.weight") if config.tied and "lm_head.weight" in tensors else None
    present = [name for name in expected if name in tensors]
    problems = {
        "missing": sorted(set(expected) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(expected)),
        "of another shape": [f"{name} {list(tensors[name].shape)} (wanted {list(expected[name])})"
                             for name in present if tensors[name].shape != tuple(expected[name])],
        f"of a type that is not {'/'.join(DTYPES)}": [f"{name} {tensors[name].dtype}"
                                                      for name in present if tensors[name].dtype not in DTYPES],
    }  # fmt: skip
    bad = [f"{len(names)} {problem}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
           for problem, names in problems.items() if names]  # fmt: skip
    table = next(name for name, path in families[config.family].names.items() if path == "embed/table")
    if not bad and head is not None and not _equal(head, tensors[table]):
        bad.append(f"lm_head.weight differs from {table}, but config.json says they are tied")
    if bad:
        raise InputError(f"{folder}: config.json and the tensors disagree: {'; '.join(bad)}")


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = zip(a.chunks(0, a.shape[0]), b.chunks(0, b.shape[0]), strict=True)
    return all(np.array_equal(x, y) for (_, x), (_, y) in pairs)


def _read_slice(
    sources: list[Source], tensors: Mapping[str, Tensor], stacked: bool, shape: tuple[int, ...], index: Any,
    dtype: np.dtype, pool: ThreadPoolExecutor,
) -> np.ndarray:  # fmt: skip
    """The slice of a parameter that one device holds, read layer by layer in parallel; `index` has a slice per axis."""
    ranges = [range(n)[s] for n, s in zip(shape, index, strict=True)]
    out = _empty_aligned(tuple(map(len, ranges)), dtype)
    layers, ranges, places = (ranges[0], ranges[1:], out) if stacked else (range(1), ranges, out[None])
    jobs = [pool.submit(_read_layer, place, tensors[sources[layer].name], sources[layer], ranges)
            for place, layer in zip(places, layers, strict=True)]  # fmt: skip
    for job in jobs:
        job.result()
    return out


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _read_layer(out: np.ndarray, tensor: Tensor, source: Source, ranges: list[range]) -> None:
    """Read the part of a tensor at `ranges`, which are along our axes, into `out`."""
    *outer, last = ranges
    moved = [*outer, range(last.start + source.offset, last.stop + source.offset)]
    rows, *columns = moved[::-1] if source.transposed else moved
    for first, chunk in tensor.chunks(rows.start, rows.stop):
        part = chunk[:, columns[0].start : columns[0].stop] if columns else chunk
        start = first - rows.start
        place = out[:, start : start + len(part)].T if source.transposed else out[start : start + len(part)]
        if part.dtype == out.dtype and part.itemsize == 2:  # numpy copies its own types much faster than bfloat16
            part, place = part.view(np.uint16), place.view(np.uint16)
        for r in range(0, len(part), 64):  # few enough rows to stay in the cache while they are transposed
            place[r : r + 64] = part[r : r + 64]
