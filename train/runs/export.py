"""Bases in and out: import, export, merge. What is written is read back and compared before it counts."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from ... import InputError
from ...atomic import atomic_folder
from ...bounds import Bounds, Checked, Positive
from ...data.tokenizers.added_tokens import add_tokens
from ...data.tokenizers.sentencepiece_bpe import for_transformers
from ...model import hf, resize
from ...model.hf.files import empty, fetch
from ...model.tree import named
from ...peft import Subset, merge
from . import adapters
from .adapters import Target
from .checkpoint import CheckpointWriter
from .manifest import fingerprint, leaf_digests, fingerprint_of
from ..config import to_json
from .equivalence import BOUNDS, base_logits, compare_logits, run_logits, probe_ids, main_dtype
from ..inputs import save_held_out
from .lineage import code_version, write_lineage
from ..progress import console
from .load import LoadedRun, load_hugging_face, load_run
from .files import is_hugging_face, resolve_path
from .manifest import describe_sidecars
from .tokenizer_files import write_tokenizer



def merged_params(got: LoadedRun, dtype: str) -> Any:
    """Base + adapter as one base, in `dtype`, or each parameter in the dtype that the base has it in."""
    merged = merge(got.method, got.params, got.trainable, dtype or None)
    return jax.tree.map(lambda m, b: m.astype(dtype or b.dtype), merged, got.params)


def write_base(
    out: Path, got: LoadedRun, params: Any, recipe: str, came: dict[str, Any], name: str = ""
) -> str:  # fmt: skip
    """A run directory that holds a base, to be known as `name`; returns its fingerprint."""
    stored = main_dtype(params)
    config = dataclasses.replace(got.config, param_dtype=stored)
    if config.family:  # what it is multiplied in is decided where it runs: runs.numerics
        config = dataclasses.replace(config, dtype=stored)
    run = dataclasses.replace(
        got.run, phase="pretrain", model=config, method=Subset("all"), base="", quantize="", recipe=recipe,
        out=name or str(out),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(to_json(run), "utf-8")
    got.tokenizer.save(out)
    save_held_out(out / "held_out.npz", got.held_out)
    left = ("step", "score", "versions", "leaves", "files", "accepted", "rows")
    meta = {k: v for k, v in got.manifest.items() if k not in left} | {
        "phase": "pretrain",
        "base": "",
        "code": code_version(),
        "config": json.loads(to_json(run)),
        "sidecars": describe_sidecars(out, got.tokenizer),
        **came,
    }
    checkpoints = CheckpointWriter(out / "checkpoints")
    checkpoints.save(got.manifest["step"], {"trainable": named(params)}, meta)
    checkpoints.close()
    return fingerprint(params)


def write_verified(out: Path, got: LoadedRun, dtype: str, bound: float, write: Callable[[Path, Any], Any]) -> dict[str, Any]:
    """Have `write(folder, params)` write base + adapter as one base, read that back, compare, and give it its name.

    One of the two models is in memory at a time. Raises InputError, and leaves nothing, if they differ too much.
    """
    ids = probe_ids(got)
    before, alone, merged = run_logits(got, ids), base_logits(got, ids), merged_params(got, dtype)
    with atomic_folder(out) as made:
        said, bound = write(made, merged), bound or BOUNDS[main_dtype(merged)]
        del merged, got
        what = f"{out} read back against what it was made of"
        found = compare_logits(before, run_logits(load_run(made), ids), bound, what, *alone)
    return {"out": str(out), **said, **found}






def base_name(got: LoadedRun, moved: str = "") -> str:
    """The name that an adapter's config gives its base: of an imported model while the parameters are those of the base
    by fingerprint, else the run that the adapter was tuned on. moved: where that is now."""
    name, found = resolve_path(moved or got.run.base), []

    def each(path: str, leaf: Any) -> Any:
        """Take one parameter's part of the fingerprint, and keep its shape alone."""
        found.extend(leaf_digests(path, leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    if is_hugging_face(name) or not (folder := hf_origin(got)):
        return name
    with contextlib.suppress(InputError):  # the model is damaged by now, or another one
        hf.load(folder, each=each)
    return got.manifest["imported"] if fingerprint_of(found) == got.manifest["base"] else name


def hf_origin(got: LoadedRun) -> Path | None:
    """The Hugging Face folder that a base came from, changed since or not, if it is still there."""
    name = got.manifest.get("imported", "")
    try:
        return fetch(name) if name and is_hugging_face(name) else None
    except InputError:
        return None


