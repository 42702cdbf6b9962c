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
from ...atomic import whole_folder
from ...bounds import Bounds, Checked, Positive
from ...data.tokenizers.added_tokens import add_tokens
from ...data.tokenizers.sentencepiece_bpe import for_transformers
from ...model import hf, resize
from ...model.hf.files import fetch_checkpoint, output_folder
from ...model.tree import named
from ...peft import Subset, merge
from ..config import to_json
from ..inputs import save_held_out
from ..progress import console
from . import adapters
from .adapters import Target
from .checkpoint import CheckpointWriter, fingerprint, fingerprint_of, leaf_digests
from .checkpoint_reader import sidecars
from .equivalence import BOUNDS, base_logits, compare, logits_of, probe_ids, widest
from .lineage import code, keep
from .load import Loaded, is_hugging_face, load_hugging_face, load_run, resolve_path
from .tokenizer_files import write_tokenizer

Arg = Annotated[str, tyro.conf.Positional]
DType = Literal["", "float32", "bfloat16", "float16"]
Verify = Literal["full", "fast", "off"]


def folded(got: Loaded, dtype: str) -> Any:
    """Base + adapter as one base, in `dtype`, or each parameter in the dtype that the base has it in."""
    merged = merge(got.method, got.params, got.trainable, dtype or None)
    return jax.tree.map(lambda m, b: m.astype(dtype or b.dtype), merged, got.params)


def write_base(
    out: Path, got: Loaded, params: Any, recipe: str, came: dict[str, Any], name: str = ""
) -> str:  # fmt: skip
    """A run directory that holds a base, to be known as `name`; returns its fingerprint."""
    stored = widest(params)
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
        "code": code(),
        "config": json.loads(to_json(run)),
        "sidecars": sidecars(out, got.tokenizer),
        **came,
    }
    checkpoints = CheckpointWriter(out / "checkpoints")
    checkpoints.save(got.manifest["step"], {"trainable": named(params)}, meta)
    checkpoints.close()
    return fingerprint(params)


def checked(out: Path, got: Loaded, dtype: str, bound: float, write: Callable[[Path, Any], Any]) -> dict[str, Any]:
    """Have `write(folder, params)` write base + adapter as one base, read that back, compare, and give it its name.

    One of the two models is in memory at a time. Raises InputError, and leaves nothing, if they differ too much.
    """
    ids = probe_ids(got)
    before, alone, merged = logits_of(got, ids), base_logits(got, ids), folded(got, dtype)
    with whole_folder(out) as made:
        said, bound = write(made, merged), bound or BOUNDS[widest(merged)]
        del merged, got
        what = f"{out} read back against what it was made of"
        found = compare(before, logits_of(load_run(made), ids), bound, what, *alone)
    return {"out": str(out), **said, **found}


@dataclasses.dataclass(frozen=True)
class Merge(Checked):
    """One base from an adapter and its base, compared with the two. Example: graftax merge runs/lora --out runs/m"""

    folder: Arg
    out: str
    base: str = ""  # where its base is now, if it moved
    dtype: DType = ""  # of the merged parameters; empty: as the base's
    bound: float = 0.0  # nats a token; 0: 1e-6 for float32, 1e-3 for float16, 2e-2 for bfloat16
    verify: Verify = "full"  # of what is read: every digest, the files' sizes, the manifest alone

    def run(self) -> dict[str, Any]:
        """Write the merged base; returns where, its fingerprint, and how it compares."""
        out = output_folder(self.out)

        def write(made: Path, params: Any) -> dict[str, Any]:
            came = {"adapter": str(self.folder), "base": got.manifest["base"], "step": got.manifest["step"]}
            said: dict[str, Any] = {"merged_from": came, "lineage": got.lineage}
            return {"fingerprint": write_base(made, got, params, "merged", said, str(out))}

        got = load_run(self.folder, base=self.base, verify=self.verify)
        found = checked(out, got, self.dtype, self.bound, write)
        console.print(f"wrote {out}/: a base with fingerprint {found['fingerprint'][:12]}", soft_wrap=True)
        return found


@dataclasses.dataclass(frozen=True)
class Export(Checked):
    """A run as transformers, HF PEFT and vLLM read it. Example: graftax export runs/lora --out hf

    hf: base and adapter merged, with config.json, safetensors and tokenizer files. hf-peft: the adapter alone.
    """

    folder: Arg
    out: str
    format: Literal["hf", "hf-peft"] = "hf"
    target: Annotated[Target, tyro.conf.arg(name="for")] = ""  # who reads the adapter: vllm wants LoRA of one rank
    base: str = ""  # where its base is now, if it moved
    dtype: DType = ""  # of the written parameters; empty: as the base's
    shard_gb: Positive = 5.0  # size of a file
    bound: float = 0.0  # nats a token; 0: 1e-6 for float32, 1e-3 for float16, 2e-2 for bfloat16
    verify: Verify = "full"  # of what is read: every digest, the files' sizes, the manifest alone

    def run(self) -> dict[str, Any]:
        """Write, read back, compare; returns where, and how it compares."""
        out = output_folder(self.out)

        def write(made: Path, params: Any) -> dict[str, Any]:
            like, t = origin(got), for_transformers(got.tokenizer)
            named = {k: getattr(t, k) if f"{k}_token" in t.names else None for k in ("bos", "eos", "pad")}
            tokens = {} if like else {f"{k}_token_id": i for k, i in named.items()}
            hf.save(made, got.config, params, like, int(self.shard_gb * 1e9), **tokens)
            write_tokenizer(made, got.tokenizer, got.chats or t is not got.tokenizer)
            keep(made, got.lineage)
            return {}

        got = load_run(self.folder, base=self.base, verify=self.verify)
        if self.format == "hf-peft":
            base = base_name(got, self.base)
            found = adapters.write(got, out, self.target, self.same, base)
            if not is_hugging_face(base):
                dtype = "" if got.mark else f" --dtype {widest(got.params)}"
                console.print(f"its base is a run, which HF PEFT cannot read: graftax export {base} --out BASE{dtype}, "
                              "then give BASE to PeftModel.from_pretrained", soft_wrap=True)  # fmt: skip
            return found
        if self.target:
            raise InputError("--for vllm is of --format hf-peft; vLLM reads a merged model as it is")
        found = checked(out, got, self.dtype, self.bound, write)
        console.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}", soft_wrap=True)
        return found

    def same(self, got: Loaded, method: Any, trainable: Any) -> dict[str, float]:
        """Compare a run with what was read back of its adapter."""
        ids, again = probe_ids(got), dataclasses.replace(got, method=method, trainable=trainable)
        what = f"{self.out} read back against {self.folder}"
        bound, alone = self.bound or BOUNDS["float32"], base_logits(got, ids)
        return compare(logits_of(got, ids), logits_of(again, ids), bound, what, *alone)


def base_name(got: Loaded, moved: str = "") -> str:
    """The name that an adapter's config gives its base: of an imported model while the parameters are those of the base
    by fingerprint, else the run that the adapter was tuned on. moved: where that is now."""
    name, found = resolve_path(moved or got.run.base), []

    def each(path: str, leaf: Any) -> Any:
        """Take one parameter's part of the fingerprint, and keep its shape alone."""
        found.extend(leaf_digests(path, leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    if is_hugging_face(name) or not (folder := origin(got)):
        return name
    with contextlib.suppress(InputError):  # the model is damaged by now, or another one
        hf.load(folder, each=each)
    return got.manifest["imported"] if fingerprint_of(found) == got.manifest["base"] else name


def origin(got: Loaded) -> Path | None:
    """The Hugging Face folder that a base came from, changed since or not, if it is still there."""
    name = got.manifest.get("imported", "")
    try:
        return fetch_checkpoint(name) if name and is_hugging_face(name) else None
    except InputError:
        return None


@dataclasses.dataclass(frozen=True)
class Import(Checked):
    """A run directory from a Hugging Face model. Example: graftax import HuggingFaceTB/SmolLM2-135M --out runs/smol

    Not needed for --base, which takes such a model as it is; needed to add tokens to it.
    """

    folder: Arg  # with config.json and safetensors, or a hub id owner/name[@revision]
    out: str
    dtype: DType = ""  # of the parameters; empty: as they are stored
    add_tokens: tuple[str, ...] = ()  # more tokens, e.g. '<|tool|>', for use in texts; each begins as the mean row
    resize: Annotated[int, Bounds(0, 1 << 24)] = 0  # rows of the token table; 0: as it has, or as added tokens need

    def run(self) -> dict[str, Any]:
        """Write the base; returns where, its fingerprint, and {added token: its id}."""
        if (Path(self.folder) / "checkpoints").is_dir():
            raise InputError(f"{self.folder} is a run directory already: give it to --base as it is")
        out = output_folder(self.out)
        got = load_hugging_face(self.folder, dtype=self.dtype or None, check=False)
        tokenizer, ids = add_tokens(got.tokenizer, self.add_tokens)
        V = self.resize or max(got.config.V, tokenizer.vocab_size)
        if tokenizer.vocab_size > V:
            raise InputError(f"--resize {V}: the tokenizer has {tokenizer.vocab_size} tokens")
        used = got.tokenizer.has_token(max(V, got.config.V))
        new = {token: i for token, i in ids.items() if not used[i]}
        config, params = got.config, got.params
        if V != config.V or new:
            console.print(f"rows {config.V:,} -> {V:,}; those of new tokens are the mean of the rows that have a token")
            config, params = resize(config, params, V, used[: config.V], list(new.values()))
        for token, i in ids.items():
            console.print(f"token {token!r}: id {i}{'' if token in new else ', as before'}", markup=False)
        got = dataclasses.replace(got, config=config, tokenizer=tokenizer, params=params)
        got.manifest.update(tokenizer=tokenizer.digest, added_tokens=new)
        with whole_folder(out) as made:
            mark = write_base(made, got, params, "imported", {}, str(out))
        console.print(f"wrote {out}/: a base with fingerprint {mark[:12]}", soft_wrap=True)
        return {"out": str(out), "fingerprint": mark, "V": V, "tokens": ids}
