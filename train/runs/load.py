"""Bases and runs: what a finished phase left, or a Hugging Face checkpoint, loaded as a base or with its adapter."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...data.mixture import HeldOut
from ...data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ...model import Config, Context, Transformer, hf, shapes_of
from ...model.backend import backend
from ...model.hf.files import did_you_mean_folder, fetch_checkpoint, is_hub_id
from ...model.pattern import pattern_source
from ...model.quantize import quantize_parameter
from ...model.sharding import infer_adapter_shardings, shardings
from ...model.tree import name_and_layers, named, nested
from ...peft import Method, Subset, merge
from ..config import Data, Run, check_config_unchanged, from_json, method_to_dict
from ..inputs import check_rows, check_tokenizer, load_held_out
from ..progress import console
from . import adapters, report
from .checkpoint import CheckpointWriter, fingerprint, fingerprint_of, leaf_digests
from .checkpoint_reader import check_sidecars
from .layout import convert_layout, set_layout, sharded
from .lineage import chain, kept


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run as it can be used: `params` is the base it stands on, `method` and `trainable` what it added."""

    folder: Path
    run: Run
    config: Config
    params: Any
    method: Method
    trainable: Any
    tokenizer: Tokenizer
    held_out: dict[str, HeldOut]  # of the base's own domains
    manifest: dict[str, Any]
    mark: str = ""  # of a quantised base: the fingerprint of what it was made of

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The records of this run and of all that it was made of."""
        return chain(self.folder, self.run, self.manifest)

    @property
    def chats(self) -> bool:
        """Whether a fine-tune of graftax's, which is on chats, is among what it was made of."""
        return any(record["phase"] == "finetune" for record in self.lineage)

    @property
    def model(self) -> Transformer:
        return Transformer(self.config)

    @property
    def bound(self) -> tuple[Transformer, Any, Context]:
        """(model, bound parameters, context): what evaluation and generation take."""
        return self.model, self.method.bind(self.params, self.trainable), self.method.context(self.trainable)

    @cached_property
    def merged(self) -> Any:
        """One base that computes the same; InputError where there is none (prompts, adapters)."""
        return merge(self.method, self.params, self.trainable)

    @property
    def base(self) -> Any:
        """What a method can stand on: quantised parameters as they are, else one base that computes the same."""
        return self.params if self.mark else self.merged

    @cached_property
    def fingerprint(self) -> str:
        """What identifies that base: its values or, if it is quantised, those it was made of.

        A base that has to be computed (a LoRA folded in) is rounded differently on another device or mesh, so it is
        identified by what it is computed from: the fingerprint below it, the method, and the values it trained.
        """
        if self.mark or isinstance(self.method, Subset):
            return self.mark or fingerprint(self.merged)
        method = json.dumps(method_to_dict(self.method), default=lambda x: x.digest, sort_keys=True)
        parts = (self.manifest["base"], method, fingerprint(self.trainable))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_hugging_face(name: str | Path) -> bool:
    """Whether a name is a Hugging Face folder, or a hub id that no folder here has."""
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and (b'"model_type"' in config.read_bytes() or any(path.glob("*.safetensors*")))
    return is_hub_id(str(name))


def check_run(folder: str | Path) -> Path:
    """The folder, if it is a run directory."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "is no run directory and no Hugging Face model: it has no config.json"
        gone = f"does not exist{did_you_mean_folder(folder)}"
        raise InputError(
            f"{folder} {what if folder.exists() else gone}; give the folder that `graftax pretrain` or "
            "`graftax finetune` printed, a folder with config.json and safetensors, or a hub id owner/name"
        )
    return folder


def with_compute_dtype(config: Config, dtype: str = "", remat: Any = "") -> Config:
    """The config as it is run here. What is stored in half precision is multiplied in fp32 on a CPU, which has no fast
    product for it."""
    half = config.family and backend() == "cpu"
    return dataclasses.replace(
        config, dtype=dtype or ("float32" if half else config.dtype), remat=remat or config.remat
    )


def quantize_on_load(kind: str, mesh: Any) -> tuple[Callable[[str, Any], Any], list[Any]]:
    """(each(path, parameter) -> what is kept of it, the marks it has taken): a base is quantised while it is read, a
    parameter at a time, and known by the fingerprint of what it was."""
    found: list[Any] = []

    def each(path: str, leaf: Any) -> Any:
        found.extend(leaf_digests(path, leaf))
        return jax.block_until_ready(quantize_parameter(path, leaf, kind, mesh=mesh))

    return each, found


def quantize_base(got: Loaded, kind: str, mesh: Any) -> Loaded:
    """Base and adapter as one quantised base; here all of it is in memory before."""
    each, _ = quantize_on_load(kind, mesh)
    params = nested({path: each(path, leaf) for path, leaf in named(got.merged).items()})
    return dataclasses.replace(got, params=params, method=Subset("all"), trainable={}, mark=got.fingerprint)


def resolve_path(name: str | Path) -> str:
    """A base's name as a run writes it down: a folder by its whole path, so that it is found from anywhere."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def load_hugging_face(
    name: str | Path, mesh: Any = None, dtype: Any = None, check: bool = True, layers: str = "", quantize: str = ""
) -> Loaded:
    """A Hugging Face checkpoint as a base: parameters on the mesh in the dtype they have on disk, its tokenizer."""
    began, folder = time.perf_counter(), fetch_checkpoint(str(name))
    tokenizer = load_tokenizer(folder)
    each, found = quantize_on_load(quantize, mesh) if quantize else (None, [])
    config, params = convert_layout(*hf.load(folder, dtype, mesh, each), layers, mesh, quantize)
    if check:
        check_rows(tokenizer, config.V, f"{folder}: ")
    total, kind = sum(x.size for x in named(params).values()), config.param_dtype + (quantize and f" as {quantize}")
    size, seconds = report.size(report.nbytes(params)), time.perf_counter() - began
    said = f"read {name}: {config.family}, {total:,} parameters, {kind}, {size} in {seconds:.1f} s"
    console.print(said, soft_wrap=True)
    data = Data(T=min(512, config.context))
    run = Run(phase="pretrain", recipe="imported", out=str(name), model=config, data=data)
    manifest = {"step": 0, "base": "", "phase": "pretrain", "tokenizer": tokenizer.digest, "imported": resolve_path(name),
                "lineage": kept(folder)}  # fmt: skip
    mark = fingerprint_of(found) if quantize else ""
    return Loaded(folder, run, with_compute_dtype(config), params, Subset("all"), {}, tokenizer, {}, manifest, mark)


def _as_written(like: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    """A base's shapes in the dtypes it was written with, in whatever layout; what a method trains is fp32."""
    kinds = {name_and_layers(path)[0]: leaf["dtype"] for path, leaf in leaves.items()}
    return {p: jax.ShapeDtypeStruct(x.shape, kinds.get(name_and_layers(p)[0], x.dtype)) for p, x in like.items()}


def _chosen(folder: Path, steps: list[int], step: int | None) -> int:
    """The step that is asked for, or the newest."""
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "no step was saved"
        raise InputError(f"{folder}: no checkpoint {'' if step is None else step} to load; {have}")
    return steps[-1] if step is None else step


def _below(folder: Path, run: Run, manifest: dict[str, Any], base: str, mesh: Any, layers: str, verify: str) -> Loaded:
    """The base that a run was tuned on. Raises InputError if there is none, or another one."""
    try:
        below = load_run(base, mesh, layers=layers, quantize=run.quantize, verify=verify)
    except InputError as error:
        raise InputError(f"the base of {folder}: {error} (where it is now: --base)") from None
    if below.fingerprint != manifest["base"]:
        raise InputError(f"{folder} was tuned on another base than {base} (fingerprint {manifest['base'][:12]}, this "
                         f"one has {below.fingerprint[:12]}); give its own with --base")  # fmt: skip
    return below


def load_run(
    folder: str | Path, mesh: Any = None, step: int | None = None, base: str = "", layers: str = "", quantize: str = "",
    verify: str = "full",
) -> Loaded:  # fmt: skip
    """Load a run at its newest checkpoint, or at `step`; `base` says where its base is now, if it moved.

    layers: stacked or unrolled; empty: as the run has them.
    quantize: `int8` or `nf4`: all of it as one base whose matrices are that.
    verify: `full` checks the digest of every array and file, `fast` the files' sizes, `off` the manifest alone.

    A Hugging Face folder or hub id is a base too, and an HF PEFT folder an adapter. Raises InputError for what is none
    of them, for a run without a checkpoint, and for a base with another fingerprint.
    """
    if adapters.is_adapter(folder):
        name = adapters.base_of(Path(folder), base)
        got = adapters.read(Path(folder), load_run(name, mesh, layers=layers, verify=verify), name)
        return quantize_base(got, quantize, mesh) if quantize else got
    if is_hugging_face(folder):
        return load_hugging_face(folder, mesh, layers=layers, quantize=quantize)
    folder = check_run(folder)
    run, checkpoints = from_json(folder / "config.json"), CheckpointWriter(folder / "checkpoints")
    step = _chosen(folder, checkpoints.steps(), step)
    manifest = checkpoints.manifest(step)
    check_config_unchanged(run, manifest, folder)
    check_sidecars(folder, manifest, verify)
    if run.phase == "pretrain":
        assert run.model is not None
        config = with_compute_dtype(set_layout(run.model, layers))
        shapes = shapes_of(set_layout(run.model, layers))
        method: Method = Subset("all")
        below = None
    else:
        below = _below(folder, run, manifest, base or run.base, mesh, layers or run.layers, verify)
        if "imported" in below.manifest:
            manifest = manifest | {"imported": below.manifest["imported"]}
        config, method = with_compute_dtype(below.config, run.dtype, run.remat), run.method
        shapes = jax.eval_shape(lambda base: base, below.base)  # an argument: traced, `base` would cache tracers
    make = partial(method.init, jax.random.key(0))
    with pattern_source(folder / "config.json"):
        like = jax.eval_shape(make, shapes)
    like = like if below else _as_written(like, manifest["leaves"].get("trainable", {}))
    if mesh is not None:
        like = sharded(like, infer_adapter_shardings(mesh, make, shapes, shardings(mesh, shapes)))
    each, found = quantize_on_load(quantize, mesh) if quantize and below is None else (None, [])
    trainable = checkpoints.restore(step, "trainable", like, each, verify)
    checkpoints.close()
    params, tokenizer = below.base if below else nested(trainable), load_tokenizer(folder)
    check_tokenizer(tokenizer, manifest.get("tokenizer", ""), folder)
    check_rows(tokenizer, config.V, f"{folder}: ")
    tokenizer = dataclasses.replace(tokenizer, date=run.date)
    held_out = below.held_out if below else load_held_out(folder / "held_out.npz")
    got = Loaded(folder, run, config, params, method, trainable, tokenizer, held_out, manifest)
    if each:
        return dataclasses.replace(got, trainable={}, mark=fingerprint_of(found))
    return quantize_base(got, quantize, mesh) if quantize and below else got
