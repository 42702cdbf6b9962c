"""The loop: from a Run to a run directory."""

import contextlib
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from ..data.loader import Loader
from ..model.sharding import batch_sharding, make_mesh, put_batch
from .checkpoint import Checkpoints
from .config import Run, to_json
from .evaluate import held_out_losses, longest_answer, mean_loss, outputs, scored
from .inputs import save_held_out
from .optim import schedule
from .phase import Phase, prepare
from .progress import Log, console, plot_losses, read_metrics, step_flops
from .step import make_train_step


def train(run: Run) -> Path:
    """Run a phase to its end and return its directory. Raises InputError, before anything is written, for bad input."""
    folder = Path(run.out)
    _check_out(folder, run)
    mesh = make_mesh(run.mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * run.accumulate
    if run.data.batch % parts:
        raise InputError(f"--data.batch {run.data.batch} does not divide into {parts} (data x fsdp x accumulate)")
    with tempfile.TemporaryDirectory() as work, jax.set_mesh(mesh):
        phase = prepare(run, mesh, Path(work))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(to_json(phase.run), "utf-8")
        phase.tokenizer.save(folder)
        if run.phase == "pretrain":
            save_held_out(folder / "held_out.npz", phase.held_out)
        summary = _go(phase, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    curve = [(r["step"], r["loss"]) for r in read_metrics(folder) if "loss" in r]
    title = run.recipe or run.phase
    plot_losses(folder / "loss.png", {title: curve}, f"{title}: training loss")
    console.print(f"wrote {folder}/: config.json, metrics.jsonl, summary.json, loss.png, checkpoints/", soft_wrap=True)
    return folder


def _check_out(folder: Path, run: Run) -> None:
    if not run.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} is not an empty folder; take another, or go on with --resume")
    if run.resume and not (folder / "config.json").exists():
        raise InputError(f"--resume: {folder} holds no run to go on with; drop --resume, or correct --out")


def _go(phase: Phase, folder: Path) -> dict[str, Any]:
    """The loop proper: from the phase's state to the last step. Returns the summary."""
    run, checkpoints = phase.run, Checkpoints(folder / "checkpoints", phase.run.keep)
    next_row, rows_digest = _resume(phase, checkpoints) if run.resume else (0, "")
    first, loader = int(phase.state.step), Loader(phase.rows, run.data.batch, start=next_row)
    if first >= run.steps:
        raise InputError(f"--resume: {folder} is complete at step {first}; nothing is left to do")
    before = evaluate(phase, run.score_base) if run.phase == "finetune" and not first else {}
    found: dict[str, Any] = {}
    step, cost = _compile(phase)
    tokens = run.data.batch * run.data.T
    flops = step_flops(phase.model.config, phase.totals["base"], phase.totals["trainable"], tokens, run.data.T)
    put, rate, pending = put_batch(phase.mesh), schedule(run.optim, run.steps), []
    log = Log(folder, run.recipe or run.phase, run.steps, first, flops, run.tensorboard, run.wandb)
    with contextlib.closing(log):
        log.note(0, before)
        for i in range(first + 1, run.steps + 1):
            batch = next(loader)
            rows_digest = hashlib.sha256(rows_digest.encode() + np.int64(batch["row"]).tobytes()).hexdigest()
            phase.state, metrics = step(phase.state, phase.frozen, put({k: batch[k] for k in KEYS}))
            pending.append(metrics)
            last = i == run.steps
            if last or i % run.log_every == 0:
                log.step(i, _means(pending) | {"lr": float(rate(i - 1))}, len(pending) * tokens)
                pending = []
            with log.paused():
                found = {}  # a checkpoint has a score only if its own step was evaluated
                if last or (run.eval_every and i % run.eval_every == 0):
                    found = evaluate(phase, score=last)
                    log.note(i, found)
                if last or (run.save_every and i % run.save_every == 0):
                    items = {"trainable": phase.state.trainable, "optimizer": phase.state._replace(trainable=None)}
                    meta = _meta(phase, loader, rows_digest)
                    checkpoints.save(i, items, meta, found.get("held_out_loss"))
    checkpoints.close()
    return _summary(phase, folder, before, found, cost)


KEYS = {"ids": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "segments": jnp.int32, "positions": jnp.int32}


def _compile(phase: Phase) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and what the compiler says of its time and memory."""
    run, began = phase.run, time.perf_counter()
    step = make_train_step(phase.model, phase.method, phase.tx, accumulate=run.accumulate, chunk=run.chunk)
    shape, split = (run.data.batch, run.data.T), batch_sharding(phase.mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in KEYS.items()}
    where = jax.tree.map(lambda x: x.sharding, phase.state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    # XLA would cast a whole stack of half-precision layers before its loop: on a CPU, twice the base in fp32.
    stored = {x.dtype for x in jax.tree.leaves(phase.frozen)}
    lean = jax.default_backend() == "cpu" and bool(stored - {jnp.dtype(phase.model.config.dtype)})
    options: Any = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if lean else None
    compiled = jitted.lower(phase.state, phase.frozen, batch).compile(compiler_options=options)
    m: Any = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    seconds = round(time.perf_counter() - began, 2)
    return compiled, {"compile_seconds": seconds, "step_temp_bytes": m.temp_size_in_bytes, "step_peak_bytes": peak}


def _resume(phase: Phase, checkpoints: Checkpoints) -> tuple[int, str]:
    """Put the newest checkpoint into the phase. Returns the next row and the running digest of the rows."""
    steps = checkpoints.steps()
    if not steps:
        return 0, ""
    manifest = checkpoints.manifest(steps[-1])
    for what, now in (("data", phase.data_digest), ("base", phase.base), ("tokenizer", phase.tokenizer.digest)):
        if manifest[what] != now:
            raise InputError(
                f"--resume: the {what} changed since step {steps[-1]} (saved {manifest[what][:12]}, now {now[:12]}); "
                "go on with what the run began with, or start a new --out"
            )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), phase.state)
    trainable = checkpoints.restore(steps[-1], "trainable", like.trainable)
    rest = checkpoints.restore(steps[-1], "optimizer", like._replace(trainable=None))
    phase.state = rest._replace(trainable=trainable)
    console.print(f"resumed at step {steps[-1]} of {phase.run.steps}")
    return manifest["next_row"], manifest["rows_digest"]


def _means(pending: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps since the last log, the loss by target tokens; one transfer for all of them."""
    rows = jax.device_get(pending)
    targets = sum(float(r["targets"]) for r in rows)
    loss = sum(float(r["loss"]) * float(r["targets"]) for r in rows) / max(targets, 1.0)
    mean = {k: float(np.mean([r[k] for r in rows])) for k in ("grad_norm", "update_rms")}
    return {"loss": loss, "targets": targets, **mean, "skipped": sum(not r["ok"] for r in rows)}


def evaluate(phase: Phase, score: bool = True) -> dict[str, Any]:
    """Held-out loss of the base's domains and, with `score`, of the task: scores and some samples."""
    run, found = phase.run, {}
    method, trainable = phase.method, phase.state.trainable
    args = (phase.model, method.bind(phase.frozen, trainable), method.context(trainable))
    if phase.held_out:
        held = held_out_losses(*args, phase.held_out, run.data.batch, run.eval_tokens, put_batch(phase.mesh))
        found = {"held_out_loss": mean_loss(held), "held_out": held}
    if score and phase.task:
        rows = scored(phase.task, run.eval_rows)
        answers = outputs(*args, phase.tokenizer, rows, longest_answer(rows, phase.tokenizer))
        pairs = list(zip(rows, answers, strict=True))[:8]
        samples = [{"prompt": r["prompt"], "wanted": r["completion"], "got": a} for r, a in pairs]
        found |= {"scores": phase.task.score(rows, answers), "samples": samples}
    return found


def _meta(phase: Phase, loader: Loader, rows_digest: str) -> dict[str, Any]:
    """What a checkpoint says besides its arrays."""
    return {
        "phase": phase.run.phase,
        "base": phase.base,
        "tokenizer": phase.tokenizer.digest,
        "data": phase.data_digest,
        "seed": phase.run.seed,
        "next_row": loader.state()["next_row"],
        "rows_digest": rows_digest,
        "mesh": list(phase.mesh.devices.shape),
    }


def _summary(phase: Phase, folder: Path, before: Any, after: Any, cost: Any) -> dict[str, Any]:
    logged = [r for r in read_metrics(folder) if "seconds_per_step" in r]
    return {
        "recipe": phase.run.recipe,
        "method": type(phase.method).__name__.lower(),
        "steps": phase.run.steps,
        "loss": logged[-1]["loss"],
        "seconds_per_step": float(np.median([r["seconds_per_step"] for r in logged])),
        "skipped": int(phase.state.skipped),
        **phase.totals,
        **cost,
        "before": before,
        "after": after,
    }
