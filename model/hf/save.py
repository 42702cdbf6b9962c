"""Write (Config, params) as a Hugging Face checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ...atomic import atomic_folder
from ...strict_json import read_json
from ..config import Config
from ..layout import restack
from ..tree import is_stacked, named
from .config import config_from_hf, config_to_hf, same_model
from .families import tensor_sources
from .files import COMPANION_FILES, output_folder, write_tensors


def save(
    folder: str | Path, config: Config, params: Any, like: str | Path | None = None, shard_bytes: int = 5_000_000_000,
    tokenizer_files: bool = True, **tokens: int | None,
) -> Path:  # fmt: skip
    """Write a base as transformers, vLLM and llama.cpp read it: config.json, shards with an index, tokenizer files.

    The folder appears once all of it is written. Dtypes are those of the parameters.
    like: the folder that the base came from; its config.json is kept if it still describes the same model and, with
    `tokenizer_files`, its tokenizer files are copied.
    tokens: further entries of config.json (bos_token_id=...).
    Raises InputError for a config that no family expresses, and for a folder that is not empty.
    """
    folder = output_folder(folder)
    flat = named(restack(params, dataclasses.replace(config, scan=True)))
    largest = max(flat.values(), key=lambda x: x.size * x.dtype.itemsize).dtype
    tree = config_to_hf(config, largest.name)
    if like and (Path(like) / "config.json").is_file():
        tree = _keep_original(tree, read_json(Path(like) / "config.json"))
    tree |= tokens
    sources, shapes = tensor_sources(dataclasses.replace(config, family=tree["model_type"]))
    if wrong := sorted(set(flat) ^ set(sources)):
        raise InputError(f"the parameters are not those of the config: {', '.join(wrong[:8])}")
    parts: dict[str, list[tuple[str, int]]] = {}  # tensor name -> [(path, layer)] along its output axis
    for path, layers in sources.items():
        for layer, source in enumerate(layers):
            parts.setdefault(source.name, []).append((path, layer))
    transposed = {source.name for layers in sources.values() for source in layers if source.transposed}

    def make(name: str) -> np.ndarray:
        arrays = [flat[path][layer] if is_stacked(path) else flat[path] for path, layer in parts[name]]
        whole = np.concatenate(arrays, axis=-1) if len(arrays) > 1 else np.asarray(arrays[0])
        return whole.T if name in transposed else whole

    specs = {name: (shape, np.dtype(flat[parts[name][0][0]].dtype)) for name, shape in shapes.items()}
    with atomic_folder(folder) as unfinished:
        write_tensors(unfinished, specs, make, shard_bytes)
        (unfinished / "config.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
        for file in [Path(like) / name for name in COMPANION_FILES] if like and tokenizer_files else []:
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
    return folder


def _keep_original(tree: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """The original config.json with the vocabulary and dtype of `tree`, if that describes the same model; or `tree`."""
    updated = {k: v for k, v in original.items() if k != "dtype"} | {k: tree[k] for k in ("vocab_size", "torch_dtype")}
    try:
        return updated if same_model(config_from_hf(updated), config_from_hf(tree)) else tree
    except InputError:
        return tree
