"""What cells stand on: bases and rows, each read once for all of them, and a phase of each cell."""

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
    """Bases, of which one is in memory at a time, and rows. All of it lies on the first device."""

    def __init__(self) -> None:
        self.mesh = make_mesh((1, 1, 1), jax.devices()[:1])
        self.whole = NamedSharding(self.mesh, P())
        self._base: tuple[Any, LoadedRun] | None = None
        self._rows: dict[Any, Any] = {}
        self._asked: dict[Any, list[Any]] = {}
        self._before: dict[Any, dict[str, float]] = {}
        self._frozen: tuple[Any, Any] | None = None

    def base(self, run: Run) -> LoadedRun:
        """The base of a run."""
        if not run.base:
            raise InputError("a sweep starts from a base: give --base RUN, a Hugging Face folder, or a hub id")
        key = (run.base, run.layers, run.quantize)
        if self._base is None or self._base[0] != key:
            self._base = None
            self._base = key, load_base(run, self.mesh)
        return self._base[1]

    def model(self, run: Run) -> tuple[Transformer, Any]:
        """(the model, the parameters of its base)."""
        base = self.base(run)
        return Transformer(with_compute_dtype(base.config, run.dtype, run.remat)), base.base

    def rows(self, run: Run) -> Any:
        """(task, packed training rows, packed validation rows)."""
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

    def asked(self, run: Run, n: int) -> list[Any]:
        """At most n of the validation rows, which a run answers at its end; --data.bad-rows says what becomes of a
        row that cannot be answered. InputError where there is none."""
        key = (run.base, to_json(Run(data=run.data)), n)
        if key not in self._asked:
            base, bad, rows = self.base(run), RowErrors(run.data.bad_rows, 1.0), self.rows(run)[0].valid
            bad.rows = len(rows)
            kept = answerable_rows(rows, base.tokenizer, base.config, 0, bad)
            report_row_errors(bad)
            if not kept:
                raise InputError(f"--score {n}: the task has no validation rows to answer; drop the flag, or give "
                                 "--data.valid FILE")  # fmt: skip
            self._asked[key] = with_rendered_replies(evenly_spaced(kept, n), base.tokenizer)
        return self._asked[key]

    def settled(self, cells: list[Trial]) -> list[Trial]:
        """The cells with all said that a run needs: their steps, which are those of the first seed for all seeds."""
        steps, found = {}, []
        for cell in cells:
            run = cell.run
            key = to_json(dataclasses.replace(run, seed=0, out=""))
            if not run.steps and key not in steps:
                steps[key] = max(round(run.epochs * len(self.rows(run)[1].rows) / run.data.batch), 1)
            method = resolve_method(run.method, self.base(run).tokenizer, run.seed)
            n = run.steps or steps[key]
            made = dataclasses.replace(run, base=resolve_path(run.base), method=method, steps=n)
            lr_schedule(made.optim, n)  # refuses what does not fit before anything is written
            found.append(cell._replace(run=made))
        return found

    def phase(self, run: Run) -> TrainSetup:
        """A cell's phase, at its beginning; its state is on the host."""
        base, (task, sft, valid), (model, params) = self.base(run), self.rows(run), self.model(run)
        first = initial_layout(run, jax.eval_shape(lambda: params))
        trainable = _begun(run.method, params, jax.random.key(run.seed + 1))
        state = jax.device_get(init_state(trainable, first.tx, bool(run.optim.spike), seed=run.seed))
        sizes = {name: sum(x.size for x in jax.tree.leaves(tree))
                 for name, tree in (("base", params), ("trainable", trainable))}  # fmt: skip
        return TrainSetup(
            run, self.mesh, model, run.method, self.frozen(run), state, first.tx, sft.train, sft.digest,
            base.tokenizer, base.held_out, task=task, valid=valid, base_fingerprint=base.fingerprint, totals=sizes,
            data_sizes={"examples": sft.examples, "target tokens": sft.target_tokens}, lineage=base.lineage,
            untrained_tokens=untrained_tokens(run.method, params, base.manifest.get("added_tokens", {}), sft.rows),
        )  # fmt: skip

    def frozen(self, run: Run) -> Any:
        """What stays of the base under a method, one copy of it for all cells that have that method."""
        params = self.model(run)[1]
        if self._frozen is None or self._frozen[0] != run.method or self._frozen[1][0] is not params:
            self._frozen = run.method, (params, run.method.frozen_params(params))
        return self._frozen[1][1]

    def tuned(self, run: Run) -> Any:
        """(model, bound parameters, context) of a cell that is done."""
        model, params = self.model(run)
        like = jax.eval_shape(lambda: run.method.init(jax.random.key(0), params))
        with CheckpointWriter(Path(run.out) / "checkpoints") as checkpoints:
            trainable = checkpoints.restore(run.steps, "trainable", like, None, run.verify)
        return model, run.method.bind(params, trainable), run.method.context(trainable)

    def before(self, run: Run) -> dict[str, float]:
        """What the base alone has: its loss on its own held-out rows, and on the task's validation rows."""
        base, (model, params), valid = self.base(run), self.model(run), self.rows(run)[2]
        what = (run.quantize, run.layers, run.dtype, run.remat)
        key = (run.base, run.eval_tokens, to_json(Run(data=run.data, seed=run.seed)), *what)
        if key not in self._before:
            args, found = (model, params, Context()), {}
            if base.held_out:
                put = put_batch(self.mesh)
                held = held_out_losses(*args, base.held_out, run.data.batch, run.eval_tokens, put)
                found["held_out_loss"] = mean_loss(held)
            if valid:
                found["valid_loss"] = mean_row_loss(args, valid, run, self.mesh)
            self._before[key] = found
        return self._before[key]


def _begun(method: Any, params: Any, key: Any) -> Any:
    """What a method trains of a base, as it begins: arrays of its own. One program serves all seeds."""
    return jax.jit(lambda params, key: jax.tree.map(jnp.copy, method.init(key, params)))(params, key)
