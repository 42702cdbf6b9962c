"""Where a run comes from: each phase's record, carried in the manifests of all that was made of it."""

import dataclasses
import functools
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from ... import InputError
from ...bounds import Checked
from ..progress import console

KEPT = "lineage.json"  # beside a model that is no run directory


@functools.cache
def code() -> str:
    """The commit of this code, with `+` if files differ from it; "" for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def values(manifest: dict[str, Any]) -> str:
    """sha256 over the digests of what a checkpoint trained: of its values, without reading them."""
    leaves = manifest.get("leaves", {}).get("trainable", {})
    pairs = sorted((path, leaf["sha256"]) for path, leaf in leaves.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest() if pairs else ""


def record(folder: Any, run: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one phase: what ran, on which data, what it stood on, and the digest of what it made."""
    return {
        "run": str(Path(folder).resolve()),
        "phase": {"merged": "merge", "imported": "import"}.get(run.recipe, run.phase),
        "recipe": run.recipe,
        "method": type(run.method).__name__.lower(),
        "step": manifest.get("step", 0),
        "seed": run.seed,
        "values": values(manifest),
        **{key: manifest.get(key, "") for key in ("base", "data", "tokenizer", "versions", "code")},
    }


def chain(folder: Any, run: Any, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a run and of all before it, the oldest first."""
    return [*manifest.get("lineage", []), record(folder, run, manifest)]


def kept(folder: Path) -> list[dict[str, Any]]:
    """The chain that `graftax export` wrote beside a model; [] for one from elsewhere, or if it cannot be read."""
    try:
        found = json.loads((folder / KEPT).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    whole = isinstance(found, list) and all(isinstance(r, dict) and "phase" in r for r in found)
    return found if whole else []


def keep(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the chain beside a model."""
    (folder / KEPT).write_text(json.dumps(records, indent=1) + "\n", "utf-8")


def run_status(entry: dict[str, Any]) -> str:
    """What has become of the run that a record is of: `unchanged`, `changed since`, or `not here`."""
    from .checkpoint import CheckpointWriter

    checkpoints = CheckpointWriter(Path(entry["run"]) / "checkpoints")
    if not entry["values"]:
        return "" if Path(entry["run"]).exists() else "not here"
    if entry["step"] not in checkpoints.steps():
        return "not here"
    return "unchanged" if values(checkpoints.manifest(entry["step"])) == entry["values"] else "changed since"


@dataclasses.dataclass(frozen=True)
class Lineage(Checked):
    """The chain a run came by, oldest first, from what each phase wrote down; no array is read.

    Example: graftax lineage runs/merged
    """

    folder: Annotated[str, tyro.conf.Positional]

    def run(self) -> dict[str, Any]:
        """Print the chain; returns {"chain": its records, each with `today`}."""
        records = [entry | {"today": run_status(entry)} for entry in self.read()]
        table = Table("phase", "run", "recipe · method", "step", "values", "on base", "data", "code", "today", box=None)
        for r in records:
            made = " ".join(f"{k} {v}" for k, v in (r["versions"] or {}).items() if k in ("graftax", "jax"))
            cells = (r["phase"], Path(r["run"]).name, f"{r['recipe']} · {r['method']}", str(r["step"]))
            digests = (r[key][:12] or "-" for key in ("values", "base", "data"))
            table.add_row(*cells, *digests, " ".join((r["code"], made)).strip(), r["today"])
        console.print(table)
        console.print("values: sha256 over the digests of what the phase trained · base: the fingerprint it stood on")
        return {"chain": records}

    def read(self) -> list[dict[str, Any]]:
        """The records of a run directory, of a Hugging Face folder, or of an adapter's."""
        from ..config import from_json
        from .checkpoint import CheckpointWriter
        from .load import check_run, is_hugging_face

        folder = Path(self.folder)
        if found := kept(folder):
            return found
        if (folder / "adapter_config.json").exists() or is_hugging_face(folder):
            blank = dict.fromkeys(("recipe", "method", "values", "base", "data", "tokenizer", "versions", "code"), "")
            return [{"run": str(folder), "phase": "import", "step": 0, "seed": 0, **blank}]
        folder = check_run(folder)
        checkpoints = CheckpointWriter(folder / "checkpoints")
        if not checkpoints.steps():
            raise InputError(f"{folder}: no checkpoint was saved, so nothing came of this run")
        return chain(folder, from_json(folder / "config.json"), checkpoints.manifest(checkpoints.steps()[-1]))
