"""The steps of a comparison: costs, then learning rates on seed 0, then more seeds at the best rate, then the test.

`graftax compare` and `graftax decide` share it. Every result is a line of results.jsonl, and is not computed again.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from ... import InputError, peft
from ...model import Context
from ...peft import Method, Subset
from ...strict_json import read_json
from ..cluster.signals import Stop
from ..config import from_json
from ..machine import cpu_cores, cpu_name
from ..progress import console, format_time
from ..runs.checkpoint import CheckpointWriter
from ..runs.lineage import code_version, trained_digest
from ..runs.manifest import versions
from .base_cache import BaseCache
from .results_log import Line, ResultsLog, select
from .step_costs import measure_costs
from .sweep.command import Sweep
from .sweep.results import result_row
from .sweep.trials import Trial, trial_folder
from .task_evaluator import TaskEvaluator
from .trainings import Entry, Trainings

LEAST_STEPS = 20  # that a budget must leave for a training
BUDGET_SHARE = 0.85  # share of a budget that is planned with


class Key(NamedTuple):
    """One training of a comparison."""

    task: str
    name: str  # of the entry
    factor: float
    seed: int


class MethodComparison:
    """A comparison of entries {name: entry} on the tasks of some evaluators, in the folder of its experiment."""

    def __init__(
        self,
        trainings: Trainings,
        entries: dict[str, Entry],
        evaluators: list[TaskEvaluator],
        cache: BaseCache,
        stop: Stop,
    ):
        self.trainings, self.entries, self.evaluators, self.cache, self.stop = (
            trainings,
            entries,
            evaluators,
            cache,
            stop,
        )
        self.experiment = trainings.experiment
        self.config, self.out = self.experiment.config, self.experiment.out
        self.log = ResultsLog(self.out / "results.jsonl")

    def check(self) -> None:
        """Raise InputError for rows that do not fit, tasks without validation rows, and methods that match nothing in
        the base, before anything is written."""
        for evaluator in self.evaluators:
            if not self.cache.rows(self.trainings.make_run(evaluator.name, Entry(Subset())))[2]:
                raise InputError(f"--task {evaluator.name}: no validation rows to choose a learning rate by; give "
                                 "--data.valid FILE, or --data.held-out above 0")  # fmt: skip
        for name, entry in self.entries.items():
            try:
                peft.count(entry.method, self.cache.model(self.config)[1])
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    def prepare(self) -> None:
        """Log the setup, the untuned base's scores, and the cost of a step of each method."""
        if not self.log.lines:
            self.log.add(self._setup_line())
        self._check_unchanged()
        for evaluator in self.evaluators:
            self.stop.check()
            if not self.log.select(kind="base", task=evaluator.name):
                self._score_base(evaluator)
        names: dict[Method, list[str]] = {}  # entries with the same method have the same cost
        for name, entry in self.entries.items():
            if not self.log.select(kind="cost", method=name):
                names.setdefault(entry.method, []).append(name)
        if names:
            console.print(f"measuring a training step of {len(names)} methods")
            task = self.evaluators[0].name
            runs = {some[0]: self.trainings.make_run(task, Entry(method)) for method, some in names.items()}
            costs = measure_costs(runs, self.cache, self.stop, bool(self.config.quantize))
            for cost, some in zip(costs, names.values(), strict=True):
                for name in some:
                    self.log.add(cost | {"method": name})

    def _setup_line(self) -> Line:
        config, base = self.config, self.cache.base(self.config)
        tasks = {e.name: {"metric": e.metric, "rows": len(e.rows), "part": e.part, "digest": e.digest,
                          "shown": e.shown_rows()} for e in self.evaluators}  # fmt: skip
        # Times are relative to full fine-tuning, which a quantised base does not have.
        reference = next(iter(self.entries)) if config.quantize else "full"
        return {
            "kind": "setup", "command": self.experiment.command, "date": time.strftime("%Y-%m-%d"), "out": config.out,
            "base": config.base, "fingerprint": base.fingerprint,
            "parameters": sum(x.size for x in jax.tree.leaves(base.base)), "tasks": tasks, "reference": reference,
            "methods": list(self.entries), "factors": list(self.trainings.factors), "seeds": self.trainings.seeds,
            "rows": [config.data.batch, config.data.T], "rate": config.optim.lr,
            "machine": f"{cpu_cores()} cores, {cpu_name()}", "versions": versions(), "code": code_version(),
        }  # fmt: skip

    def _check_unchanged(self) -> None:
        """Raise InputError if the logged results are of another base, or of other test rows."""
        setup = self.log.select(kind="setup")[0]
        digests = {"the base": (setup["fingerprint"], self.cache.base(self.config).fingerprint)}
        for e in self.evaluators:
            digests[f"the test of {e.label}"] = setup["tasks"][e.name].get("digest", e.digest), e.digest
        for name, (then, now) in digests.items():
            if then != now:
                raise InputError(f"--resume: {name} has changed since {self.out} began (sha256 {now[:12]}, was "
                                 f"{then[:12]}); restore it, or take another --out")  # fmt: skip

    def _score_base(self, evaluator: TaskEvaluator) -> None:
        console.print(f"{evaluator.label}: {len(evaluator.rows)} test rows by the untuned base", soft_wrap=True)
        start, run = time.perf_counter(), self.trainings.make_run(evaluator.name, Entry(Subset()))
        losses = self.cache.base_losses(run)
        seconds = time.perf_counter() - start
        scores = evaluator.timed_score((*self.cache.model(run), Context()))
        self.log.add({"kind": "base", "task": evaluator.name, **losses, **scores, "evaluate_seconds": seconds})

    def train(self, start: float) -> None:
        """Run both sweeps, with a `search` line for each trial of the first. `start`: see `decide_steps`."""
        steps = self.decide_steps(start)
        tasks = [evaluator.name for evaluator in self.evaluators]
        search = [Key(task, name, factor, 0) for name in self.entries for task in tasks
                  for factor in self.trainings.factors]  # fmt: skip
        for key, trial in self._sweep("search", search, steps):
            if not self.log.select(kind="search", task=key.task, method=key.name, factor=key.factor):
                self.log.add({"kind": "search", "task": key.task, "method": key.name, "factor": key.factor,
                              **_training_line(trial)})  # fmt: skip
        best = {(task, name): best_rate(self.log.lines, task, name) for name in self.entries for task in tasks}
        runs = {(task, name, 0): line for (task, name), line in best.items() if line}
        seeds = [Key(task, name, line["factor"], seed) for (task, name), line in best.items() if line
                 for seed in range(1, self.trainings.seeds)]  # fmt: skip
        for key, trial in self._sweep("seeds", seeds, steps):
            runs[key.task, key.name, key.seed] = _training_line(trial)
        order = list(self.entries)
        self.runs = {key: runs[key] for key in sorted(runs, key=lambda key: (order.index(key[1]), key))}

    def decide_steps(self, start: float) -> int:
        """Return the steps of a training: those of --steps, or what the budget leaves, kept for --resume.

        `start` is when the budget began, by time.monotonic. Raises InputError if the budget is too short.
        """
        trainings = self.trainings
        if not trainings.budget:
            return self.config.steps
        settings = read_json(self.experiment.file)
        if "steps" in settings:
            if settings["budget"] != trainings.budget:
                console.print(
                    f"--budget {trainings.budget:g}: has no effect now, a training has {settings['steps']} steps"
                )
            return settings["steps"]
        trials = len(trainings.factors) + trainings.seeds - 1  # of each method and task
        bases = [self.log.select(kind="base", task=evaluator.name)[0] for evaluator in self.evaluators]
        costs = [self.log.select(kind="cost", method=name)[0] for name in self.entries]
        scoring = sum(trials * line["evaluate_seconds"] + trainings.seeds * line["seconds"] for line in bases)
        other = len(costs) * scoring + 3 * sum(line["compile_seconds"] for line in costs) + time.monotonic() - start
        all_steps = trials * len(bases) * sum(line["seconds"] for line in costs)  # seconds of one step of each training
        steps = math.floor((trainings.budget * 60 * BUDGET_SHARE - other) / all_steps)
        if steps < LEAST_STEPS:
            minutes = math.ceil((other + LEAST_STEPS * all_steps) / 60 / BUDGET_SHARE)
            raise InputError(f"--budget {trainings.budget:g}: {len(costs) * len(bases) * trials} trainings of "
                             f"{LEAST_STEPS} steps, with their evaluation, need about {minutes} minutes; give more, or "
                             "fewer methods, tasks, seeds, or rows")  # fmt: skip
        self.experiment.write_settings(settings | {"steps": steps})
        console.print(f"--budget {trainings.budget:g}: {steps} steps a training, {format_time(other)} for all else")
        return steps

    def _sweep(self, stage: str, keys: list[Key], steps: int) -> Iterator[tuple[Key, Trial]]:
        """Train the runs of some keys as a sweep of its own, OUT/STAGE."""
        if not keys:
            return iter(())
        out, trials = self.out / stage, []
        for i, key in enumerate(keys):
            run = self.trainings.make_run(key.task, self.entries[key.name], key.factor, key.seed, steps)
            run = dataclasses.replace(run, out=str(trial_folder(out, i)))
            values = {"data.task": key.task, "method": key.name, "optim.lr": f"{run.optim.lr:g}", "seed": str(key.seed)}
            trials.append(Trial(i, values, run))
        resume = "auto" if out.exists() else "never"
        shared = dataclasses.replace(self.config, out=str(out), steps=steps, resume=resume)
        console.print(f"{stage}: {len(trials)} trainings of {steps} steps")
        sweep = Sweep(shared, (), lanes=self.trainings.lanes)
        return zip(keys, sweep.train_trials(trials, self.cache, self.stop), strict=True)

    def test(self) -> None:
        """Score the chosen runs on the test rows."""
        left = [key for key in self.runs
                if not self.log.select(kind="test", task=key[0], method=key[1], seed=key[2])]  # fmt: skip
        start = time.monotonic()
        for i, (task, name, seed) in enumerate(left):
            self.stop.check()
            training, evaluator = self.runs[task, name, seed], next(e for e in self.evaluators if e.name == task)
            kept = {key: training[key] for key in training if key not in ("kind", "factor")}
            line = {"kind": "test", "task": task, "method": name, "seed": seed, **kept}
            if examples := self.entries[name].examples:
                line["examples"] = examples
            if training["status"] == "done":
                folder = self.out / training["folder"]
                run = dataclasses.replace(from_json(folder / "config.json"), out=str(folder))
                line |= evaluator.timed_score(self.cache.tuned(run))
            self.log.add(line)
            score = f"{evaluator.metric} {line['score']:.4f}" if "score" in line else line["status"]
            rest = format_time((time.monotonic() - start) / (i + 1) * (len(left) - i - 1))
            console.print(f"test {i + 1}/{len(left)}: {evaluator.label} {name} seed {seed}: {score} · {rest} left")


def best_rate(lines: list[Line], task: str, method: str) -> Line | None:
    """Return the `search` line with the least validation loss; None if every learning rate diverged."""
    finished = select(lines, kind="search", task=task, method=method, status="done")
    return min(finished, key=lambda line: line["valid_loss"], default=None)


def _training_line(trial: Trial) -> dict[str, Any]:
    """Return the learning rate, losses and digests of a trial."""
    run, row = trial.run, result_row(trial)
    line = {"lr": run.optim.lr, "steps": run.steps, "folder": "/".join(trial.folder.parts[-3:])}
    if row["status"] != "done" or "valid_loss" not in row:
        return line | {"status": "diverged"}
    losses = {key: row[key] for key in ("valid_loss", "loss", "forgetting") if key in row}
    manifest = CheckpointWriter(trial.folder / "checkpoints").manifest(run.steps)
    digests = {"trainable": trained_digest(manifest), "rows": manifest["rows_digest"], "data": manifest["data"],
               "tokenizer": manifest["tokenizer"]}  # fmt: skip
    return line | {"status": "done", **losses, "digests": digests}
