"""The plan of one run, from shapes alone: by the compiled program where there is a compiler, otherwise by a model."""

import dataclasses
import re
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from ...data.tokenizers import load_tokenizer
from ...model import Config, Transformer, hf, presets, shapes_of
from ...model.backend import target_backend
from ...model.hf.hub import did_you_mean_folder
from ...model.layout import set_layout
from ...strict_json import read_json
from ..config import Run, did_you_mean, from_json
from ..inputs import check_row_length
from ..progress import step_flops
from ..runs.checkpoint import CheckpointWriter
from ..runs.files import check_run, is_hugging_face
from ..runs.load import with_compute_dtype
from ..setup import BATCH_DTYPES, Layout, base_shapes, check_batch, layout, lower
from . import hlo, roofline
from .estimate import estimate_collectives, shard_bytes, trace_step
from .hlo import Collective
from .topology import Target, silence_stderr
from .trace import Cost

KINDS = ("weights", "trainable", "gradients", "optimizer", "activations", "temporaries")
_OUT_OF_MEMORY = (
    r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)


@dataclasses.dataclass
class Program:
    """What a compiled program, or the model of one, says of a step."""

    source: str  # "compiled" or "model"
    collectives: list[Collective]
    total: float  # bytes per device
    memory: float  # bytes per device that there are
    compile_seconds: float = 0.0
    analysis: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes of arguments and temporaries


def make_plan(run: Run, target: Target, compiling: bool = True) -> dict[str, Any]:
    """Return the plan of one run on one target as JSON. Raises InputError for what the run itself would refuse."""
    with target_backend(target.platform):
        run, config = resolve_architecture(run)
        check_row_length(run.data, config.context)
        mesh = target.mesh(run.mesh)
        check_batch(run, mesh)
        with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
            placed = layout(run, mesh, base_shapes(run, config))
        cost = trace_step(run, config, mesh, placed, target.platform)
        sizes = state_bytes(placed) | {
            "gradients": cost.gradients,
            "activations": cost.activations,
            "temporaries": max(cost.peak - cost.gradients - cost.activations, 0.0),
        }
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
        batch_bytes = run.data.batch * run.data.T * sum(jnp.dtype(d).itemsize for d in BATCH_DTYPES.values()) / shards
        total = sum(sizes.values()) + batch_bytes
        collectives = estimate_collectives(run, config, mesh, placed)
        program = Program("model", collectives, total, target.chip.memory)
        if compiling and target.devices:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                program, sizes = _compile(run, config, mesh, placed, sizes, program)
    return _to_json(run, config, target, mesh, placed, sizes, cost, program)


def resolve_architecture(run: Run) -> tuple[Run, Config]:
    """Return (the run, its config) as the run itself would resolve them, from config files alone."""
    if run.phase == "pretrain":
        config = _config_of(run.base) if run.base else run.model
        if config is None:
            raise InputError("pretraining needs an architecture: take a recipe that has one, or give --base PRESET")
        if not run.base and run.data.domains:
            V = load_tokenizer(Path(run.data.tokenizer)).vocab_size if run.data.tokenizer else run.data.vocab
            config = dataclasses.replace(config, V=V)
        config = set_layout(config, run.layers)
        return dataclasses.replace(run, model=config, steps=max(run.steps, 1)), config
    if not run.base:
        raise InputError(f"fine-tuning starts from a base: give --base RUN, FOLDER or PRESET ({', '.join(presets)})")
    config = with_compute_dtype(_config_of(run.base), run.dtype, run.remat)
    return dataclasses.replace(run, steps=run.steps or 1000), set_layout(config, run.layers)


def _config_of(base: str) -> Config:
    """Return the architecture of a preset, a Hugging Face folder, or a run directory, by its config.json alone."""
    if base in presets:
        return presets[base]
    if not Path(base).exists():
        hint = did_you_mean(base, presets) or did_you_mean_folder(base)
        raise InputError(f"--base {base!r} is neither a preset nor a folder{hint}; a plan does not download models; "
                         f"presets: {', '.join(presets)}")  # fmt: skip
    if is_hugging_face(base):
        return hf.config_from_hf(read_json(Path(base) / "config.json"), f"{base}/config.json")
    run = from_json(check_run(base) / "config.json")
    if run.phase == "finetune":
        return with_compute_dtype(_config_of(run.base), run.dtype, run.remat)
    assert run.model is not None
    checkpoints = CheckpointWriter(Path(base) / "checkpoints")
    steps = checkpoints.steps()
    leaves = checkpoints.manifest(steps[-1])["leaves"].get("trainable", {}) if steps else {}
    dtype = leaves.get("embed/table", {}).get("dtype", "float32")
    return dataclasses.replace(run.model, param_dtype=dtype)


def state_bytes(placed: Layout) -> dict[str, float]:
    """Return the bytes on one device of what a step takes: frozen weights, trained parameters, optimizer state."""
    (frozen, state), (frozen_sharding, state_sharding) = placed.shapes, placed.shardings
    parts = {
        "weights": (frozen, frozen_sharding),
        "trainable": (state.trainable, state_sharding.trainable),
        "optimizer": (state.opt_state, state_sharding.opt_state),
    }
    return {kind: sum(map(shard_bytes, *map(jax.tree.leaves, trees))) for kind, trees in parts.items()}


def compile_from_shapes(run: Run, config: Config, mesh: Any, placed: Layout) -> Any:
    """Return the compiled step of a run, from shapes."""
    frozen, state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), placed.shapes, placed.shardings
    )
    setup = SimpleNamespace(
        run=run, mesh=mesh, model=Transformer(config), method=run.method, frozen=frozen, state=state, tx=placed.tx
    )
    lowered, options = lower(setup)
    return lowered.compile(compiler_options=options)


def _compile(
    run: Run, config: Config, mesh: Any, placed: Layout, sizes: dict[str, float], model: Program
) -> tuple[Program, dict[str, float]]:
    """Return (what the compiler says, the sizes with the temporary memory of the compiled program)."""
    start = time.perf_counter()
    try:
        with silence_stderr():
            program = compile_from_shapes(run, config, mesh, placed)
    except jax.errors.JaxRuntimeError as error:
        limits = parse_out_of_memory(str(error))
        if limits is None:
            raise
        return dataclasses.replace(
            model, source="compiled", total=limits[0], memory=limits[1], compile_seconds=time.perf_counter() - start
        ), sizes
    m: Any = program.memory_analysis()
    gradients = min(sizes["gradients"], m.temp_size_in_bytes)
    activations = min(sizes["activations"], max(m.temp_size_in_bytes - sizes["gradients"], 0.0))
    temporaries = m.temp_size_in_bytes - gradients - activations
    return Program(
        "compiled",
        hlo.collectives(program.as_text(), mesh),
        total=m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes,
        memory=model.memory,
        compile_seconds=time.perf_counter() - start,
        analysis={"arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes},
    ), sizes | {"gradients": gradients, "activations": activations, "temporaries": temporaries}


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
    """Return (bytes needed, bytes available) of XLA's out-of-memory error; None for another error."""
    match = next(filter(None, (re.search(pattern, message) for pattern in _OUT_OF_MEMORY)), None)
    if not match:
        return None
    unit = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    return float(match[1]) * 2.0 ** unit[match[2]], float(match[3]) * 2.0 ** unit[match[4]]


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _to_json(
    run: Run, config: Config, target: Target, mesh: Any, placed: Layout, sizes: Any, cost: Cost, program: Program
) -> dict[str, Any]:
    sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for c in program.collectives:
        sent["+".join(c.axes)][c.kind] += c.sent
    times = roofline.times(target.chip, cost.flops, cost.moved, sum(c.sent for c in program.collectives), config.dtype)
    parameters, trainable = _count(shapes_of(config)), _count(placed.trainable)
    tokens = run.data.batch * run.data.T
    flops = step_flops(config, parameters, trainable, tokens, run.data.T)
    return {
        "recipe": run.recipe, "phase": run.phase, "base": run.base, "method": type(run.method).__name__.lower(),
        "topology": target.name, "chip": target.chip.name, "devices": target.n, "mesh": dict(mesh.shape),
        "T": run.data.T, "batch": run.data.batch, "accumulate": run.accumulate, "remat": config.remat,
        "dtype": config.dtype, "quantize": run.quantize, "source": program.source, "compiler": target.source,
        "compile_seconds": round(program.compile_seconds, 1), "parameters": parameters, "trainable": trainable,
        "bytes": sizes | {"total": program.total}, "memory": program.memory,
        "fits": program.total <= program.memory, "left": program.memory - program.total,
        "flops": {"step": cost.flops * target.n, "device": cost.flops, "model": flops}, "moved": cost.moved,
        "sent": {axes: dict(kinds) for axes, kinds in sent.items()},
        "seconds": {"compute": times.compute, "memory": times.memory, "links": times.links, "best": times.best,
                    "expected": times.expected},
        "tokens_per_second": tokens / times.expected, "mfu": flops / target.n / target.chip.flops / times.expected,
        **program.analysis,
    }  # fmt: skip
