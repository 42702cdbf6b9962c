"""HF PEFT adapters <-> (method, trainable): adapter_config.json and adapter_model.safetensors, both ways."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...model import Config
from ...model.hf.files import output_folder, read_header
from ...model.pattern import pattern_source
from ...strict_json import read_json
from ..base import Method
from .build import build
from .constants import ask, constants, held, joined, parted, remember
from .entries import entries, filled, kind_of
from .types import complete
from .write import config_of, plain

__all__ = ["load", "method_from_config", "save", "type_of"]

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def method_from_config(adapter_config: Mapping[str, Any], config: Config) -> Method:
    """The method of an HF adapter_config.json, HF PEFT's defaults filled in: `peft.count(it, config)` is its count.

    Raises InputError for a type, a key or a target that is not known. What an adapter file holds besides what trains
    (VeRA's projections, SHiRA's places) is drawn from a seed here; `load` takes the file's.
    """
    c = complete(adapter_config, CONFIG)
    with pattern_source(CONFIG):
        return build(c, config, CONFIG)


def load(folder: str | Path, config: Config, params: Any) -> tuple[Method, Any]:
    """(method, trainable) of an HF PEFT folder, for a base in either layout.

    A P-tuning or prefix file holds what its MLP gave, so it is a plain Prompt or Prefix here. Raises InputError that
    lists missing, unexpected and mis-shaped tensors, for a pickle, and for what would make the logits others than HF's.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: has no {CONFIG}; give the folder that save_pretrained wrote")
    c = complete(read_json(folder / CONFIG), str(folder / CONFIG))
    tensors = read(folder)
    with pattern_source(folder / CONFIG):
        method = build(ask(c, tensors), config, str(folder / CONFIG))
    structure = jax.eval_shape(method.init, jax.random.key(0), params)
    tensors = parted(c, tensors, structure, folder)
    found = entries(method, structure, config)
    method, tensors, tables = constants(method, c, tensors, found, structure, params, folder)
    agree(folder, {e.name: tuple(e.of(structure).shape) for e in found}, tensors)
    remember(method, tables)
    return method, filled(structure, found, tensors)


def save(
    folder: str | Path, config: Config, method: Method, trainable: Any, base: str = "", params: Any = None
) -> None:
    """Write an adapter as PeftModel.save_pretrained does; `base` is the model's name, for whoever loads it; of a hub
    id `owner/name@revision` the revision is written under its own key.

    The file has the tables beside an adapted one too, as HF's has: those of the base's `params`, or without them those
    of the file that `load` took the method from. Raises InputError for a method that HF PEFT does not have, and where
    the tables are in neither of the two (`dataclasses.replace` drops a file's); nothing is left then.
    """
    folder, whole = output_folder(folder), config_of(method, trainable, config, base)
    tensors = named_tensors(config, method, trainable)
    method, trainable = plain(method, trainable, config)
    tensors |= held(method, trainable, config, entries(method, trainable, config), params)
    from safetensors.numpy import save as packed  # its save_file makes files that only their owner can read

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}
    (folder / FILE).write_bytes(packed(arrays, {"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", "utf-8")


def type_of(method: Method) -> str:
    """HF PEFT's name for a method's type; empty if it has none."""
    return "LN_TUNING" if type(method).__name__ == "LNTuning" else kind_of(method)


def named_tensors(config: Config, method: Method, trainable: Any, gradient: bool = False) -> dict[str, np.ndarray]:
    """{name in an adapter file: array, fp32} of a trainable tree; or of its gradient, that of the file's arrays."""
    method, trainable = plain(method, trainable, config)
    found = entries(method, trainable, config)
    return joined({e.name: np.asarray(e.of(trainable, gradient), np.float32) for e in found})


def read(folder: Path) -> dict[str, np.ndarray]:
    """{name: array} of an adapter's safetensors; InputError for anything else."""
    if not (folder / FILE).is_file():
        pickled = [p.name for p in folder.glob("*.bin")]
        why = f"{pickled[0]} is a pickle, which can run code: save it with safe_serialization=True" if pickled else ""
        raise InputError(f"{folder}: has no {FILE}{'; ' + why if why else ''}")
    read_header(folder / FILE)
    from safetensors.flax import load_file

    found = {name: np.asarray(x) for name, x in load_file(folder / FILE).items()}
    for name, x in found.items():
        if not jnp.issubdtype(x.dtype, jnp.floating) and not name.endswith("indices"):
            raise InputError(f"{folder / FILE}: {name} is {x.dtype}; floats are wanted, save the adapter in float32")
        if not np.isfinite(x).all():
            raise InputError(f"{folder / FILE}: {name} holds NaN or infinity: its training failed; take an earlier one")
    return found


def agree(folder: Path, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]) -> None:
    """InputError that lists what a file lacks, has too much, or in another shape."""
    lists = {
        "missing": sorted(set(wanted) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(wanted)),
        "of another shape": [f"{n} {list(tensors[n].shape)} (wanted {list(shape)})" for n, shape in wanted.items()
                             if n in tensors and tensors[n].shape != shape],
    }  # fmt: skip
    bad = [f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
           for what, names in lists.items() if names]  # fmt: skip
    if bad:
        raise InputError(
            f"{folder / FILE}: {'; '.join(bad)}. Is this the adapter of another base, or were names "
            "changed? Those that save_pretrained writes are wanted"
        )
