"""Safetensors on disk: tensors read by slices, and shards written one tensor at a time."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...strict_json import read_json, unique_keys

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANION_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_CHUNK_BYTES = 4 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

TensorSpec = tuple[tuple[int, ...], np.dtype]  # (shape, dtype)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor in a file.

    It is read with plain reads. The slices of the safetensors library are views of a memory map, whose pages count as
    resident memory: reading a file of 512 MB in pieces takes 529 MB that way, 25 MB this way, in the same time.
    """

    file: Path
    dtype: str  # in the spelling of safetensors
    shape: tuple[int, ...]
    begin: int  # its first byte in the file

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of the rows [start, stop), at most 4 MiB at a time; rows of a vector are elements."""
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        dtype = np.dtype(DTYPES[self.dtype])
        step = max(_CHUNK_BYTES // (width * dtype.itemsize), 1)
        with open(self.file, "rb", buffering=0) as file:
            for row in range(start, stop, step):
                rows = np.empty((min(step, stop - row), *self.shape[1:]), dtype)
                file.seek(self.begin + row * width * dtype.itemsize)
                unread = rows.reshape(-1).view(np.uint8).data
                while len(unread):
                    if not (n := file.readinto(unread)):
                        raise InputError(f"{self.file}: ends in the middle of a tensor; it changed while it was read")
                    unread = unread[n:]
                yield row, rows


def output_folder(folder: str | Path) -> Path:
    """The path of a folder to write, with links resolved. Raises InputError if it exists and is not empty."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{folder} is not an empty folder; take another")
    return path.resolve() if path.is_symlink() or not path.name else path


# --- reading ---


def read_index(folder: Path) -> dict[str, Tensor]:
    """{name: Tensor} of a folder: of model.safetensors or, if there is none, of the shards of the index.

    Raises InputError for a pickle, a missing or damaged shard, and an index that disagrees with its shards.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not index.is_file():
        raise InputError(no_safetensors_message(folder, sorted(p.name for p in folder.iterdir())))
    tensors: dict[str, Tensor] = {}
    names, shard_of = shard_names(index), read_json(index)["weight_map"]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{index}: names {name}, which is not there; the download is incomplete")
        shard = read_header(folder / name)
        if misplaced := [t for t in shard if shard_of.get(t) != name]:
            raise InputError(f"{folder / name}: holds {misplaced[0]}, which the index does not place there")
        tensors |= shard
    if missing := [t for t in shard_of if t not in tensors]:
        raise InputError(f"{index}: places {missing[0]} in {shard_of[missing[0]]}, which does not hold it")
    return tensors


def shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises InputError for a bad index, and for a name that leads out of its folder."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(v, str) for v in shard_of.values()):
        raise InputError(f"{index}: has no weight_map of tensor names to files")
    names = sorted(set(shard_of.values()))
    if bad := [name for name in names if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name)]:
        raise InputError(
            f"{index}: names the file {bad[0]!r}; wanted the plain name of a .safetensors file in its folder"
        )
    return names


def no_safetensors_message(folder: Any, files: list[str]) -> str:
    """The error for a folder with these files, none of which holds safetensors."""
    if pickle := next((name for name in files if name.endswith(_PICKLES)), None):
        return (
            f"{folder}: has no safetensors, and {pickle} is a pickle, which runs code when it is read; "
            "convert it where you trust it, with save_pretrained(..., safe_serialization=True)"
        )
    return f"{folder}: has neither {WEIGHTS} nor {INDEX}"


def read_header(path: Path) -> dict[str, Tensor]:
    """{name: Tensor} of one file. The safetensors library validates the header, but does not tell the offsets."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tree = json.loads(file.read(size), object_pairs_hook=unique_keys)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    tree.pop("__metadata__", None)
    return {
        name: Tensor(path, t["dtype"], tuple(t["shape"]), 8 + size + t["data_offsets"][0]) for name, t in tree.items()
    }


# --- writing ---


def write_tensors(
    folder: Path, tensors: Mapping[str, TensorSpec], make: Callable[[str], np.ndarray], shard_bytes: int
) -> None:
    """Write tensors as shards of at most `shard_bytes`, with an index if they are several. `make` is called in turn."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=_nbytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )  # fmt: skip
    for file, names in split.filename_to_tensors.items():
        _write_shard(folder / file, {name: tensors[name] for name in names}, make)
    if split.is_sharded:
        tree = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(tree, indent=1) + "\n", "utf-8")


def _nbytes(spec: TensorSpec) -> int:
    shape, dtype = spec
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _write_shard(path: Path, tensors: Mapping[str, TensorSpec], make: Callable[[str], np.ndarray]) -> None:
    """Write one file: the length of the header, the header, and the bytes of the tensors in its order.

    The safetensors library would need all tensors of the file in memory; this holds one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    offset, names = 0, {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    for name, (shape, dtype) in tensors.items():
        end = offset + _nbytes((shape, dtype))
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, (shape, dtype) in tensors.items():
            array = make(name)
            assert array.shape == tuple(shape), (name, array.shape, shape)
            file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
