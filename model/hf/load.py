"""Hugging Face checkpoints <-> (Config, params): streamed onto the mesh, and written as transformers reads them."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...atomic import atomic_folder
from ..config import Config
from ..init import restack, shapes_of
from ..sharding import shardings
from ..tree import is_stacked, named, nested
from .config import config_from_hf, config_to_hf, same_model
from .families import BUFFERS, families
from .files import COMPANION_FILES, DTYPES, Tensor, output_folder, fetch_checkpoint, read_index, read_json, write_tensors

__all__ = ["config_from_hf", "config_to_hf", "fetch", "load", "save"]

_ALIGN = 64  # bytes: jax takes a numpy buffer that begins at such an address as it is, without a copy


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter of one layer lies: a tensor's name, and from which row (or column) of its output axis."""

    name: str
    offset: int
    turned: bool  # [out, in] on disk, [in, out] here


def sources(config: Config) -> tuple[dict[str, list[Source]], dict[str, tuple[int, ...]]]:
    """({our path: its source in each layer}, {their name: shape}) of a config whose family is known."""
    family, shapes = families[config.family], named(shapes_of(dataclasses.replace(config, scan=True)))
    found: dict[str, list[Source]] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    for theirs, ours in family.names.items():
        paths = ours.split()
        if not all(path in shapes for path in paths):
            continue
        stacked = is_stacked(paths[0])
        parts = [shapes[path].shape[stacked:] for path in paths]
        turned = len(parts[0]) == 2 and not paths[0].startswith("embed/")
        turned = turned and (not family.conv1d or paths[0] == "head/matrix")
        whole = (*parts[0][:-1], sum(part[-1] for part in parts))
        for layer in range(config.L) if stacked else [0]:
            name, at = theirs.format(layer), 0
            tensors[name] = whole[::-1] if turned else whole
            for path, part in zip(paths, parts, strict=True):
                found.setdefault(path, []).append(Source(name, at, turned))
                at += part[-1]
    assert not set(shapes) - set(found), f"{config.family} has no name for {set(shapes) - set(found)}"
    return found, tensors


def load(
    folder: str | Path, dtype: Any = None, mesh: Any = None, each: Callable[[str, Any], Any] | None = None
) -> tuple[Config, dict[str, Any]]:
    """(Config, params) of a folder with config.json and safetensors, or of a hub id; layers stacked.

    dtype: of the parameters; None keeps what each has on disk. mesh: the parameters are laid out on it by
    sharding.rules, and only the slices that its devices hold are read. On a CPU no parameter exists twice.
    each: with it each(path, array) is kept in place of a parameter as soon as that is read.
    Raises InputError for an architecture, key or dtype that is not known, and lists missing, unexpected and mis-shaped
    tensors.
    """
    folder = fetch_checkpoint(str(folder))
    config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    held = read_index(folder)
    held = _adapted(config, held)
    where, wanted = sources(config)
    _agree(folder, wanted, held, config)
    shapes = shapes_of(config)
    split = named(shardings(mesh, shapes)) if mesh is not None else {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {}
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for path, leaf in named(shapes).items():
            kinds = [DTYPES[held[s.name].dtype] for s in where[path]]
            kind = np.dtype(jnp.dtype(dtype) if dtype is not None else jnp.result_type(*_no64(kinds)))

            def block(at: Any, path: str = path, kind: np.dtype = kind, shape: Any = leaf.shape) -> np.ndarray:
                return _block(where[path], held, is_stacked(path), shape, at, kind, pool)

            array = jax.make_array_from_callback(leaf.shape, split.get(path, here), block)
            params[path] = each(path, array) if each else array
    stored = max(params.values(), key=lambda x: x.size * x.dtype.itemsize).dtype.name
    return dataclasses.replace(config, param_dtype=stored, dtype=stored), nested(params)


def _no64(kinds: list[Any]) -> list[Any]:
    return [np.float32 if k is np.float64 else k for k in kinds]


def _adapted(config: Config, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without buffers, and with the prefix that a model saved without its head leaves out."""
    held = {name: t for name, t in held.items() if not re.fullmatch(BUFFERS, name)}
    prefix = next(iter(families[config.family].names)).split(".")[0] + "."
    if held and not any(name.startswith(prefix) for name in held):
        held = {name if name == "lm_head.weight" else prefix + name: t for name, t in held.items()}
    return held


def _agree(folder: Path, wanted: Mapping[str, Any], held: dict[str, Tensor], config: Config) -> None:
    """InputError that lists every tensor that is missing, unexpected, of another shape, or of no float type."""
    head = held.pop("lm_head.weight") if config.tied and "lm_head.weight" in held else None
    missing, more = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    shapes = [f"{n} {list(held[n].shape)} (wanted {list(wanted[n])})" for n in wanted
              if n in held and held[n].shape != tuple(wanted[n])]  # fmt: skip
    kinds = [f"{n} {held[n].dtype}" for n in wanted if n in held and held[n].dtype not in DTYPES]
    bad = []
    for what, names in (("missing", missing), ("unexpected", more), ("of another shape", shapes),
                        (f"of a type that is not {'/'.join(DTYPES)}", kinds)):  # fmt: skip
        if names:
            bad.append(f"{len(names)} {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
    table = next(name for name, ours in families[config.family].names.items() if ours == "embed/table")
    if not bad and head is not None and not _equal(head, held[table]):
        bad.append(f"lm_head.weight differs from {table}, but config.json says they are tied")
    if bad:
        raise InputError(f"{folder}: config.json and the tensors disagree: {'; '.join(bad)}")


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = zip(a.chunks(0, a.shape[0]), b.chunks(0, b.shape[0]), strict=True)
    return all(np.array_equal(x[1], y[1]) for x, y in pairs)


def _block(where: list[Source], held: Mapping[str, Tensor], stacked: bool, shape: tuple[int, ...], at: Any,
           kind: np.dtype, pool: ThreadPoolExecutor) -> np.ndarray:  # fmt: skip
    """One device's part of a parameter: `at` gives a slice an axis; every layer is read into its place."""
    ranges = [range(n)[s] for n, s in zip(shape, at, strict=True)]
    out = _aligned(tuple(map(len, ranges)), kind)
    layers, inner = (ranges[0], ranges[1:]) if stacked else (range(1), ranges)
    places = out if stacked else out[None]
    jobs = [pool.submit(_fill, places[i], held[where[layer].name], where[layer], inner)
            for i, layer in enumerate(layers)]  # fmt: skip
    for job in jobs:
        job.result()
    return out


def _aligned(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(kind).reshape(shape)


def _fill(out: np.ndarray, tensor: Tensor, source: Source, ranges: list[range]) -> None:
    """Read the part of a tensor that `ranges` (of our axes) asks for into `out`."""
    moved = [*ranges[:-1], range(ranges[-1].start + source.offset, ranges[-1].stop + source.offset)]
    rows, *columns = moved[::-1] if source.turned else moved
    for first, chunk in tensor.chunks(rows.start, rows.stop):
        part = chunk[:, columns[0].start : columns[0].stop] if columns else chunk
        a = first - rows.start
        place = out[:, a : a + len(part)].T if source.turned else out[a : a + len(part)]
        if part.dtype == out.dtype and part.itemsize == 2:  # numpy copies its own types much faster than bfloat16
            part, place = part.view(np.uint16), place.view(np.uint16)
        for r in range(0, len(part), 64):  # rows that stay in the cache while they are turned
            place[r : r + 64] = part[r : r + 64]


def save(
    folder: str | Path, config: Config, params: Any, like: str | Path | None = None, shard_bytes: int = 5_000_000_000,
    tokenizer_files: bool = True, **tokens: int | None,
) -> Path:  # fmt: skip
    """Write a base as transformers, vLLM and llama.cpp read it: config.json, shards with an index, tokenizer files.

    `like`: the folder that the base came from; its config.json is kept where it says the same and, with
    `tokenizer_files`, its tokenizer files are copied. `tokens`: further entries of config.json (bos_token_id=...).
    Dtypes are those of the parameters.
    The folder appears when all of it is written.
    Raises InputError for a config that no family expresses and for a folder that is not empty.
    """
    folder = output_folder(folder)
    flat = named(restack(params, dataclasses.replace(config, scan=True)))
    stored = max(flat.values(), key=lambda x: x.size * x.dtype.itemsize).dtype
    tree = config_to_hf(config, stored.name)
    if like and (Path(like) / "config.json").is_file():
        tree = _kept(tree, read_json(Path(like) / "config.json"))
    tree |= tokens
    where, wanted = sources(dataclasses.replace(config, family=tree["model_type"]))
    if wrong := sorted(set(flat) ^ set(where)):
        raise InputError(f"the parameters are not those of the config: {', '.join(wrong[:8])}")
    pieces: dict[str, list[tuple[str, int]]] = {}
    for path, found in where.items():
        for layer, source in enumerate(found):
            pieces.setdefault(source.name, []).append((path, layer))
    turned = {s.name: s.turned for found in where.values() for s in found}

    def make(name: str) -> np.ndarray:
        parts = [flat[path][layer] if is_stacked(path) else flat[path] for path, layer in pieces[name]]
        whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else np.asarray(parts[0])
        return whole.T if turned[name] else whole

    kinds = {name: np.dtype(flat[parts[0][0]].dtype) for name, parts in pieces.items()}
    with atomic_folder(folder) as made:
        write_tensors(made, {name: (shape, kinds[name]) for name, shape in wanted.items()}, make, shard_bytes)
        (made / "config.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
        for file in [Path(like) / name for name in COMPANION_FILES] if like and tokenizer_files else []:
            if file.is_file():
                shutil.copyfile(file, made / file.name)
    return folder


def _kept(tree: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The config.json a base came with, if it still says what `tree` says; its vocabulary and dtype may differ."""
    changed = {k: tree[k] for k in ("vocab_size", "torch_dtype")}
    before = {k: v for k, v in before.items() if k != "dtype"} | changed
    try:
        return before if same_model(config_from_hf(before), config_from_hf(tree)) else tree
    except InputError:
        return tree
