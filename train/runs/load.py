"""Load a base or a run: what a phase of graftax left, a Hugging Face checkpoint, or an HF PEFT adapter."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...data.tokenizers import Tokenizer, load_tokenizer
from ...model import Config, hf, shapes_of
from ...model.backend import backend
from ...model.hf.hub import fetch_checkpoint
from ...model.layout import convert_layout, set_layout, with_shardings
from ...model.pattern import pattern_source
from ...model.quantize import quantize_parameter
from ...model.sharding import shardings
from ...model.tree import name_and_layers, named, nested
from ...peft import Subset
from ...peft.sharding import adapter_shardings
from ..config import Data, Run, check_config_unchanged, from_json
from ..inputs import check_tokenizer, check_vocab, load_held_out
from ..progress import console
from . import report
from .adapters import adapter_base, load_adapter
from .checkpoint import CheckpointReader, Verify
from .files import CHECKPOINTS, CONFIG, HELD_OUT, check_run, is_adapter, is_hugging_face, resolve_path
from .lineage import read_lineage
from .loaded import LoadedRun
from .manifest import check_sidecars, fingerprint_of, leaf_digests

Restore = Callable[..., Any]  # (target, each=None) -> the trainable arrays of a checkpoint


def load_run(
    folder: str | Path,
    mesh: Any = None,
    step: int | None = None,
    base: str = "",
    layers: str = "",
    quantize: str = "",
    verify: Verify = "full",
) -> LoadedRun:
    """Load a run folder, a Hugging Face folder or hub id as a base, or an HF PEFT folder as an adapter.

    step: the checkpoint; None: the newest.
    base: where the run's base is now, if it moved.
    layers: `stacked` or `unrolled`; "": as the run has them.
    quantize: `int8` or `nf4`: base and adapter as one base whose matrices are quantised.
    verify: `full` checks the digest of every array and file, `fast` the sizes of the files, `off` only the manifest.

    Raises InputError for any other folder, a run without a checkpoint, and a base with another fingerprint.
    """
    if is_adapter(folder):
        name = adapter_base(Path(folder), base)
        loaded = load_adapter(Path(folder), load_run(name, mesh, layers=layers, verify=verify), name)
    elif is_hugging_face(folder):
        return load_hugging_face(folder, mesh, layers=layers, quantize=quantize)
    else:
        folder = check_run(folder)
        run, checkpoints = from_json(folder / CONFIG), CheckpointReader(folder / CHECKPOINTS)
        step = _choose_step(folder, checkpoints.steps(), step)
        manifest = checkpoints.manifest(step)
        check_config_unchanged(run, manifest, folder)
        check_sidecars(folder, manifest, verify)
        restore = partial(checkpoints.restore, step, "trainable", verify=verify)
        if run.phase == "pretrain":
            return _load_pretrained(folder, run, manifest, restore, mesh, layers, quantize)
        below = _load_base(folder, manifest, base or run.base, mesh, layers or run.layers, run.quantize, verify)
        loaded = _load_finetuned(folder, run, manifest, restore, mesh, below)
    return quantize_base(loaded, quantize, mesh) if quantize else loaded


def _choose_step(folder: Path, steps: list[int], step: int | None) -> int:
    """Return the requested step, or the newest."""
    if not steps or (step is not None and step not in steps):
        available = f"it has steps {', '.join(map(str, steps))}" if steps else "no step was saved"
        raise InputError(f"{folder}: no checkpoint {'' if step is None else step} to load; {available}")
    return steps[-1] if step is None else step


def _load_pretrained(
    folder: Path, run: Run, manifest: dict[str, Any], restore: Restore, mesh: Any, layers: str, quantize: str
) -> LoadedRun:
    """Load the checkpoint of a base."""
    assert run.model is not None
    config = set_layout(run.model, layers)
    dtypes = {name_and_layers(path)[0]: leaf["dtype"] for path, leaf in manifest["leaves"].get("trainable", {}).items()}
    target = {
        path: jax.ShapeDtypeStruct(x.shape, dtypes.get(name_and_layers(path)[0], x.dtype))
        for path, x in named(shapes_of(config)).items()
    }
    if mesh is not None:
        target = with_shardings(target, named(shardings(mesh, nested(target))))
    each, rows = quantize_on_load(quantize, mesh) if quantize else (None, [])
    arrays = restore(target, each)
    tokenizer, held_out = _load_tokenizer(folder, run, config, manifest), load_held_out(folder / HELD_OUT)
    config, method, trainable = with_compute_dtype(config), Subset("all"), {} if quantize else arrays
    origin = fingerprint_of(rows) if quantize else ""
    return LoadedRun(folder, run, config, nested(arrays), method, trainable, tokenizer, held_out, manifest, origin)


def _load_base(
    folder: Path, manifest: dict[str, Any], name: str, mesh: Any, layers: str, quantize: str, verify: Verify
) -> LoadedRun:
    """Load the base that a run was tuned on. Raises InputError if there is none, or another one."""
    try:
        base = load_run(name, mesh, layers=layers, quantize=quantize, verify=verify)
    except InputError as error:
        raise InputError(f"the base of {folder}: {error} (if it moved: --base)") from None
    if base.fingerprint != manifest["base"]:
        raise InputError(
            f"{folder} was tuned on another base than {name} (fingerprint {manifest['base'][:12]}, this one has "
            f"{base.fingerprint[:12]}); give its base with --base"
        )
    return base


def _load_finetuned(
    folder: Path, run: Run, manifest: dict[str, Any], restore: Restore, mesh: Any, base: LoadedRun
) -> LoadedRun:
    """Load the checkpoint of a fine-tune of a loaded base."""
    params = base.base
    shapes = jax.eval_shape(lambda params: params, params)  # an argument: traced, the base would cache tracers
    with pattern_source(folder / CONFIG):
        target = jax.eval_shape(run.method.init, jax.random.key(0), shapes)
    if mesh is not None:
        target = with_shardings(target, adapter_shardings(mesh, run.method, target, shapes, shardings(mesh, shapes)))
    trainable, config = restore(target), with_compute_dtype(base.config, run.dtype, run.remat)
    tokenizer = _load_tokenizer(folder, run, config, manifest)
    manifest = manifest | {key: base.manifest[key] for key in ("imported",) if key in base.manifest}
    return LoadedRun(folder, run, config, params, run.method, trainable, tokenizer, base.held_out, manifest)


def _load_tokenizer(folder: Path, run: Run, config: Config, manifest: dict[str, Any]) -> Tokenizer:
    """Load the tokenizer of a run, with the run's date for its chat template."""
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, manifest.get("tokenizer", ""), folder)
    check_vocab(tokenizer, config.V, f"{folder}: ")
    return dataclasses.replace(tokenizer, date=run.date)


def load_hugging_face(
    name: str | Path, mesh: Any = None, dtype: Any = None, check: bool = True, layers: str = "", quantize: str = ""
) -> LoadedRun:
    """Load a Hugging Face folder or hub id as a base, with its tokenizer.

    The parameters are laid out on the mesh, in `dtype` or the dtype on disk. check: whether the tokenizer must fit.
    """
    start, folder = time.perf_counter(), fetch_checkpoint(str(name))
    tokenizer = load_tokenizer(folder)
    each, rows = quantize_on_load(quantize, mesh) if quantize else (None, [])
    config, params = convert_layout(*hf.load(folder, dtype, mesh, each), layers, mesh, quantize)
    if check:
        check_vocab(tokenizer, config.V, f"{folder}: ")
    total, kind = sum(x.size for x in named(params).values()), config.param_dtype + (quantize and f" as {quantize}")
    size, seconds = report.format_bytes(report.nbytes(params)), time.perf_counter() - start
    text = f"read {name}: {config.family}, {total:,} parameters, {kind}, {size} in {seconds:.1f} s"
    console.print(text, soft_wrap=True)
    data = Data(T=min(512, config.context))
    run = Run(phase="pretrain", recipe="imported", out=str(name), model=config, data=data)
    manifest = {"step": 0, "phase": "pretrain", "base": "", "tokenizer": tokenizer.digest}
    manifest |= {"imported": resolve_path(name), "lineage": read_lineage(folder)}
    config, method, origin = with_compute_dtype(config), Subset("all"), fingerprint_of(rows) if quantize else ""
    return LoadedRun(folder, run, config, params, method, {}, tokenizer, {}, manifest, origin)


def with_compute_dtype(config: Config, dtype: str = "", remat: Any = "") -> Config:
    """Return the config with the dtype of its products and its `remat` policy set, where they are given.

    On a CPU, which has no fast half-precision product, an imported model computes in fp32.
    """
    imported_on_cpu = config.family and backend() == "cpu"
    default = "float32" if imported_on_cpu else config.dtype
    return dataclasses.replace(config, dtype=dtype or default, remat=remat or config.remat)


def quantize_on_load(kind: str, mesh: Any) -> tuple[Callable[[str, Any], Any], list[Any]]:
    """Return (each, rows): `each(path, parameter)` quantises a parameter while a base is read, one at a time, and adds
    its leaf digests to `rows`, so that the base keeps the fingerprint of the parameters it was made of."""
    rows: list[Any] = []

    def each(path: str, leaf: Any) -> Any:
        rows.extend(leaf_digests(path, leaf))
        return jax.block_until_ready(quantize_parameter(path, leaf, kind, mesh=mesh))

    return each, rows


def quantize_base(loaded: LoadedRun, kind: str, mesh: Any) -> LoadedRun:
    """Return base and adapter as one quantised base. The merged base is in memory while it is quantised."""
    each, _ = quantize_on_load(kind, mesh)
    params = nested({path: each(path, leaf) for path, leaf in named(loaded.merged).items()})
    base = dataclasses.replace(loaded, params=params, method=Subset("all"), trainable={})
    return dataclasses.replace(base, quantized_from=loaded.fingerprint)
