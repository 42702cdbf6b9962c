"""Names of the files in a run folder, and what kind of folder one is."""

import hashlib
import json
from pathlib import Path

from ... import InputError
from ...model.hf.hub import did_you_mean_folder, is_hub_id

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
HELD_OUT = "held_out.npz"  # held-out rows of the base's domains
LOCK = "lock"  # names the one process that writes
LINEAGE = "lineage.json"  # beside an exported model, which has no manifest
ADAPTER_CONFIG = "adapter_config.json"  # of an adapter that HF PEFT wrote


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder was written by HF PEFT's save_pretrained."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def is_hugging_face(name: str | Path) -> bool:
    """Return whether a name is a Hugging Face folder, or a hub id that is not also a local path."""
    path = Path(name)
    if path.is_dir():
        config = path / CONFIG
        return config.is_file() and (b'"model_type"' in config.read_bytes() or any(path.glob("*.safetensors*")))
    return is_hub_id(str(name))


def check_run(folder: str | Path) -> Path:
    """Return the folder if it is a run folder. Raises InputError if it is not."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        problem = f"does not exist{did_you_mean_folder(folder)}"
        if folder.exists():
            problem = "is no run directory and no Hugging Face model: it has no config.json"
        raise InputError(
            f"{folder} {problem}; give the folder that `graftax pretrain` or `graftax finetune` printed, a folder "
            "with config.json and safetensors, or a hub id owner/name"
        )
    return folder


def resolve_path(name: str | Path) -> str:
    """Return a base's name as a run records it: the absolute path of a folder, so that it is found from anywhere."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def folder_digest(folder: Path) -> str:
    """Return a sha256 over the files of a base: the text of its manifests, the names and sizes of the other files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
    content = [(p.name, p.read_text("utf-8") if p.name == "manifest.json" else p.stat().st_size) for p in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
