"""Names and kinds of the files in run folders."""

import hashlib
import json
from pathlib import Path

from ... import InputError
from ...model.hf.files import is_hub_id, nearest_folder

LOCK = "lock"


def is_hugging_face(name: str | Path) -> bool:
    """Whether a name is a Hugging Face folder, or a hub id that no folder here has."""
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and (b'"model_type"' in config.read_bytes() or any(path.glob("*.safetensors*")))
    return is_hub_id(str(name))


def check_run(folder: str | Path) -> Path:
    """The folder, if it is a run directory."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "is no run directory and no Hugging Face model: it has no config.json"
        gone = f"does not exist{nearest_folder(folder)}"
        raise InputError(
            f"{folder} {what if folder.exists() else gone}; give the folder that `graftax pretrain` or "
            "`graftax finetune` printed, a folder with config.json and safetensors, or a hub id owner/name"
        )
    return folder


def resolve_path(name: str | Path) -> str:
    """A base's name as a run writes it down: a folder by its whole path, so that it is found from anywhere."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is what HF PEFT's save_pretrained wrote."""
    return (Path(folder) / CONFIG).is_file()


def folder_digest(folder: Path) -> str:
    """What a folder of a base holds, by the names and sizes of its files and what its manifests say."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors"))
    said = [(p.name, p.read_text("utf-8") if p.name == "manifest.json" else p.stat().st_size) for p in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
