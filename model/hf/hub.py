"""Model folders by name: a local folder, or a model on the Hugging Face hub, which is downloaded."""

import difflib
import os
import re
from pathlib import Path

from ... import InputError
from .files import COMPANION_FILES, INDEX, WEIGHTS, no_safetensors_message, shard_names

_TEMPLATES = "additional_chat_templates/*.jinja"


def is_hub_id(name: str) -> bool:
    """Return whether a name is a hub id, `owner/name` or `owner/name@revision`, and no file or folder here."""
    return bool(re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", name)) and not Path(name).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a hub id into (`owner/name`, revision or None); any other name has no revision."""
    repo, _, revision = name.partition("@") if is_hub_id(name) else (name, "", "")
    return repo, revision or None


def did_you_mean_folder(name: str | Path) -> str:
    """`; did you mean runs/base?` with the folder of the most similar path, or an empty string.

    Digits must agree, because names of models differ by them.
    """
    folder = Path(Path(name).anchor)
    for part in Path(name).relative_to(folder).parts:
        if not (folder / part).is_dir():
            siblings = [p.name for p in folder.iterdir() if p.is_dir()] if os.access(folder, os.R_OK) else []
            close = difflib.get_close_matches(part, siblings, 1, 0.75)
            if not close or re.sub(r"\D", "", close[0]) != re.sub(r"\D", "", part):
                return ""
            part = close[0]
        folder /= part
    return f"; did you mean {folder}?"


def fetch_checkpoint(name: str) -> Path:
    """The folder of a local checkpoint, or of a hub id `owner/name` or `owner/name@revision`, downloaded if needed.

    A token is read from HF_TOKEN only, and is never written. Raises InputError if there is no such folder or model.
    """
    if not is_hub_id(name):
        if not Path(name).is_dir():
            raise InputError(f"{name}: no such folder, and not a hub id (owner/name){did_you_mean_folder(name)}")
        return Path(name)
    if "@" not in name and (hint := did_you_mean_folder(name)):  # a misspelt folder should not reach the network
        raise InputError(f"{name}: no such folder{hint} For a model of this name on the hub give {name}@main")
    import huggingface_hub

    repo, revision = split_revision(name)
    token = os.environ.get("HF_TOKEN") or False  # False: do not use the token of a stored login

    def download(*patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=list(patterns))
        )

    try:
        folder = download("config.json", WEIGHTS, INDEX, *COMPANION_FILES, _TEMPLATES)
        if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
            download(*shard_names(folder / INDEX))
        if not any(folder.glob("*.safetensors")):
            files = huggingface_hub.list_repo_files(repo, revision=revision, token=token)
            raise InputError(no_safetensors_message(name, files))
    except InputError:
        raise
    except Exception as error:  # the errors of the hub have no common base class
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"{name}: no such folder, and as a hub id: {type(error).__name__}: {first_line} "
            "(a gated model needs HF_TOKEN)"
        ) from None
    return folder
