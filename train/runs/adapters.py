"""Adapters out and in: a run's adapter as an HF PEFT folder, compared with what it was, and such a folder as a run."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ... import InputError, peft
from ...atomic import whole_folder
from ...data.tokenizers.hf_files import MAIN
from ...data.tokenizers.tokenizer import load_tokenizer
from ...model.hf.files import is_hub_id, read_json
from ...model.tree import split_layer_index
from ...peft import Method
from ...peft.hf.names import family_of
from ...peft.methods.lora import LoRA
from ..config import Run
from ..inputs import check_rows
from ..progress import console
from .lineage import keep, kept
from .tokenizer_files import write_tokenizer

Target = Literal["", "vllm"]
CONFIG = "adapter_config.json"


def uniform(method: Method, config: Any, params: Any, trainable: Any) -> tuple[Method, Any]:
    """A LoRA whose every matrix has one rank R and one scale, alpha / R = 1: vLLM reads no patterns.

    Ranks are filled up with zeros. InputError, with the reason, for what vLLM does not load.
    """
    method, trainable = peft.hf.to_exportable(method, trainable, config)
    kind = peft.hf.type_of(method)
    name = type(method).__name__
    if not isinstance(method, LoRA) or kind != "LORA" or name in ("DoRA", "LoRABias", "PiSSA", "OLoRA"):
        why = {"DoRA": "it loads no DoRA", "LoRABias": "it loads no bias", "Chain": "it loads one LoRA alone",
               "PiSSA": "the base that it serves is the whole one"}  # fmt: skip
        raise InputError(f"--for vllm: {name}: {why.get(name, 'vLLM loads LoRA alone')}; merge it: --format hf")
    R = max(t["b"].shape[-2] for t in trainable.values())
    if R > 512:
        raise InputError(f"--for vllm: rank {R}, and vLLM takes at most 512; make it smaller (peft.arithmetic.rerank)")
    made = {}
    for key, t in trainable.items():
        more, b = R - t["b"].shape[-2], method.factor(params, key, t) * t["b"]
        room = [(0, 0)] * (b.ndim - 2)
        made[key] = {"a": jnp.pad(t["a"], [*room, (0, 0), (0, more)]), "b": jnp.pad(b, [*room, (0, more), (0, 0)])}
    return LoRA(rank=R, alpha=R, where=method.where), made


def write(got: Any, out: Path, target: Target, compare: Any, base: str) -> dict[str, Any]:
    """Write the adapter of a loaded run as HF PEFT reads it, read it back, compare; nothing is left if it differs.

    base: the name that its config gives the model it adapts.
    """
    method, trainable = got.method, got.trainable
    if not jax.tree.leaves(trainable) or got.run.phase == "pretrain":
        raise InputError(f"{got.folder} is a base, not an adapter; take --format hf")
    if target == "vllm":
        if family_of(got.config) == "gpt2":
            raise InputError("--for vllm: vLLM's GPT-2 takes no LoRA; merge it: --format hf")
        method, trainable = uniform(method, got.config, got.params, trainable)
    with whole_folder(out) as made:
        peft.hf.save(made, got.config, method, trainable, base, got.params)
        keep(made, got.lineage)
        if got.chats and got.tokenizer.template and not got.tokenizer.template_file:  # its base has no template
            write_tokenizer(made, got.tokenizer, chat=True)
        found = compare(got, *peft.hf.load(made, got.config, got.params))
    console.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}", soft_wrap=True)
    if target == "vllm":
        rank = method.rank  # type: ignore[attr-defined]
        console.print(f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME={out}", soft_wrap=True)
    return {"out": str(out), "base": base, **found}


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is what HF PEFT's save_pretrained wrote."""
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: Path, base: str) -> str:
    """The name of an adapter's base: the one given, or the one that its config has, here or beside the folder.

    Of a hub id the config's `revision` is part: `owner/name@revision`.
    """
    config = {"base_model_name_or_path": base} if base else read_json(folder / CONFIG)
    name, revision = (config.get(key) or "" for key in ("base_model_name_or_path", "revision"))
    for key, value in (("base_model_name_or_path", name), ("revision", revision)):
        if not isinstance(value, str):
            raise InputError(f"{folder / CONFIG}: {key} is {value!r:.60}; text is wanted")
    if not name:
        raise InputError(f"{folder}: its {CONFIG} names no base; give one with --base")
    beside = folder / name
    if not Path(name).exists() and beside.exists():
        return str(beside)
    return f"{name}@{revision}" if revision and is_hub_id(name) and "@" not in name else name


def read(folder: Path, below: Any, base: str) -> Any:
    """A loaded base with the adapter of an HF PEFT folder, as a loaded run has it."""
    params = below.merged
    method, trainable = peft.hf.load(folder, below.config, params)
    touched = ", ".join(sorted({split_layer_index(key)[0].split("/")[-1] for key in trainable}))
    total = sum(x.size for x in jax.tree.leaves(trainable))
    console.print(f"read {folder}: {type(method).__name__}, {total:,} numbers, of {touched}", soft_wrap=True)
    run = Run(phase="finetune", recipe="imported", out=str(folder), base=base, method=method, data=below.run.data)
    own = any((folder / name).is_file() for name in MAIN)
    tokenizer = load_tokenizer(folder) if own else below.tokenizer
    check_rows(tokenizer, below.config.V, f"{folder}: ")
    records, mark = kept(folder), below.fingerprint
    said = str(records[-1].get("base") or "") if records else ""
    if said not in ("", mark):
        console.print(f"{folder} was tuned on a base with fingerprint {said[:12]}, but {base} has {mark[:12]}: is it "
                      "the right one? (Another dtype gives another fingerprint.)", soft_wrap=True)  # fmt: skip
    manifest = {"step": 0, "phase": "finetune", "base": mark, "tokenizer": tokenizer.digest,
                "lineage": records or below.lineage}  # fmt: skip
    manifest |= {key: below.manifest[key] for key in ("imported", "added_tokens") if key in below.manifest}
    return dataclasses.replace(below, folder=folder, run=run, params=params, method=method, trainable=trainable,
                               tokenizer=tokenizer, manifest=manifest)  # fmt: skip
