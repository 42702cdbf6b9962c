"""Bases in and out of run folders. What is written is read back and compared before it gets its name."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...atomic import atomic_folder
from ...data.tokenizers import add_tokens, for_transformers
from ...model import hf, resize
from ...model.hf.hub import fetch_checkpoint
from ...model.tree import named
from ...peft import Method, Subset, merge
from ..config import to_json
from ..inputs import save_held_out
from ..progress import console
from .checkpoint import CheckpointWriter
from .equivalence import BOUNDS, base_logits, compare_logits, main_dtype, probe_ids, run_logits
from .files import CHECKPOINTS, CONFIG, HELD_OUT, is_hugging_face, resolve_path
from .lineage import code_version, write_lineage
from .load import load_run
from .loaded import LoadedRun
from .manifest import describe_sidecars, fingerprint, fingerprint_of, leaf_digests
from .tokenizer_files import write_tokenizer


def merged_params(loaded: LoadedRun, dtype: str) -> Any:
    """Return base and adapter as one base, in `dtype` or with each parameter in the base's dtype."""
    merged = merge(loaded.method, loaded.params, loaded.trainable, dtype or None)
    return jax.tree.map(lambda m, b: m.astype(dtype or b.dtype), merged, loaded.params)


def write_base(out: Path, loaded: LoadedRun, params: Any, recipe: str, meta: dict[str, Any], name: str = "") -> str:
    """Write a run folder that holds a base, and return its fingerprint.

    recipe: `merged` or `imported`. meta: further entries of the manifest. name: the folder's final path.
    """
    config = dataclasses.replace(loaded.config, param_dtype=main_dtype(params))
    if config.family:  # `with_compute_dtype` chooses the dtype of its products where it is loaded
        config = dataclasses.replace(config, dtype=config.param_dtype)
    run = dataclasses.replace(loaded.run, phase="pretrain", recipe=recipe, out=name or str(out), base="", quantize="")
    run = dataclasses.replace(run, model=config, method=Subset("all"))
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(to_json(run), "utf-8")
    loaded.tokenizer.save(out)
    save_held_out(out / HELD_OUT, loaded.held_out)
    replaced = ("step", "score", "versions", "leaves", "files", "accepted", "rows")
    kept = {k: v for k, v in loaded.manifest.items() if k not in replaced}
    kept |= {"phase": "pretrain", "base": "", "code": code_version(), "config": json.loads(to_json(run))}
    meta = kept | {"sidecars": describe_sidecars(out, loaded.tokenizer)} | meta
    with CheckpointWriter(out / CHECKPOINTS) as checkpoints:
        checkpoints.save(loaded.manifest["step"], {"trainable": named(params)}, meta)
    return fingerprint(params)


def write_hugging_face(out: Path, loaded: LoadedRun, params: Any, shard_bytes: int) -> None:
    """Write a base as transformers and vLLM read it: config.json, safetensors, tokenizer files, and its lineage."""
    origin, tokenizer = hf_origin(loaded), for_transformers(loaded.tokenizer)
    ids = {k: getattr(tokenizer, k) if f"{k}_token" in tokenizer.names else None for k in ("bos", "eos", "pad")}
    tokens = {} if origin else {f"{k}_token_id": i for k, i in ids.items()}
    hf.save(out, loaded.config, params, origin, shard_bytes, tokenizer_files=False, **tokens)
    write_tokenizer(out, loaded.tokenizer, loaded.tuned_on_chats or tokenizer is not loaded.tokenizer)
    write_lineage(out, loaded.lineage)


def write_verified(
    out: Path, loaded: LoadedRun, dtype: str, bound: float, write: Callable[[Path, Any], Any]
) -> dict[str, Any]:
    """Merge base and adapter, let `write(folder, params)` write them, read that back, compare, and name it `out`.

    Only one of the two models is in memory at a time. bound: the largest mean KL; 0: by the dtype. Raises InputError,
    and leaves nothing, if they differ by more.
    """
    ids = probe_ids(loaded)
    before, base, merged = run_logits(loaded, ids), base_logits(loaded, ids), merged_params(loaded, dtype)
    with atomic_folder(out) as folder:
        written, bound = write(folder, merged), bound or BOUNDS[main_dtype(merged)]
        del merged, loaded
        title = f"{out} read back against its source"
        comparison = compare_logits(before, run_logits(load_run(folder), ids), bound, title, *base)
    return {"out": str(out), **written, **comparison}


def compare_adapter(
    loaded: LoadedRun, method: Method, trainable: Any, bound: float = 0.0, title: str = ""
) -> dict[str, float]:
    """Compare a run with its adapter as it was read back. Raises InputError above `bound` (0: that of float32)."""
    ids, copy = probe_ids(loaded), dataclasses.replace(loaded, method=method, trainable=trainable)
    before, after = run_logits(loaded, ids), run_logits(copy, ids)
    return compare_logits(before, after, bound or BOUNDS["float32"], title, *base_logits(loaded, ids))


def base_name(loaded: LoadedRun, moved: str = "") -> str:
    """Return the name that an exported adapter's config gives its base.

    It is the imported model if its parameters still have the base's fingerprint, else the run that the adapter was
    tuned on. moved: where that run is now.
    """
    name, rows = resolve_path(moved or loaded.run.base), []

    def each(path: str, leaf: Any) -> Any:
        rows.extend(leaf_digests(path, leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    if is_hugging_face(name) or not (folder := hf_origin(loaded)):
        return name
    with contextlib.suppress(InputError):  # the model may be damaged, or another one, by now
        hf.load(folder, each=each)
    return loaded.manifest["imported"] if fingerprint_of(rows) == loaded.manifest["base"] else name


def hf_origin(loaded: LoadedRun) -> Path | None:
    """Return the Hugging Face folder that a base came from, if it still exists; it may have changed."""
    name = loaded.manifest.get("imported", "")
    try:
        return fetch_checkpoint(name) if name and is_hugging_face(name) else None
    except InputError:
        return None


def extend_vocabulary(loaded: LoadedRun, tokens: Sequence[str], V: int = 0) -> tuple[LoadedRun, dict[str, int]]:
    """Return an imported base with more tokens, and {token: id}. A new token's row starts as the mean row.

    V: rows of the token table; 0: as many as the base has or the tokens need.
    """
    tokenizer, ids = add_tokens(loaded.tokenizer, tokens)
    V = V or max(loaded.config.V, tokenizer.vocab_size)
    if tokenizer.vocab_size > V:
        raise InputError(f"--resize {V}: the tokenizer has {tokenizer.vocab_size} tokens")
    used_V = loaded.tokenizer.has_token(max(V, loaded.config.V))
    new = {token: i for token, i in ids.items() if not used_V[i]}
    config, params = loaded.config, loaded.params
    if V != config.V or new:
        console.print(
            f"token table: {config.V:,} -> {V:,} rows; those of new tokens start as the mean of the used rows"
        )
        config, params = resize(config, params, V, used_V[: config.V], list(new.values()))
    for token, i in ids.items():
        console.print(f"token {token!r}: id {i}{'' if token in new else ', already in the tokenizer'}", markup=False)
    manifest = loaded.manifest | {"tokenizer": tokenizer.digest, "added_tokens": new}
    return dataclasses.replace(loaded, config=config, tokenizer=tokenizer, params=params, manifest=manifest), ids
