"""The commands merge, export, import and lineage: each is a frozen dataclass of its flags with `run`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from ... import InputError
from ...atomic import atomic_folder
from ...bounds import Bounds, Checked, Positive
from ...model.hf.files import output_folder
from ..progress import console
from .adapters import Target, export_adapter
from .checkpoint import Verify
from .equivalence import main_dtype
from .export import base_name, compare_adapter, extend_vocabulary, write_base, write_hugging_face, write_verified
from .files import CHECKPOINTS, is_hugging_face
from .lineage import find_lineage, run_status
from .load import load_hugging_face, load_run

Arg = Annotated[str, tyro.conf.Positional]
DType = Literal["", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Merge(Checked):
    """Merge an adapter into its base and compare the two. Example: graftax merge runs/lora --out runs/merged"""

    folder: Arg
    out: str
    base: str = ""  # where its base is now, if it moved
    dtype: DType = ""  # of the merged parameters; empty: as the base's
    bound: float = 0.0  # largest mean KL, nats per token; 0: 1e-6 for float32, 1e-3 for float16, 2e-2 for bfloat16
    verify: Verify = "full"  # check every digest of the input, the sizes of its files, or its manifest alone

    def run(self) -> dict[str, Any]:
        """Write the merged base; return its folder, its fingerprint, and the comparison."""
        out, loaded = output_folder(self.out), load_run(self.folder, base=self.base, verify=self.verify)
        source = {"adapter": str(self.folder), "base": loaded.manifest["base"], "step": loaded.manifest["step"]}
        meta = {"merged_from": source, "lineage": loaded.lineage}

        def write(folder: Path, params: Any) -> dict[str, Any]:
            return {"fingerprint": write_base(folder, loaded, params, "merged", meta, str(out))}

        result = write_verified(out, loaded, self.dtype, self.bound, write)
        console.print(f"wrote {out}/: a base with fingerprint {result['fingerprint'][:12]}", soft_wrap=True)
        return result


@dataclasses.dataclass(frozen=True)
class Export(Checked):
    """Export a run for transformers, HF PEFT or vLLM. Example: graftax export runs/lora --out hf

    hf: base and adapter merged, with config.json, safetensors and tokenizer files. hf-peft: the adapter alone.
    """

    folder: Arg
    out: str
    format: Literal["hf", "hf-peft"] = "hf"
    target: Annotated[Target, tyro.conf.arg(name="for")] = ""  # reader of the adapter; vllm requires LoRA of one rank
    base: str = ""  # where its base is now, if it moved
    dtype: DType = ""  # of the written parameters; empty: as the base's
    shard_gb: Positive = 5.0  # size of a file in gigabytes
    bound: float = 0.0  # largest mean KL, nats per token; 0: 1e-6 for float32, 1e-3 for float16, 2e-2 for bfloat16
    verify: Verify = "full"  # check every digest of the input, the sizes of its files, or its manifest alone

    def run(self) -> dict[str, Any]:
        """Write, read back and compare; return the folder and the comparison."""
        out, loaded = output_folder(self.out), load_run(self.folder, base=self.base, verify=self.verify)
        if self.format == "hf-peft":
            base = base_name(loaded, self.base)
            title = f"{self.out} read back against {self.folder}"
            compare = partial(compare_adapter, loaded, bound=self.bound, title=title)
            result = export_adapter(loaded, out, self.target, compare, base)
            if not is_hugging_face(base):
                dtype = "" if loaded.quantized_from else f" --dtype {main_dtype(loaded.params)}"
                console.print(
                    f"its base is a run, which HF PEFT cannot read: graftax export {base} --out BASE{dtype}, then give "
                    "BASE to PeftModel.from_pretrained",
                    soft_wrap=True,
                )
            return result
        if self.target:
            raise InputError("--for vllm needs --format hf-peft; vLLM reads a merged model as it is")

        def write(folder: Path, params: Any) -> dict[str, Any]:
            write_hugging_face(folder, loaded, params, int(self.shard_gb * 1e9))
            return {}

        result = write_verified(out, loaded, self.dtype, self.bound, write)
        console.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}", soft_wrap=True)
        return result


@dataclasses.dataclass(frozen=True)
class Import(Checked):
    """Make a run folder from a Hugging Face model. Example: graftax import HuggingFaceTB/SmolLM2-135M --out runs/smol

    Only needed to add tokens: --base accepts a Hugging Face model as it is.
    """

    folder: Arg  # with config.json and safetensors, or a hub id owner/name[@revision]
    out: str
    dtype: DType = ""  # of the parameters; empty: as they are stored
    add_tokens: tuple[str, ...] = ()  # further tokens, e.g. '<|tool|>', for use in texts; each starts as the mean row
    resize: Annotated[int, Bounds(0, 1 << 24)] = 0  # rows of the token table; 0: as it has, or as added tokens need

    def run(self) -> dict[str, Any]:
        """Write the base; return its folder, its fingerprint, and {added token: id}."""
        if (Path(self.folder) / CHECKPOINTS).is_dir():
            raise InputError(f"{self.folder} is a run directory already: give it to --base as it is")
        out, loaded = output_folder(self.out), load_hugging_face(self.folder, dtype=self.dtype or None, check=False)
        loaded, ids = extend_vocabulary(loaded, self.add_tokens, self.resize)
        with atomic_folder(out) as folder:
            fingerprint = write_base(folder, loaded, loaded.params, "imported", {}, str(out))
        console.print(f"wrote {out}/: a base with fingerprint {fingerprint[:12]}", soft_wrap=True)
        return {"out": str(out), "fingerprint": fingerprint, "V": loaded.config.V, "tokens": ids}


@dataclasses.dataclass(frozen=True)
class Lineage(Checked):
    """Show the phases that a run was made by, oldest first; no array is read. Example: graftax lineage runs/merged"""

    folder: Arg

    def run(self) -> dict[str, Any]:
        """Print the records; return {"chain": records}, each with the present state of its run in `today`."""
        records = [record | {"today": run_status(record)} for record in find_lineage(Path(self.folder))]
        table = Table("phase", "run", "recipe · method", "step", "values", "on base", "data", "code", "today", box=None)
        for r in records:
            versions = " ".join(f"{k} {v}" for k, v in (r["versions"] or {}).items() if k in ("graftax", "jax"))
            cells = (r["phase"], Path(r["run"]).name, f"{r['recipe']} · {r['method']}", str(r["step"]))
            digests = (r[key][:12] or "-" for key in ("values", "base", "data"))
            table.add_row(*cells, *digests, " ".join((r["code"], versions)).strip(), r["today"])
        console.print(table)
        console.print("values: sha256 over the digests of the trained arrays · base: fingerprint of the base")
        return {"chain": records}
