"""Cache of what the runs of an experiment share: the base, their rows, and its losses before tuning."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ... import InputError
from ...data.errors import RowErrors
from ...model import Context, Transformer
from ...model.sharding import make_mesh, put_batch
from ..config import Run, to_json
from ..evaluate import answerable_rows, evenly_spaced, held_out_losses, mean_loss, mean_row_loss, with_rendered_replies
from ..inputs import check_row_length, report_row_errors, report_split_sizes, tuning_rows
from ..optim import lr_schedule
from ..runs.added_tokens import untrained_tokens
from ..runs.checkpoint import CheckpointWriter
from ..runs.files import resolve_path
from ..runs.load import with_compute_dtype
from ..runs.loaded import LoadedRun
from ..runs.prepare import load_base
from ..setup import TrainSetup, initial_layout, resolve_method
from ..step import init_state
from .sweep.trials import Trial


class BaseCache:
    """The base of the runs and their rows, each loaded once; only one base is in memory. Arrays are on the first
    device."""

    def __init__(self) -> None:
        self.mesh = make_mesh((1, 1, 1), jax.devices()[:1])
        self.replicated = NamedSharding(self.mesh, P())
        self._base: tuple[Any, LoadedRun] | None = None
        self._rows: dict[Any, Any] = {}
        self._valid_rows: dict[Any, list[Any]] = {}
        self._base_losses: dict[Any, dict[str, float]] = {}
        self._frozen: tuple[Any, Any, Any] | None = None  # (method, parameters, frozen parameters)

    def base(self, run: Run) -> LoadedRun:
        """Return the base of a run. Raises InputError if it has none."""
        if not run.base:
            raise InputError("the runs start from a base: give --base RUN, a Hugging Face folder, or a hub id")
        key = (run.base, run.layers, run.quantize)
        if self._base is None or self._base[0] != key:
            self._base = None  # free the memory first
            self._base = key, load_base(run, self.mesh)
        return self._base[1]

    def model(self, run: Run) -> tuple[Transformer, Any]:
        """Return (model, parameters of the base)."""
        base = self.base(run)
        return Transformer(with_compute_dtype(base.config, run.dtype, run.remat)), base.base

    def rows(self, run: Run) -> Any:
        """Return (task, packed training rows, packed validation rows)."""
        data = dataclasses.replace(run.data, batch=1)
        key = (run.base, to_json(Run(data=data, seed=run.seed)))
        if key not in self._rows:
            base = self.base(run)
            check_row_length(run.data, base.config.context)
            task, sft = tuning_rows(run.data, run.seed, base.tokenizer, base.config.V)
            if not self._rows:
                report_split_sizes(task)
            self._rows[key] = task, sft, sft.valid
        return self._rows[key]

    def valid_rows(self, run: Run, n: int) -> list[Any]:
        """Return at most n validation rows, evenly spaced, that can be answered by generation.

        --data.bad-rows decides about rows that cannot. Raises InputError if no row is left.
        """
        key = (run.base, to_json(Run(data=run.data)), n)
        if key not in self._valid_rows:
            base, bad, rows = self.base(run), RowErrors(run.data.bad_rows, 1.0), self.rows(run)[0].valid
            bad.rows = len(rows)
            kept = answerable_rows(rows, base.tokenizer, base.config, 0, bad)
            report_row_errors(bad)
            if not kept:
                raise InputError(f"--score {n}: the task has no validation rows to answer; drop the flag, or give "
                                 "--data.valid FILE")  # fmt: skip
            self._valid_rows[key] = with_rendered_replies(evenly_spaced(kept, n), base.tokenizer)
        return self._valid_rows[key]

    def resolve_trials(self, trials: list[Trial]) -> list[Trial]:
        """Return the trials with everything resolved that their runs need: base path, method, and steps.

        Steps that follow from `epochs` are those of the first seed, for all seeds.
        """
        steps_by_run: dict[str, int] = {}
        resolved = []
        for trial in trials:
            run, steps = trial.run, trial.run.steps
            if not steps:
                key = to_json(dataclasses.replace(run, seed=0, out=""))
                if key not in steps_by_run:
                    rows = len(self.rows(run)[1].rows)
                    steps_by_run[key] = max(round(run.epochs * rows / run.data.batch), 1)
                steps = steps_by_run[key]
            method = resolve_method(run.method, self.base(run).tokenizer, run.seed)
            run = dataclasses.replace(run, base=resolve_path(run.base), method=method, steps=steps)
            lr_schedule(run.optim, steps)  # raises InputError for a warmup that does not fit
            resolved.append(trial._replace(run=run))
        return resolved

    def setup(self, run: Run) -> TrainSetup:
        """Return the setup of a run at step 0, its state on the host."""
        base, (task, sft, valid), (model, params) = self.base(run), self.rows(run), self.model(run)
        tx = initial_layout(run, jax.eval_shape(lambda: params)).tx
        trainable = _init_trainable(run.method, params, jax.random.key(run.seed + 1))
        state = jax.device_get(init_state(trainable, tx, bool(run.optim.spike), seed=run.seed))
        totals = {name: sum(x.size for x in jax.tree.leaves(tree))
                  for name, tree in (("base", params), ("trainable", trainable))}  # fmt: skip
        return TrainSetup(
            run, self.mesh, model, run.method, self.frozen(run), state, tx, sft.train, sft.digest,
            base.tokenizer, base.held_out, task=task, valid=valid, base_fingerprint=base.fingerprint, totals=totals,
            data_sizes={"examples": sft.examples, "target tokens": sft.target_tokens}, lineage=base.lineage,
            untrained_tokens=untrained_tokens(run.method, params, base.manifest.get("added_tokens", {}), sft.rows),
        )  # fmt: skip

    def frozen(self, run: Run) -> Any:
        """Return the frozen parameters, one copy for all runs with the same method."""
        params = self.model(run)[1]
        if self._frozen is None or self._frozen[0] != run.method or self._frozen[1] is not params:
            self._frozen = run.method, params, run.method.frozen_params(params)
        return self._frozen[2]

    def tuned(self, run: Run) -> Any:
        """Return (model, bound parameters, context) of a run that is done."""
        model, params = self.model(run)
        like = jax.eval_shape(lambda: run.method.init(jax.random.key(0), params))
        with CheckpointWriter(Path(run.out) / "checkpoints") as checkpoints:
            trainable = checkpoints.restore(run.steps, "trainable", like, None, run.verify)
        return model, run.method.bind(params, trainable), run.method.context(trainable)

    def base_losses(self, run: Run) -> dict[str, float]:
        """Return the losses of the untuned base on its own held-out rows and on the task's validation rows."""
        base, (model, params), valid = self.base(run), self.model(run), self.rows(run)[2]
        compute = (run.quantize, run.layers, run.dtype, run.remat)
        key = (run.base, run.eval_tokens, to_json(Run(data=run.data, seed=run.seed)), *compute)
        if key not in self._base_losses:
            bound, losses = (model, params, Context()), {}
            if base.held_out:
                put = put_batch(self.mesh)
                by_domain = held_out_losses(*bound, base.held_out, run.data.batch, run.eval_tokens, put)
                losses["held_out_loss"] = mean_loss(by_domain)
            if valid:
                losses["valid_loss"] = mean_row_loss(bound, valid, run, self.mesh)
            self._base_losses[key] = losses
        return self._base_losses[key]


def _init_trainable(method: Any, params: Any, key: Any) -> Any:
    """Return the initial trainable tree of a method, as arrays of its own; one program serves all seeds."""
    return jax.jit(lambda params, key: jax.tree.map(jnp.copy, method.init(key, params)))(params, key)
