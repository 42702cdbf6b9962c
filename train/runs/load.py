"""Load a base or a run: what a phase of graftax left, a Hugging Face checkpoint, or an HF PEFT adapter."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ...model import Config, hf, shapes_of
from ...model.backend import backend
from ...model.hf.files import fetch
from ...model.layout import convert_layout, set_layout, with_shardings
from ...model.pattern import pattern_source
from ...model.quantize import quantized
from ...model.sharding import infer_adapter_shardings, shardings
from ...model.tree import canonical, named, nested
from ...peft import Subset
from ..config import Data, Run, check_config_unchanged, from_json
from ..inputs import check_rows, check_tokenizer, load_held_out
from ..progress import console
from . import report
from .adapters import adapter_base, load_adapter
from .checkpoint import CheckpointReader, Verify
from .files import CHECKPOINTS, CONFIG, HELD_OUT, check_run, is_adapter, is_hugging_face, resolve_path
from .lineage import read_lineage
from .loaded import LoadedRun
from .manifest import check_sidecars, fingerprint_of, leaf_digests


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
    if is_hugging_face(folder) and not is_adapter(folder):
        return load_hugging_face(folder, mesh, layers=layers, quantize=quantize)
    if is_adapter(folder):
        name = adapter_base(Path(folder), base)
        loaded = load_adapter(Path(folder), load_run(name, mesh, layers=layers, verify=verify), name)
    else:
        folder = check_run(folder)
        run, checkpoints = from_json(folder / CONFIG), CheckpointReader(folder / CHECKPOINTS)
        step = _choose_step(folder, checkpoints.steps(), step)
        check_config_unchanged(run, checkpoints.manifest(step), folder)
        check_sidecars(folder, checkpoints.manifest(step), verify)
        if run.phase == "pretrain":
            return _load_pretrained(folder, run, checkpoints, step, mesh, layers, quantize, verify)
        loaded = _load_finetuned(folder, run, checkpoints, step, mesh, base or run.base, layers or run.layers, verify)
    return quantize_base(loaded, quantize, mesh) if quantize else loaded


def _choose_step(folder: Path, steps: list[int], step: int | None) -> int:
    """Return the requested step, or the newest."""
    if not steps or (step is not None and step not in steps):
        available = f"it has steps {', '.join(map(str, steps))}" if steps else "no step was saved"
        raise InputError(f"{folder}: no checkpoint {'' if step is None else step} to load; {available}")
    return steps[-1] if step is None else step


def _load_pretrained(
    folder: Path,
    run: Run,
    checkpoints: CheckpointReader,
    step: int,
    mesh: Any,
    layers: str,
    quantize: str,
    verify: Verify,
) -> LoadedRun:
    """Load the checkpoint of a base."""
    assert run.model is not None
    config, manifest = set_layout(run.model, layers), checkpoints.manifest(step)
    leaves = manifest["leaves"].get("trainable", {})
    dtypes = {canonical(path)[0]: leaf["dtype"] for path, leaf in leaves.items()}
    target = {
        path: jax.ShapeDtypeStruct(x.shape, dtypes.get(canonical(path)[0], x.dtype))
        for path, x in named(shapes_of(config)).items()
    }
    if mesh is not None:
        target = with_shardings(target, named(shardings(mesh, nested(target))))
    each, rows = quantize_on_load(quantize, mesh) if quantize else (None, [])
    arrays = checkpoints.restore(step, "trainable", target, each, verify)
    tokenizer = _load_tokenizer(folder, run, config, manifest)
    return LoadedRun(
        folder, run, with_compute_dtype(config), nested(arrays), Subset("all"), {} if quantize else arrays, tokenizer,
        load_held_out(folder / HELD_OUT), manifest, fingerprint_of(rows) if quantize else "",
    )  # fmt: skip


def _load_finetuned(
    folder: Path,
    run: Run,
    checkpoints: CheckpointReader,
    step: int,
    mesh: Any,
    base_name: str,
    layers: str,
    verify: Verify,
) -> LoadedRun:
    """Load the checkpoint of a fine-tune, and the base that it was tuned on."""
    manifest = checkpoints.manifest(step)
    try:
        base = load_run(base_name, mesh, layers=layers, quantize=run.quantize, verify=verify)
    except InputError as error:
        raise InputError(f"the base of {folder}: {error} (if it moved: --base)") from None
    if base.fingerprint != manifest["base"]:
        raise InputError(
            f"{folder} was tuned on another base than {base_name} (fingerprint {manifest['base'][:12]}, this one has "
            f"{base.fingerprint[:12]}); give its base with --base"
        )
    if "imported" in base.manifest:
        manifest = manifest | {"imported": base.manifest["imported"]}
    params, init = base.base, partial(run.method.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda params: params, params)  # an argument: traced, the base would cache tracers
    with pattern_source(folder / CONFIG):
        target = jax.eval_shape(init, shapes)
    if mesh is not None:
        target = with_shardings(target, infer_adapter_shardings(mesh, init, shapes, shardings(mesh, shapes)))
    trainable = checkpoints.restore(step, "trainable", target, verify=verify)
    config = with_compute_dtype(base.config, run.dtype, run.remat)
    tokenizer = _load_tokenizer(folder, run, config, manifest)
    return LoadedRun(folder, run, config, params, run.method, trainable, tokenizer, base.held_out, manifest)


def _load_tokenizer(folder: Path, run: Run, config: Config, manifest: dict[str, Any]) -> Tokenizer:
    """Load the tokenizer of a run, with the run's date for its chat template."""
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, manifest.get("tokenizer", ""), folder)
    check_rows(tokenizer, config.V, f"{folder}: ")
    return dataclasses.replace(tokenizer, date=run.date)


def load_hugging_face(
    name: str | Path, mesh: Any = None, dtype: Any = None, check: bool = True, layers: str = "", quantize: str = ""
) -> LoadedRun:
    """Load a Hugging Face folder or hub id as a base, with its tokenizer.

    The parameters are laid out on the mesh, in `dtype` or the dtype on disk. check: whether the tokenizer must fit.
    """
    start, folder = time.perf_counter(), fetch(str(name))
    tokenizer = load_tokenizer(folder)
    each, rows = quantize_on_load(quantize, mesh) if quantize else (None, [])
    config, params = convert_layout(*hf.load(folder, dtype, mesh, each), layers, mesh, quantize)
    if check:
        check_rows(tokenizer, config.V, f"{folder}: ")
    total, kind = sum(x.size for x in named(params).values()), config.param_dtype + (quantize and f" as {quantize}")
    size, seconds = report.size(report.nbytes(params)), time.perf_counter() - start
    console.print(
        f"read {name}: {config.family}, {total:,} parameters, {kind}, {size} in {seconds:.1f} s", soft_wrap=True
    )
    data = Data(T=min(512, config.context))
    run = Run(phase="pretrain", recipe="imported", out=str(name), model=config, data=data)
    manifest = {
        "step": 0,
        "base": "",
        "phase": "pretrain",
        "tokenizer": tokenizer.digest,
        "imported": resolve_path(name),
        "lineage": read_lineage(folder),
    }
    return LoadedRun(
        folder, run, with_compute_dtype(config), params, Subset("all"), {}, tokenizer, {}, manifest,
        fingerprint_of(rows) if quantize else "",
    )  # fmt: skip


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
        return jax.block_until_ready(quantized(path, leaf, kind, mesh=mesh))

    return each, rows


def quantize_base(loaded: LoadedRun, kind: str, mesh: Any) -> LoadedRun:
    """Return base and adapter as one quantised base. The merged base is in memory while it is quantised."""
    each, _ = quantize_on_load(kind, mesh)
    params = nested({path: each(path, leaf) for path, leaf in named(loaded.merged).items()})
    return dataclasses.replace(
        loaded, params=params, method=Subset("all"), trainable={}, quantized_from=loaded.fingerprint
    )
