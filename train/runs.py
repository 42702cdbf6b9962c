"""Bases and runs: what a finished phase left, or a Hugging Face checkpoint, loaded as a base or with its adapter."""

import dataclasses
import re
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from .. import InputError
from ..data.mixture import HeldOut
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..model import Config, Context, Transformer, hf, shapes_of
from ..model.hf_files import HUB_ID, fetch
from ..model.sharding import follow, shardings
from ..model.tree import nested
from ..peft import Method, Subset, merge
from . import adapters, report
from .checkpoint import Checkpoints, fingerprint
from .config import Data, Run, from_json
from .inputs import load_held_out
from .progress import console


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


def sharded(shapes: Any, split: Any) -> Any:
    """Shapes with shardings, which a restore follows."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, split)


def is_hugging_face(name: str | Path) -> bool:
    """Whether a name is a Hugging Face folder, or a hub id that no folder here has."""
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and (b'"model_type"' in config.read_bytes() or any(path.glob("*.safetensors*")))
    return not path.exists() and bool(re.fullmatch(HUB_ID, str(name)))


def check_run(folder: str | Path) -> Path:
    """The folder, if it is a run directory."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "is no run directory and no Hugging Face model: it has no config.json"
        raise InputError(
            f"{folder} {what if folder.exists() else 'does not exist'}; give the folder that `graftax pretrain` or "
            "`graftax finetune` printed, a folder with config.json and safetensors, or a hub id owner/name"
        )
    return folder


def numerics(config: Config, dtype: str = "", remat: Any = "") -> Config:
    """The config as it is run here. What is stored in half precision is multiplied in fp32 on a CPU, which has no fast
    product for it."""
    half = config.family and jax.default_backend() == "cpu"
    return dataclasses.replace(
        config, dtype=dtype or ("float32" if half else config.dtype), remat=remat or config.remat
    )


def place(name: str | Path) -> str:
    """A base's name as a run writes it down: a folder by its whole path, so that it is found from anywhere."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def load_hugging_face(name: str | Path, mesh: Any = None, dtype: Any = None, check: bool = True) -> Loaded:
    """A Hugging Face checkpoint as a base: parameters on the mesh in the dtype they have on disk, its tokenizer."""
    began, folder = time.perf_counter(), fetch(str(name))
    tokenizer = load_tokenizer(folder)
    config, params = hf.load(folder, dtype, mesh)
    if check and tokenizer.vocab_size > config.V:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model has {config.V} rows; "
            "`graftax import` gives it as many"
        )
    total = sum(x.size for x in jax.tree.leaves(params))
    size, seconds = report.size(report.nbytes(params)), time.perf_counter() - began
    said = f"read {name}: {config.family}, {total:,} parameters, {config.param_dtype}, {size} in {seconds:.1f} s"
    console.print(said, soft_wrap=True)
    data = Data(T=min(512, config.context))
    run = Run(phase="pretrain", recipe="imported", out=str(name), model=config, data=data)
    manifest = {"step": 0, "base": "", "phase": "pretrain", "tokenizer": tokenizer.digest, "imported": place(name)}
    return Loaded(folder, run, numerics(config), params, Subset("all"), {}, tokenizer, {}, manifest)


def load_run(folder: str | Path, mesh: Any = None, step: int | None = None, base: str = "") -> Loaded:
    """Load a run at its newest checkpoint, or at `step`; `base` says where its base is now, if it moved.

    A Hugging Face folder or hub id is a base too, and an HF PEFT folder an adapter. Raises InputError for what is none
    of them, for a run without a checkpoint, and for a base with another fingerprint.
    """
    if adapters.is_adapter(folder):
        name = adapters.base_of(Path(folder), base)
        return adapters.read(Path(folder), load_run(name, mesh), name)
    if is_hugging_face(folder):
        return load_hugging_face(folder, mesh)
    folder = check_run(folder)
    run, checkpoints = from_json(folder / "config.json"), Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "no step was saved"
        raise InputError(f"{folder}: no checkpoint {'' if step is None else step} to load; {have}")
    step = steps[-1] if step is None else step
    manifest = checkpoints.manifest(step)
    if run.phase == "pretrain":
        assert run.model is not None
        config, shapes = numerics(run.model), shapes_of(run.model)
        method: Method = Subset("all")
        below = None
    else:
        try:
            below = load_run(base or run.base, mesh)
        except InputError as error:
            raise InputError(f"the base of {folder}: {error} (where it is now: --base)") from None
        if "imported" in below.manifest:
            manifest = manifest | {"imported": below.manifest["imported"]}
        config, method = numerics(below.config, run.dtype, run.remat), run.method
        shapes = jax.eval_shape(lambda: below.merged)
        if fingerprint(below.merged) != manifest["base"]:
            raise InputError(
                f"{folder} was tuned on another base than {base or run.base} (fingerprint {manifest['base'][:12]}, "
                f"this one has {fingerprint(below.merged)[:12]}); give its own with --base"
            )
    make = partial(method.init, jax.random.key(0))
    like = jax.eval_shape(make, shapes)
    if below is None:  # a base has the dtypes it was written with; what a method trains is fp32
        kinds = {path: leaf["dtype"] for path, leaf in manifest["leaves"].get("trainable", {}).items()}
        like = {path: jax.ShapeDtypeStruct(x.shape, kinds.get(path, x.dtype)) for path, x in like.items()}
    if mesh is not None:
        like = sharded(like, follow(mesh, make, shapes, shardings(mesh, shapes)))
    trainable = checkpoints.restore(step, "trainable", like)
    checkpoints.close()
    params = below.merged if below else nested(trainable)
    tokenizer = load_tokenizer(folder)
    held_out = below.held_out if below else load_held_out(folder / "held_out.npz")
    return Loaded(folder, run, config, params, method, trainable, tokenizer, held_out, manifest)
