"""Commands on runs."""

Arg = Annotated[str, tyro.conf.Positional]


DType = Literal["", "float32", "bfloat16", "float16"]


Verify = Literal["full", "fast", "off"]


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
        found = write_verified(out, got, self.dtype, self.bound, write)
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
            like, t = hf_origin(got), for_transformers(got.tokenizer)
            named = {k: getattr(t, k) if f"{k}_token" in t.names else None for k in ("bos", "eos", "pad")}
            tokens = {} if like else {f"{k}_token_id": i for k, i in named.items()}
            hf.save(made, got.config, params, like, int(self.shard_gb * 1e9), **tokens)
            write_tokenizer(made, got.tokenizer, got.chats or t is not got.tokenizer)
            write_lineage(made, got.lineage)
            return {}

        got = load_run(self.folder, base=self.base, verify=self.verify)
        if self.format == "hf-peft":
            base = base_name(got, self.base)
            found = adapters.export_adapter(got, out, self.target, self.same, base)
            if not is_hugging_face(base):
                dtype = "" if got.mark else f" --dtype {main_dtype(got.params)}"
                console.print(f"its base is a run, which HF PEFT cannot read: graftax export {base} --out BASE{dtype}, "
                              "then give BASE to PeftModel.from_pretrained", soft_wrap=True)  # fmt: skip
            return found
        if self.target:
            raise InputError("--for vllm is of --format hf-peft; vLLM reads a merged model as it is")
        found = write_verified(out, got, self.dtype, self.bound, write)
        console.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}", soft_wrap=True)
        return found

    def same(self, got: LoadedRun, method: Any, trainable: Any) -> dict[str, float]:
        """Compare a run with what was read back of its adapter."""
        ids, again = probe_ids(got), dataclasses.replace(got, method=method, trainable=trainable)
        what = f"{self.out} read back against {self.folder}"
        bound, alone = self.bound or BOUNDS["float32"], base_logits(got, ids)
        return compare_logits(run_logits(got, ids), run_logits(again, ids), bound, what, *alone)


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
        out = empty(self.out)
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
        with atomic_folder(out) as made:
            mark = write_base(made, got, params, "imported", {}, str(out))
        console.print(f"wrote {out}/: a base with fingerprint {mark[:12]}", soft_wrap=True)
        return {"out": str(out), "fingerprint": mark, "V": V, "tokens": ids}


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
        from .checkpoint import CheckpointWriter
        from ..config import from_json
        from .files import check_run, is_hugging_face

        folder = Path(self.folder)
        if found := read_lineage(folder):
            return found
        if (folder / "adapter_config.json").exists() or is_hugging_face(folder):
            blank = dict.fromkeys(("recipe", "method", "values", "base", "data", "tokenizer", "versions", "code"), "")
            return [{"run": str(folder), "phase": "import", "step": 0, "seed": 0, **blank}]
        folder = check_run(folder)
        checkpoints = CheckpointWriter(folder / "checkpoints")
        if not checkpoints.steps():
            raise InputError(f"{folder}: no checkpoint was saved, so nothing came of this run")
        return lineage_of(folder, from_json(folder / "config.json"), checkpoints.manifest(checkpoints.steps()[-1]))
