"""Read and check all that a run needs, and lay it out on the mesh, before the run writes anything."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from ...model import Config, Transformer, init, shapes_of
from ...model.layout import set_layout
from ...model.sharding import shardings
from ..cluster import distributed
from ..config import Run
from ..health import nonfinite_paths
from ..inputs import check_row_length, corpus_and_tokenizer, report_split_sizes, tuning_rows
from ..progress import console
from ..setup import TrainSetup, layout, resolve_method, virtual_tokens
from . import report
from .added_tokens import untrained_tokens
from .files import folder_digest, resolve_path
from .load import load_run, with_compute_dtype
from .loaded import LoadedRun


def prepare(run: Run, mesh: Any, work: Path) -> TrainSetup:
    """Read and check everything, report what trains, and lay it out on the mesh. Writes nothing outside `work`."""
    return (_pretraining if run.phase == "pretrain" else _tuning)(run, mesh, work)


def _pretraining(run: Run, mesh: Any, work: Path) -> TrainSetup:
    if run.model is None:
        raise InputError("pretraining needs an architecture: use a recipe that has one, or set --model")
    if run.data.valid or run.data.test:
        raise InputError("--data.valid and --data.test are files of examples for fine-tuning; drop them")
    if run.steps < 1:
        raise InputError(f"--steps {run.steps}: pretraining needs 1 or more")
    check_row_length(run.data, run.model.context)
    corpus, tokenizer = corpus_and_tokenizer(run.data, run.seed, work)
    config = set_layout(dataclasses.replace(run.model, V=tokenizer.vocab_size), run.layers)
    run = dataclasses.replace(run, model=config)
    _warn_few_rows(sum(corpus.rows.values()), run)
    console.print("tokens per domain: " + " · ".join(f"{name} {n:,}" for name, n in corpus.tokens.items()))
    params_shardings = shardings(mesh, shapes_of(config))
    params = jax.jit(init, static_argnums=0, out_shardings=params_shardings)(config, jax.random.key(run.seed))
    setup = _lay_out(run, mesh, config, params, corpus.train, corpus.digest, tokenizer, corpus.held_out)
    setup.data_sizes = {f"tokens of {name}": n for name, n in corpus.tokens.items()}
    return setup


def _tuning(run: Run, mesh: Any, work: Path) -> TrainSetup:
    if not run.base:
        raise InputError("fine-tuning starts from a base: give --base RUN, a Hugging Face folder, or a hub id")
    distributed.check_agreement("the base", {"base": folder_digest(Path(run.base))})
    base = load_base(run, mesh)
    config = with_compute_dtype(base.config, run.dtype, run.remat)
    method = resolve_method(run.method, base.tokenizer, run.seed)
    virtual = virtual_tokens(method, base.base)
    check_row_length(run.data, config.context, virtual if config.learned_positions else 0)
    task, sft = tuning_rows(run.data, run.seed, base.tokenizer, config.V, config, virtual)
    steps = run.steps or max(round(run.epochs * len(sft.rows) / run.data.batch), 1)
    run = dataclasses.replace(run, steps=steps, base=resolve_path(run.base), method=method)
    _warn_few_rows(len(sft.rows), run)
    report_split_sizes(task)
    filled = sft.tokens / (len(sft.rows) * run.data.T)
    rows = f"{sft.examples:,} examples in {len(sft.rows):,} rows of {run.data.T} ({filled:.0%} filled)"
    console.print(f"{task.name}: {rows}, {sft.target_tokens:,} target tokens; {steps} steps", soft_wrap=True)
    params, fingerprint = base.base, base.fingerprint
    untrained = untrained_tokens(method, params, base.manifest.get("added_tokens", {}), sft.rows)
    setup = _lay_out(run, mesh, config, params, sft.train, sft.digest, base.tokenizer, base.held_out)
    distributed.check_agreement("the base", {"base": fingerprint})
    return dataclasses.replace(
        setup,
        task=task,
        valid=sft.valid,
        base_fingerprint=fingerprint,
        lineage=base.lineage,
        untrained_tokens=untrained,
        data_sizes={"examples": sft.examples, "target tokens": sft.target_tokens},
    )


def load_base(run: Run, mesh: Any) -> LoadedRun:
    """Load the base of a fine-tuning run, with a tokenizer whose chat template writes the run's date.

    Raises InputError for a parameter of the base that holds NaN or infinity.
    """
    base = load_run(run.base, mesh, layers=run.layers, quantize=run.quantize, verify=run.verify)
    if bad := nonfinite_paths(base.base):
        others = f" (and so do {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"{run.base}: the parameter {bad[0]} holds NaN or infinity{others}, so nothing can be trained on it; copy "
            "the base again, or use an earlier checkpoint or another base"
        )
    return dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, date=run.date))


def _warn_few_rows(rows: int, run: Run) -> None:
    if rows < (batch := run.data.batch):
        console.print(f"the batch of {batch} is larger than the dataset of {rows} rows: rows repeat within a step")


def _lay_out(
    run: Run, mesh: Any, config: Config, params: Any, rows: Any, digest: str, tokenizer: Any, held_out: Any
) -> TrainSetup:
    """Report what trains, then split the base by the method and lay everything out on the mesh. `params` is used up."""
    distributed.check_agreement("the data", {"data": digest, "tokenizer": tokenizer.digest})
    shapes, method = jax.eval_shape(lambda: params), run.method
    plan = layout(run, mesh, shapes)
    name = type(method).__name__.lower()
    title = f"{run.phase} {run.recipe} · {name} · {run.optim.name} lr {run.optim.lr:g} · {run.steps} steps"
    totals = report.print_parameters(console, title, method, shapes, plan.trainable, plan.tx)
    frozen, state = plan.materialize(params)
    return TrainSetup(
        run, mesh, Transformer(config), method, frozen, state, plan.tx, rows, digest, tokenizer, held_out, totals=totals
    )
