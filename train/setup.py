"""What a run holds in memory before its first step: rows, base, method, optimizer state, all checked and laid out."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax

from .. import InputError
from ..model import Config, Transformer, init, shapes_of
from ..model.layout import set_layout
from ..model.sharding import shardings
from ..peft import Chain, Method
from .cluster import distributed
from .config import Run
from .health import load_base
from .inputs import check_lengths, corpus_and_tokenizer, say_parts, tuning_rows
from .program import layout
from .progress import console
from .runs import report
from .runs.added_tokens import untrained_tokens
from .runs.files import folder_digest, resolve_path
from .runs.load import with_compute_dtype
from .step import State


@dataclasses.dataclass
class TrainSetup:
    """All that a run needs in memory before its first step."""

    run: Run
    mesh: Any
    model: Transformer
    method: Method
    frozen: Any
    state: State
    tx: Any
    rows: Any  # the endless stream of training rows
    data_digest: str
    tokenizer: Any
    held_out: dict[str, Any]
    task: Any = None
    valid: list[Any] = dataclasses.field(default_factory=list)  # the task's validation rows, packed
    base: str = ""  # fingerprint of the base; empty for a pretraining run
    totals: dict[str, int] = dataclasses.field(default_factory=dict)
    facts: dict[str, int] = dataclasses.field(default_factory=dict)  # sizes of the data, to say what changed of it
    lineage: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the base
    added: dict[str, int] = dataclasses.field(default_factory=dict)  # added tokens whose rows stay untrained, and ids


def prepare(run: Run, mesh: Any, work: Path) -> TrainSetup:
    """Read and check everything, say what trains, and lay it out on the mesh. Writes nothing outside `work`."""
    return (_pretraining if run.phase == "pretrain" else _tuning)(run, mesh, work)


def _pretraining(run: Run, mesh: Any, work: Path) -> TrainSetup:
    if run.model is None:
        raise InputError("pretraining needs an architecture: take a recipe that has one, or set --model")
    if run.data.valid or run.data.test:
        raise InputError("--data.valid and --data.test are files of examples for fine-tuning; drop them")
    if run.steps < 1:
        raise InputError(f"--steps {run.steps}: pretraining wants 1 or more")
    check_lengths(run.data, run.model.context)
    corpus, tokenizer = corpus_and_tokenizer(run.data, run.seed, work)
    config = set_layout(dataclasses.replace(run.model, V=tokenizer.vocab_size), run.layers)
    run = dataclasses.replace(run, model=config)
    _warn_few_rows(sum(corpus.rows.values()), run)
    console.print("tokens a domain: " + " · ".join(f"{k} {v:,}" for k, v in corpus.tokens.items()))
    split = shardings(mesh, shapes_of(config))
    params = jax.jit(init, static_argnums=0, out_shardings=split)(config, jax.random.key(run.seed))
    phase = _assemble(run, mesh, config, params, corpus.train, corpus.digest, tokenizer, corpus.held_out)
    phase.facts = {f"tokens of {name}": n for name, n in corpus.tokens.items()}
    return phase


def _tuning(run: Run, mesh: Any, work: Path) -> TrainSetup:
    if not run.base:
        raise InputError("fine-tuning starts from a base: give --base RUN, a Hugging Face folder, or a hub id")
    distributed.check_agreement("the base", {"base": folder_digest(Path(run.base))})
    base = load_base(run, mesh)
    config = with_compute_dtype(base.config, run.dtype, run.remat)
    method = resolve_method(run.method, base.tokenizer, run.seed)
    virtual = virtual_tokens(method, base.base)
    check_lengths(run.data, config.context, virtual if config.learned_positions else 0)
    task, sft = tuning_rows(run.data, run.seed, base.tokenizer, config.V, config, virtual)
    steps = run.steps or max(round(run.epochs * len(sft.rows) / run.data.batch), 1)
    run = dataclasses.replace(run, steps=steps, base=resolve_path(run.base), method=method)
    _warn_few_rows(len(sft.rows), run)
    share = sft.tokens / (len(sft.rows) * run.data.T)
    rows = f"{sft.examples:,} examples in {len(sft.rows):,} rows of {run.data.T} ({share:.0%} filled)"
    say_parts(task)
    console.print(f"{task.name}: {rows}, {sft.target_tokens:,} target tokens; {steps} steps", soft_wrap=True)
    params, mark = base.base, base.fingerprint
    added = untrained_tokens(method, params, base.manifest.get("added_tokens", {}), sft.rows)
    phase = _assemble(run, mesh, config, params, sft.train, sft.digest, base.tokenizer, base.held_out)
    phase.task, phase.base, phase.lineage, phase.added = task, mark, base.lineage, added
    phase.valid = sft.valid
    phase.facts = {"examples": sft.examples, "target tokens": sft.target_tokens}
    distributed.check_agreement("the base", {"base": mark})
    return phase


def _warn_few_rows(rows: int, run: Run) -> None:
    if rows < (batch := run.data.batch):
        said = f"{rows} rows are fewer than the {batch} of a batch: rows stand in a step more than once"
        console.print(said, soft_wrap=True)


def virtual_tokens(method: Method, params: Any) -> int:
    """How many positions a method puts before the text; nothing is computed."""
    lengths = []
    jax.eval_shape(lambda p: lengths.append(method.context(method.init(jax.random.key(0), p)).length), params)
    return lengths[0]


def resolve_method(method: Any, tokenizer: Any, seed: int | None = None) -> Any:
    """The method as one run uses it: the token ids of its text, and the run's seed where it draws and names none."""
    if isinstance(method, Chain):
        return Chain(tuple((name, resolve_method(link, tokenizer, seed)) for name, link in method.methods))
    text = getattr(method, "text", "")
    method = dataclasses.replace(method, ids=tuple(tokenizer.prompt(text))) if text else method
    return dataclasses.replace(method, seed=seed) if getattr(method, "seed", 0) is None else method


def _assemble(
    run: Run, mesh: Any, config: Config, params: Any, rows: Any, digest: str, tokenizer: Any, held_out: Any
) -> TrainSetup:
    """Split the base by the method, lay everything out on the mesh, and say what trains. `params` is used up."""
    method, shapes = run.method, jax.eval_shape(lambda: params)
    distributed.check_agreement("the data", {"data": digest, "tokenizer": tokenizer.digest})
    begin, tx, trainable, _, where = layout(run, mesh, shapes)
    name = type(method).__name__.lower()
    title = f"{run.phase} {run.recipe} · {name} · {run.optim.name} lr {run.optim.lr:g} · {run.steps} steps"
    totals = report.show(console, title, method, shapes, trainable, tx)
    # Donated: the base is never in memory twice.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        frozen, state = jax.jit(begin, out_shardings=where, donate_argnums=0)(params)
    return TrainSetup(
        run, mesh, Transformer(config), method, frozen, state, tx, rows, digest, tokenizer, held_out, totals=totals
    )
