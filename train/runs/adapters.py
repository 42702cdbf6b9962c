"""HF PEFT adapters: a run's adapter as a folder of HF PEFT, and such a folder as a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ... import InputError, peft
from ...atomic import atomic_folder
from ...data.tokenizers import load_tokenizer
from ...data.tokenizers.hf_files import MAIN
from ...model.hf.hub import is_hub_id
from ...model.tree import split_layer_index
from ...peft import Method
from ...peft.hf.names import family_of
from ...peft.methods.lora import LoRA
from ...strict_json import read_json
from ..config import Run
from ..inputs import check_vocab
from ..progress import console
from .files import ADAPTER_CONFIG
from .lineage import read_lineage, write_lineage
from .loaded import LoadedRun
from .tokenizer_files import write_tokenizer

Target = Literal["", "vllm"]
VLLM_MAX_RANK = 512


def export_adapter(
    loaded: LoadedRun, out: Path, target: Target, compare: Callable[[Method, Any], dict[str, float]], base: str
) -> dict[str, Any]:
    """Write the adapter of a run as HF PEFT reads it, read it back and compare; nothing remains if it differs.

    base: the name of its base in the adapter's config. compare(method, trainable): raises InputError if what was read
    back differs from the run. Raises InputError for a base, and for what vLLM cannot load if it is the target.
    """
    method, trainable = loaded.method, loaded.trainable
    if not jax.tree.leaves(trainable) or loaded.run.phase == "pretrain":
        raise InputError(f"{loaded.folder} is a base, not an adapter; use --format hf")
    if target == "vllm":
        if family_of(loaded.config) == "gpt2":
            raise InputError("--for vllm: vLLM supports no LoRA on GPT-2; merge it: --format hf")
        method, trainable = with_uniform_rank(method, loaded.config, loaded.params, trainable)
    with atomic_folder(out) as folder:
        peft.hf.save(folder, loaded.config, method, trainable, base, loaded.params)
        write_lineage(folder, loaded.lineage)
        tokenizer = loaded.tokenizer
        if loaded.tuned_on_chats and tokenizer.template and not tokenizer.template_file:  # its base has no template
            write_tokenizer(folder, tokenizer, chat=True)
        result = compare(*peft.hf.load(folder, loaded.config, loaded.params))
    console.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}", soft_wrap=True)
    if isinstance(method, LoRA) and target == "vllm":
        flags = f"--enable-lora --max-lora-rank {method.rank} --lora-modules NAME={out}"
        console.print(f"vllm serve BASE {flags}", soft_wrap=True)
    return {"out": str(out), "base": base, **result}


def with_uniform_rank(method: Method, config: Any, params: Any, trainable: Any) -> tuple[Method, Any]:
    """Return an equal LoRA in which all matrices have one rank R and the scale alpha / R = 1, as vLLM requires.

    Smaller ranks are padded with zeros. Raises InputError, with the reason, for what vLLM does not load.
    """
    method, trainable = peft.hf.to_exportable(method, trainable, config)
    name = type(method).__name__
    reasons = {
        "DoRA": "vLLM loads no DoRA",
        "LoRABias": "vLLM loads no bias",
        "Chain": "vLLM loads a single LoRA",
        "PiSSA": "vLLM adds it to the unmodified base",
        "OLoRA": "vLLM adds it to the unmodified base",
    }
    if not isinstance(method, LoRA) or peft.hf.type_of(method) != "LORA" or name in reasons:
        raise InputError(f"--for vllm: {name}: {reasons.get(name, 'vLLM loads only LoRA')}; merge it: --format hf")
    R = max(t["b"].shape[-2] for t in trainable.values())
    if R > VLLM_MAX_RANK:
        raise InputError(
            f"--for vllm: rank {R} exceeds vLLM's limit of {VLLM_MAX_RANK}; make it smaller (peft.merging.rerank)"
        )
    uniform = {}
    for key, t in trainable.items():
        a, b = t["a"], method.factor(params, key, t) * t["b"]
        more, stacked = (0, R - b.shape[-2]), [(0, 0)] * (b.ndim - 2)
        uniform[key] = {"a": jnp.pad(a, [*stacked, (0, 0), more]), "b": jnp.pad(b, [*stacked, more, (0, 0)])}
    return LoRA(rank=R, alpha=R, where=method.where), uniform


def adapter_base(folder: Path, base: str) -> str:
    """Return the name of an adapter's base: `base` if given, else the one in its config, here or beside the folder.

    The config's `revision` becomes part of a hub id: `owner/name@revision`.
    """
    config = {"base_model_name_or_path": base} if base else read_json(folder / ADAPTER_CONFIG)
    name, revision = (config.get(key) or "" for key in ("base_model_name_or_path", "revision"))
    for key, value in (("base_model_name_or_path", name), ("revision", revision)):
        if not isinstance(value, str):
            raise InputError(f"{folder / ADAPTER_CONFIG}: {key} is {value!r:.60}, expected text")
    if not name:
        raise InputError(f"{folder}: its {ADAPTER_CONFIG} names no base; give one with --base")
    beside = folder / name
    if not Path(name).exists() and beside.exists():
        return str(beside)
    return f"{name}@{revision}" if revision and is_hub_id(name) and "@" not in name else name


def load_adapter(folder: Path, base: LoadedRun, base_name: str) -> LoadedRun:
    """Return a loaded base with the adapter of an HF PEFT folder."""
    params = base.merged
    method, trainable = peft.hf.load(folder, base.config, params)
    targets = ", ".join(sorted({split_layer_index(key)[0].split("/")[-1] for key in trainable}))
    total = sum(x.size for x in jax.tree.leaves(trainable))
    console.print(f"read {folder}: {type(method).__name__}, {total:,} parameters, of {targets}", soft_wrap=True)
    run = Run(phase="finetune", recipe="imported", out=str(folder), base=base_name, method=method, data=base.run.data)
    has_tokenizer = any((folder / name).is_file() for name in MAIN)
    tokenizer = load_tokenizer(folder) if has_tokenizer else base.tokenizer
    check_vocab(tokenizer, base.config.V, f"{folder}: ")
    records = read_lineage(folder)
    expected = str(records[-1].get("base") or "") if records else ""
    if expected not in ("", base.fingerprint):
        console.print(
            f"{folder} was tuned on a base with fingerprint {expected[:12]}, but {base_name} has "
            f"{base.fingerprint[:12]}: is it the right one? (Another dtype gives another fingerprint.)",
            soft_wrap=True,
        )
    manifest = {"step": 0, "phase": "finetune", "base": base.fingerprint, "tokenizer": tokenizer.digest}
    manifest |= {"lineage": records or base.lineage}
    manifest |= {key: base.manifest[key] for key in ("imported", "added_tokens") if key in base.manifest}
    return LoadedRun(folder, run, base.config, params, method, trainable, tokenizer, base.held_out, manifest)
