"""Where a run comes from: a record of each phase, carried in the manifests of everything made from it."""

import functools
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from ... import InputError
from ..config import from_json
from .checkpoint import CheckpointReader
from .files import CHECKPOINTS, CONFIG, LINEAGE, check_run, is_adapter, is_hugging_face


@functools.cache
def code_version() -> str:
    """Return the git commit of this code, with `+` if files differ from it; "" for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def trained_digest(manifest: dict[str, Any]) -> str:
    """Return a sha256 of the values that a checkpoint trained, computed from the digests in its manifest."""
    leaves = manifest.get("leaves", {}).get("trainable", {})
    pairs = sorted((path, leaf["sha256"]) for path, leaf in leaves.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest() if pairs else ""


def phase_record(folder: Any, run: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the record of one phase: what ran, on which data and base, and the digest of what it trained."""
    return {
        "run": str(Path(folder).resolve()),
        "phase": {"merged": "merge", "imported": "import"}.get(run.recipe, run.phase),
        "recipe": run.recipe,
        "method": type(run.method).__name__.lower(),
        "step": manifest.get("step", 0),
        "seed": run.seed,
        "values": trained_digest(manifest),
        **{key: manifest.get(key, "") for key in ("base", "data", "tokenizer", "versions", "code")},
    }


def lineage_of(folder: Any, run: Any, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a loaded run and of all its predecessors, the oldest first."""
    return [*manifest.get("lineage", []), phase_record(folder, run, manifest)]


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """Return the records that `graftax export` wrote beside a model; [] if there are none or they are unreadable."""
    try:
        records = json.loads((folder / LINEAGE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    valid = isinstance(records, list) and all(isinstance(record, dict) and "phase" in record for record in records)
    return records if valid else []


def write_lineage(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the records beside a model."""
    (folder / LINEAGE).write_text(json.dumps(records, indent=1) + "\n", "utf-8")


def find_lineage(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run folder, a Hugging Face folder or an adapter's folder, without reading an array.

    Raises InputError for another kind of folder, and for a run without a checkpoint.
    """
    if records := read_lineage(folder):
        return records
    if is_adapter(folder) or is_hugging_face(folder):
        blank = dict.fromkeys(("recipe", "method", "values", "base", "data", "tokenizer", "versions", "code"), "")
        return [{"run": str(folder), "phase": "import", "step": 0, "seed": 0, **blank}]
    checkpoints = CheckpointReader(check_run(folder) / CHECKPOINTS)
    if not (steps := checkpoints.steps()):
        raise InputError(f"{folder}: no checkpoint was saved, so nothing was made from this run")
    return lineage_of(folder, from_json(folder / CONFIG), checkpoints.manifest(steps[-1]))


def run_status(record: dict[str, Any]) -> str:
    """Return the present state of a recorded run: `unchanged`, `changed since`, `not here`, or "" if unknown."""
    if not record["values"]:
        return "" if Path(record["run"]).exists() else "not here"
    checkpoints = CheckpointReader(Path(record["run"]) / CHECKPOINTS)
    if record["step"] not in checkpoints.steps():
        return "not here"
    return "unchanged" if trained_digest(checkpoints.manifest(record["step"])) == record["values"] else "changed since"
