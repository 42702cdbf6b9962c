"""Safetensors on disk: an index of tensors read by slices, and shards written one tensor at a time."""

import dataclasses
import difflib
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

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
COMPANION_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
           "generation_config.json")  # fmt: skip
TEMPLATES = ("additional_chat_templates/*.jinja",)
HUB_ID = r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?"
_CHUNK = 4 << 20  # bytes read at once
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor in a file. It is read with plain reads: the pages of a memory map would count as resident."""

    file: Path
    dtype: str  # as safetensors says it
    shape: tuple[int, ...]
    begin: int  # its first byte in the file

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of rows [start, stop), at most 4 MiB at a time; a vector's rows are its elements."""
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        kind = np.dtype(DTYPES[self.dtype])
        step = max(_CHUNK // (width * kind.itemsize), 1)
        with open(self.file, "rb", buffering=0) as file:
            for row in range(start, stop, step):
                rows = np.empty((min(step, stop - row), *self.shape[1:]), kind)
                file.seek(self.begin + row * width * kind.itemsize)
                view = rows.reshape(-1).view(np.uint8).data
                while len(view):
                    if not (n := file.readinto(view)):
                        raise InputError(f"{self.file}: ends in the middle of a tensor; it changed while it was read")
                    view = view[n:]
                yield row, rows


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id, `owner/name` or `owner/name@revision`, and no file or folder here."""
    return bool(re.fullmatch(HUB_ID, name)) and not Path(name).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """(`owner/name`, the revision or None) of a hub id; any other name as it is."""
    repo, _, revision = name.partition("@") if is_hub_id(name) else (name, "", "")
    return repo, revision or None


def did_you_mean_folder(name: str | Path) -> str:
    """`; did you mean runs/base?`: the folder whose path is spelt like one that does not exist, or nothing. Digits must
    agree, because names of models differ by them."""
    here = Path(Path(name).anchor)
    for part in Path(name).relative_to(here).parts:
        if not (here / part).is_dir():
            beside = [p.name for p in here.iterdir() if p.is_dir()] if os.access(here, os.R_OK) else []
            near = difflib.get_close_matches(part, beside, 1, 0.75)
            if not near or re.sub(r"\D", "", near[0]) != re.sub(r"\D", "", part):
                return ""
            part = near[0]
        here /= part
    return f"; did you mean {here}?"


def fetch_checkpoint(name: str) -> Path:
    """The folder of a local checkpoint, or of a hub id `owner/name` or `owner/name@revision`, downloaded if need be.

    A token is taken from HF_TOKEN alone and is written nowhere.
    """
    if not is_hub_id(name):
        if not Path(name).is_dir():
            raise InputError(f"{name}: no such folder, and not a hub id (owner/name){did_you_mean_folder(name)}")
        return Path(name)
    if "@" not in name and (near := did_you_mean_folder(name)):  # before any network is tried
        raise InputError(f"{name}: no such folder{near} For a model of this name on the hub give {name}@main")
    import huggingface_hub

    repo, revision = split_revision(name)
    token = os.environ.get("HF_TOKEN") or False  # False: not the one that a login has stored

    def get(*files: str) -> Path:
        args: Any = {"revision": revision, "token": token}
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(files), **args))

    try:
        found = get("config.json", "model.safetensors", "model.safetensors.index.json", *COMPANION_FILES, *TEMPLATES)
        listed = found / "model.safetensors.index.json"
        if listed.is_file() and not (found / "model.safetensors").is_file():
            get(*shard_names(listed))
        if not any(found.glob("*.safetensors")):
            held = huggingface_hub.list_repo_files(repo, revision=revision, token=token)
            raise InputError(_nothing(name, held))
    except InputError:
        raise
    except Exception as error:  # its errors have no common base
        text = str(error).strip().splitlines()
        raise InputError(f"{name}: no such folder, and as a hub id: {type(error).__name__}: {text[0] if text else ''} "
                         "(a gated model wants HF_TOKEN)") from None  # fmt: skip
    return found


def shard_names(listed: Path) -> list[str]:
    """The files that an index names. InputError: no index, or a name that is not plainly a file beside it."""
    where = read_json(listed).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) for v in where.values()):
        raise InputError(f"{listed}: has no weight_map of tensor names to files")
    names = sorted(set(where.values()))
    if bad := [n for n in names if not re.fullmatch(r"[\w][\w.-]*\.safetensors", n)]:
        raise InputError(
            f"{listed}: names the file {bad[0]!r}; a plain name of a .safetensors file beside it is wanted"
        )
    return names


def output_folder(folder: str | Path) -> Path:
    """A folder that may be made, or is empty; a link is followed. InputError if something is in it."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{folder} is not an empty folder; take another")
    return path.resolve() if path.is_symlink() or not path.name else path


def read_index(folder: Path) -> dict[str, Tensor]:
    """{name: Tensor} of a folder's safetensors: of the one file, or without it of those of the index, as transformers.

    InputError for a pickle, a missing or damaged shard, a bad index.
    """
    listed, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return read_header(whole)
    if not listed.is_file():
        raise InputError(_nothing(folder, sorted(p.name for p in folder.iterdir())))
    found: dict[str, Tensor] = {}
    names, where = shard_names(listed), read_json(listed)["weight_map"]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{listed}: names {name}, which is not there; the download is incomplete")
        held = read_header(folder / name)
        if astray := [t for t in held if where.get(t) != name]:
            raise InputError(f"{folder / name}: holds {astray[0]}, which the index does not place there")
        found |= held
    if lost := [t for t in where if t not in found]:
        raise InputError(f"{listed}: places {lost[0]} in {where[lost[0]]}, which does not hold it")
    return found


def _nothing(folder: Any, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (f"{folder}: has no safetensors, and {pickles[0]} is a pickle, which runs code when it is read; "
                "convert it where you trust it, with save_pretrained(..., safe_serialization=True)")  # fmt: skip
    return f"{folder}: has neither model.safetensors nor model.safetensors.index.json"


def read_header(path: Path) -> dict[str, Tensor]:
    """{name: Tensor} of one file, after the safetensors library has checked it."""
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


def write_tensors(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    make: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> list[str]:
    """Write {name: (shape, dtype)} as shards, each tensor made when its turn comes; returns the files' names."""
    shards: list[list[str]] = [[]]
    sizes = {n: int(np.prod(shape, dtype=np.int64)) * np.dtype(t).itemsize for n, (shape, t) in tensors.items()}
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    for file, held in zip(names, shards, strict=True):
        _write_shard(folder / file, {n: tensors[n] for n in held}, make)
    if count > 1:
        where = {n: file for file, held in zip(names, shards, strict=True) for n in held}
        tree = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(tree, indent=1) + "\n", "utf-8")
    return names


def _write_shard(path: Path, tensors: Mapping[str, Any], make: Callable[[str], np.ndarray]) -> None:
    """One file: the length of the header, the header, and the bytes of the tensors in its order."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this
    at, code = 0, {np.dtype(v): k for k, v in DTYPES.items()}
    for name, (shape, dtype) in tensors.items():
        end = at + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        tree[name] = {"dtype": code[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(tree, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, (shape, dtype) in tensors.items():
            array = make(name)
            assert array.shape == tuple(shape), (name, array.shape, shape)
            array = np.ascontiguousarray(array, dtype)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
