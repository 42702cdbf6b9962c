"""Bases in and out: import, export, merge. What is written is read back and compared before it counts."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from .. import InputError
from ..bounds import Bounds, Checked, Positive
from ..data.hf_sentencepiece import for_transformers
from ..data.hf_tokenizer import add_special
from ..model import forward, hf, resize
from ..model.hf_files import CARRIED, empty, fetch, unchecked
from ..model.tree import named
from ..peft import Subset, merge
from . import adapters
from .adapters import Target
from .checkpoint import Checkpoints, fingerprint
from .config import to_json
from .inputs import save_held_out
from .lineage import code, keep
from .progress import console
from .runs import Loaded, is_hugging_face, load_hugging_face, load_run
from .stored import sidecars

Arg = Annotated[str, tyro.conf.Positional]
DType = Literal["", "float32", "bfloat16", "float16"]
Verify = Literal["full", "fast", "off"]
# Mean KL (nats a token) up to which two models pass for one, by the dtype that the weights were rounded to.
BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 2e-2}


def probe_ids(got: Loaded, rows: int = 4, T: int = 64) -> np.ndarray:
    """Ids [rows, T] to compare models on: held-out text of the base if it has any, else random ones."""
    T = min(T, got.config.context)
    held = [row["ids"][:T] for domain in got.held_out.values() for row in domain.rows]
    if held and len(held[0]) == T:
        return np.stack([held[i * len(held) // rows] for i in range(rows)])
    return np.random.default_rng(0).integers(0, got.tokenizer.vocab_size, (rows, T))


def logits_of(got: Loaded, ids: np.ndarray) -> np.ndarray:
    """What base + adapter computes for ids, fp32."""
    model, bound, context = got.bound
    return np.asarray(jax.jit(lambda b: forward(model, b, jnp.asarray(ids), context=context)[0])(bound), np.float32)


def compare(before: np.ndarray, after: np.ndarray, bound: float, what: str) -> dict[str, float]:
    """{largest difference of logits, mean and largest KL(before || after) in nats a token}; says them.

    Raises InputError above `bound`.
    """
    V = min(before.shape[-1], after.shape[-1])  # a vocabulary may have been padded
    a, b = (_log_softmax(x[..., :V].astype(np.float64)) for x in (before, after))
    kl = np.maximum((np.exp(a) * (a - b)).sum(-1), 0)
    found = {"max_difference": float(np.abs(before[..., :V] - after[..., :V]).max()), "kl_mean": float(kl.mean()),
             "kl_max": float(kl.max())}  # fmt: skip
    text = (f"{what}: logits differ by at most {found['max_difference']:.2e}, KL {found['kl_mean']:.2e} nats a token "
            f"(largest {found['kl_max']:.2e}) on {before.shape[0]} x {before.shape[1]} tokens")  # fmt: skip
    if not found["kl_mean"] <= bound:  # NaN fails too
        raise InputError(f"{text}, above --bound {bound:g}; nothing was written. A wider --dtype rounds less")
    console.print(f"{text}: below {bound:g}", soft_wrap=True)
    return found


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def folded(got: Loaded, dtype: str) -> Any:
    """Base + adapter as one base, in `dtype`, or each parameter in the dtype that the base has it in."""
    merged = merge(got.method, got.params, got.trainable, dtype or None)
    return jax.tree.map(lambda m, b: m.astype(dtype or b.dtype), merged, got.params)


def widest(params: Any) -> str:
    """The dtype most of the bytes have."""
    return max(jax.tree.leaves(params), key=lambda x: x.nbytes).dtype.name


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
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.save(got.manifest["step"], {"trainable": named(params)}, meta)
    checkpoints.close()
    return fingerprint(params)


def checked(out: Path, got: Loaded, dtype: str, bound: float, write: Callable[[Path, Any], Any]) -> dict[str, Any]:
    """Have `write(folder, params)` write base + adapter as one base, read that back, compare, and give it its name.

    One of the two models is in memory at a time. Raises InputError, and leaves nothing, if they differ too much.
    """
    ids = probe_ids(got)
    before, merged = logits_of(got, ids), folded(got, dtype)
    with unchecked(out) as made:
        said, bound = write(made, merged), bound or BOUNDS[widest(merged)]
        del merged, got
        found = compare(before, logits_of(load_run(made), ids), bound, f"{out} read back against what it was made of")
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
        out = empty(self.out)

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
        out = empty(self.out)

        def write(made: Path, params: Any) -> dict[str, Any]:
            like, t = origin(got), for_transformers(got.tokenizer)
            named = {k: getattr(t, k) if f"{k}_token" in t.names else None for k in ("bos", "eos", "pad")}
            tokens = {} if like else {f"{k}_token_id": i for k, i in named.items()}
            hf.save(made, got.config, params, like, int(self.shard_gb * 1e9), **tokens)
            for name in CARRIED:  # the run's tokenizer may have more tokens than the one its base came with
                (made / name).unlink(missing_ok=True)
            t.save(made)
            keep(made, got.lineage)
            return {}

        got = load_run(self.folder, base=self.base, verify=self.verify)
        if self.format == "hf-peft":
            return adapters.write(got, out, self.target, self.same)
        if self.target:
            raise InputError("--for vllm is of --format hf-peft; vLLM reads a merged model as it is")
        found = checked(out, got, self.dtype, self.bound, write)
        console.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}", soft_wrap=True)
        return found

    def same(self, got: Loaded, method: Any, trainable: Any) -> dict[str, float]:
        """Compare a run with what was read back of its adapter."""
        ids, again = probe_ids(got), dataclasses.replace(got, method=method, trainable=trainable)
        what = f"{self.out} read back against {self.folder}"
        return compare(logits_of(got, ids), logits_of(again, ids), self.bound or BOUNDS["float32"], what)


def origin(got: Loaded) -> Path | None:
    """The Hugging Face folder that a base came from, if it is still there."""
    name = got.manifest.get("imported", "")
    try:
        return fetch(name) if name and is_hugging_face(name) else None
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
    add_tokens: tuple[str, ...] = ()  # special tokens that the tokenizer gets besides, e.g. '<|user|>'
    resize: Annotated[int, Bounds(0, 1 << 24)] = 0  # rows of the token table; 0: as it has, or as added tokens need

    def run(self) -> dict[str, Any]:
        """Write the base; returns where, and its fingerprint."""
        if (Path(self.folder) / "checkpoints").is_dir():
            raise InputError(f"{self.folder} is a run directory already: give it to --base as it is")
        out = empty(self.out)
        got = load_hugging_face(self.folder, dtype=self.dtype or None, check=False)
        tokenizer = add_special(got.tokenizer, self.add_tokens) if self.add_tokens else got.tokenizer
        V = self.resize or max(got.config.V, tokenizer.vocab_size)
        if tokenizer.vocab_size > V:
            raise InputError(f"--resize {V}: the tokenizer has {tokenizer.vocab_size} tokens")
        config, params = (got.config, got.params) if got.config.V == V else resize(got.config, got.params, V)
        if V != got.config.V:
            console.print(f"vocabulary {got.config.V:,} -> {V:,}: new rows are the mean of the old ones")
        got = dataclasses.replace(got, config=config, tokenizer=tokenizer, params=params)
        got.manifest.update(tokenizer=tokenizer.digest)
        mark = write_base(out, got, params, "imported", {})
        console.print(f"wrote {out}/: a base with fingerprint {mark[:12]}", soft_wrap=True)
        return {"out": str(out), "fingerprint": mark, "V": V}
