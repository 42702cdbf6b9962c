"""What one run needs, without making an array: from the compiled program where a compiler is at hand, else a model."""

import dataclasses
import re
import time
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
from ...model.layout import set_layout as stacked_or_not
from ...strict_json import read_json
from ..config import Run, did_you_mean, from_json
from ..inputs import check_row_length
from ..progress import step_flops
from ..runs.checkpoint import CheckpointWriter
from ..runs.files import check_run, is_hugging_face
from ..runs.load import with_compute_dtype
from ..setup import BATCH_DTYPES, Layout, base_shapes, check_batch, layout, lower
from . import hlo, roofline
from .estimate import links, shard, traced
from .topology import Target, silent

KINDS = ("weights", "trainable", "gradients", "optimizer", "activations", "temporaries")


def planned(run: Run, target: Target, compiling: bool = True) -> dict[str, Any]:
    """The plan of one run on one target, as JSON. Raises InputError for what the run itself would refuse."""
    with target_backend(target.platform):
        run, config = architecture(run)
        check_row_length(run.data, config.context)
        mesh = target.mesh(run.mesh)
        check_batch(run, mesh)
        inside = getattr(mesh, "abstract_mesh", mesh)
        with jax.sharding.use_abstract_mesh(inside):
            laid = layout(run, mesh, base_shapes(run, config))
        cost = traced(run, config, mesh, laid, target.platform)
        sizes = held(laid) | {"gradients": cost.gradients, "activations": cost.kept,
                              "temporaries": max(cost.peak - cost.gradients - cost.kept, 0.0)}  # fmt: skip
        found: dict[str, Any] = {"collectives": links(run, config, mesh, laid), "source": "model"}
        if compiling and target.devices:
            with jax.sharding.use_abstract_mesh(inside):
                found |= compiled(run, config, mesh, laid, sizes)
    counts = {"parameters": _count(shapes_of(config)), "trainable": _count(laid.trainable)}
    return _row(run, config, target, mesh, counts, sizes, cost, found)


def architecture(run: Run) -> tuple[Run, Config]:
    """(the run, its config) as the run itself would have them, from config files alone."""
    if run.phase == "pretrain":
        config = config_of(run.base) if run.base else run.model
        if config is None:
            raise InputError("pretraining needs an architecture: take a recipe that has one, or give --base PRESET")
        if not run.base and run.data.domains:
            V = load_tokenizer(Path(run.data.tokenizer)).vocab_size if run.data.tokenizer else run.data.vocab
            config = dataclasses.replace(config, V=V)
        config = stacked_or_not(config, run.layers)
        return dataclasses.replace(run, model=config, steps=max(run.steps, 1)), config
    if not run.base:
        raise InputError(f"fine-tuning starts from a base: give --base RUN, FOLDER or PRESET ({', '.join(presets)})")
    config = with_compute_dtype(config_of(run.base), run.dtype, run.remat)
    return dataclasses.replace(run, steps=run.steps or 1000), stacked_or_not(config, run.layers)


def config_of(base: str) -> Config:
    """The architecture of a preset, a Hugging Face folder, or a run directory, by its config.json alone."""
    if base in presets:
        return presets[base]
    if not Path(base).exists():
        near = did_you_mean(base, presets) or did_you_mean_folder(base)
        raise InputError(f"--base {base!r} is no preset and no folder here{near}; a plan downloads nothing; presets: "
                         f"{', '.join(presets)}")  # fmt: skip
    if is_hugging_face(base):
        return hf.config_from_hf(read_json(Path(base) / "config.json"), f"{base}/config.json")
    run = from_json(check_run(base) / "config.json")
    if run.phase == "finetune":
        return with_compute_dtype(config_of(run.base), run.dtype, run.remat)
    assert run.model is not None
    checkpoints = CheckpointWriter(Path(base) / "checkpoints")
    steps = checkpoints.steps()
    leaves = checkpoints.manifest(steps[-1])["leaves"].get("trainable", {}) if steps else {}
    stored = leaves.get("embed/table", {}).get("dtype", "float32")
    return dataclasses.replace(run.model, param_dtype=stored)


def held(laid: Layout) -> dict[str, float]:
    """Bytes on one device of what a step is given: frozen weights, what trains, and the optimizer's state."""
    (frozen, state), where = laid.shapes, laid.shardings
    parts = {"weights": (frozen, where[0]), "trainable": (state.trainable, where[1].trainable),
             "optimizer": (state.opt_state, where[1].opt_state)}  # fmt: skip
    return {kind: sum(map(shard, jax.tree.leaves(made), jax.tree.leaves(at))) for kind, (made, at) in parts.items()}


def compiled(run: Run, config: Config, mesh: Any, laid: Layout, sizes: dict[str, float]) -> dict[str, Any]:
    """What the compiler says; `sizes` is corrected: the temporaries are those of the program."""
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    frozen, state = jax.tree.map(struct, laid.shapes, laid.shardings)
    phase = SimpleNamespace(run=run, mesh=mesh, model=Transformer(config), method=run.method, frozen=frozen,
                            state=state, tx=laid.tx)  # fmt: skip
    began = time.perf_counter()
    try:
        with silent():
            lowered, options = lower(phase)
            program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needs = too_much(str(error))
        if needs is None:
            raise
        return {"source": "compiled", "seconds": time.perf_counter() - began, "needs": needs[0], "memory": needs[1]}
    m: Any = program.memory_analysis()
    rest = max(m.temp_size_in_bytes - sizes["gradients"], 0.0)
    sizes["activations"] = min(sizes["activations"], rest)
    sizes["gradients"] = min(sizes["gradients"], m.temp_size_in_bytes)
    sizes["temporaries"] = m.temp_size_in_bytes - sizes["gradients"] - sizes["activations"]
    total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return {"source": "compiled", "seconds": time.perf_counter() - began, "needs": total,
            "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
            "collectives": hlo.collectives(program.as_text(), mesh)}  # fmt: skip


def too_much(message: str) -> tuple[float, float] | None:
    """(bytes that a program needs, bytes that there are) of XLA's refusal; None if it is about something else."""
    size = r"([\d.]+)([KMGT]?)"
    used = re.search(rf"[Uu]sed {size} of {size} hbm", message)
    used = used or re.search(rf"\({size}\) exceeds available HBM \({size}\)", message)
    if not used:
        return None
    unit = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    return float(used[1]) * 2.0 ** unit[used[2]], float(used[3]) * 2.0 ** unit[used[4]]


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _row(run: Run, config: Config, target: Target, mesh: Any, counts: Any, sizes: Any, cost: Any, found: Any) -> Any:
    """The plan as JSON."""
    batch = sum(run.data.batch * run.data.T * jnp.dtype(d).itemsize for d in BATCH_DTYPES.values())
    own = sum(sizes.values()) + batch / mesh.shape["data"] / mesh.shape["fsdp"] / mesh.shape["context"]
    total, memory = found.get("needs", own), found.get("memory", target.chip.memory)
    sent: dict[str, dict[str, float]] = {}
    for c in found["collectives"]:
        by = sent.setdefault("+".join(c.axes), {})
        by[c.kind] = by.get(c.kind, 0.0) + c.sent
    over_links = sum(c.sent for c in found["collectives"])
    times = roofline.times(target.chip, cost.flops, cost.moved, over_links, config.dtype)
    tokens = run.data.batch * run.data.T
    model = step_flops(config, counts["parameters"], counts["trainable"], tokens, run.data.T)
    seconds = {"compute": times.compute, "memory": times.memory, "links": times.links, "best": times.best,
               "expected": times.expected}  # fmt: skip
    return {
        "recipe": run.recipe, "phase": run.phase, "base": run.base, "method": type(run.method).__name__.lower(),
        "topology": target.name, "chip": target.chip.name, "devices": target.n, "mesh": dict(mesh.shape),
        "T": run.data.T, "batch": run.data.batch, "accumulate": run.accumulate, "remat": config.remat,
        "dtype": config.dtype, "quantize": run.quantize, "source": found["source"], "compiler": target.source,
        "compile_seconds": round(found.get("seconds", 0.0), 1), **counts, "bytes": sizes | {"total": total},
        "memory": memory, "fits": total <= memory, "left": memory - total,
        "flops": {"step": cost.flops * target.n, "device": cost.flops, "model": model}, "moved": cost.moved,
        "sent": sent, "seconds": seconds, "tokens_per_second": tokens / times.expected,
        "mfu": model / target.n / target.chip.flops / times.expected,
        **{k: found[k] for k in ("arguments", "temporaries") if k in found},
    }  # fmt: skip
