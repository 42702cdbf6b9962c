"""A comparison under way: costs, then rates on seed 0, then more seeds at the best rate, then the test."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ... import InputError, peft
from ...atomic import atomic_write
from ...model import Context
from ...peft import Method, Subset
from ...strict_json import read_json
from ..bench.peer import threads
from ..bench.table import cpu
from ..cluster.signals import Stop
from ..config import Run, from_json
from ..progress import console, format_time
from ..runs.checkpoint import CheckpointWriter
from ..runs.lineage import code_version, trained_digest
from ..runs.manifest import versions
from .base_cache import BaseCache
from .results_log import Line, ResultsLog, found
from .step_costs import costs
from .sweep.command import Sweep, carry_out
from .sweep.results import diverged, told
from .sweep.trials import Trial
from .task_evaluator import TaskEvaluator

LEAST = 20  # steps that a budget must leave for a training
SPARE = 0.85  # part of a budget that is planned with


class Entry(NamedTuple):
    """What takes part: a method, maybe on a part of the training examples."""

    method: Method
    examples: int = 0  # 0: all


class MethodComparison:
    """What is compared, and what is known of it."""

    def __init__(
        self, plan: Any, entries: dict[str, Entry], exams: list[TaskEvaluator], ground: BaseCache, stop: Stop, file: str
    ):  # fmt: skip
        self.plan, self.entries, self.exams, self.ground, self.stop = plan, entries, exams, ground, stop
        self.out, self.file = Path(plan.run.out), file
        self.ledger = ResultsLog(self.out / "results.jsonl")

    def go(self, command: str, began: float) -> None:
        """All of it, or what is left; began: when, by time.monotonic, as a budget counts from there."""
        self.prepare(command)
        self.train(self.steps(began))
        self.test()

    def prepare(self, command: str) -> None:
        """What is compared, what the base does untuned, and what a step of each method costs."""
        plan, ledger, base = self.plan, self.ledger, self.ground.base(self.plan.run)
        size = sum(x.size for x in jax.tree.leaves(base.base))
        if not ledger.lines:
            tasks = {e.name: {"metric": e.metric, "rows": len(e.rows), "part": e.part, "digest": e.digest,
                              "shown": e.shown()} for e in self.exams}  # fmt: skip
            ledger.add({
                "kind": "setup", "command": command, "date": time.strftime("%Y-%m-%d"), "out": plan.run.out,
                "base": plan.run.base, "fingerprint": base.fingerprint, "parameters": size, "tasks": tasks,
                "reference": self.reference,
                "methods": list(self.entries), "factors": list(plan.factors), "seeds": plan.seeds,
                "rows": [plan.run.data.batch, plan.run.data.T], "rate": plan.run.optim.lr,
                "machine": f"{threads()} cores, {cpu()}", "versions": versions(), "code": code_version(),
            })  # fmt: skip
        self._same(ledger.find(kind="setup")[0], base.fingerprint)
        for exam in self.exams:
            self.stop.check()
            if not ledger.find(kind="base", task=exam.name):
                console.print(f"{exam.label}: {len(exam.rows)} test rows by the base as it is", soft_wrap=True)
                began, run = time.perf_counter(), plan.run_of(exam.name, Entry(Subset()), 1.0)
                before = self.ground.before(run)
                evaluating = time.perf_counter() - began
                sheet = exam.timed((*self.ground.model(run), Context()))
                ledger.add({"kind": "base", "task": exam.name, **before, **sheet, "evaluating": evaluating})
        same: dict[Method, list[str]] = {}
        for name, entry in self.entries.items():
            if not ledger.find(kind="cost", method=name):
                same.setdefault(entry.method, []).append(name)
        if same:
            console.print(f"costs of {len(same)} methods, a step each in turns")
            runs = {names[0]: plan.run_of(self.exams[0].name, Entry(method), 1.0) for method, names in same.items()}
            for line, names in zip(
                costs(runs, self.ground, self.stop, bool(plan.run.quantize)), same.values(), strict=True
            ):
                for name in names:
                    ledger.add(line | {"method": name})

    def check(self) -> None:
        """InputError for what would be found too late: rows that do not fit, nothing that chooses a rate, a method that
        finds nothing in the base. Before anything is written."""
        for exam in self.exams:
            run = self.plan.run_of(exam.name, Entry(Subset()), 1.0)
            if not self.ground.rows(run)[2]:
                raise InputError(f"--task {exam.name}: no validation rows, so that nothing chooses a rate; give "
                                 "--data.valid FILE, or --data.held-out above 0")  # fmt: skip
        for name, entry in self.entries.items():
            try:
                peft.count(entry.method, self.ground.model(self.plan.run)[1])
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    @property
    def reference(self) -> str:
        """What times are compared with: full fine-tuning, but of a quantised base, which nothing trains all of."""
        return next(iter(self.entries)) if self.plan.run.quantize else "full"

    def _same(self, setup: Line, fingerprint: str) -> None:
        """InputError if what was found before is of another base, or of other rows."""
        here = {"the base": fingerprint} | {f"the test of {e.label}": e.digest for e in self.exams}
        then = {"the base": setup["fingerprint"]} | {
            f"the test of {e.label}": setup["tasks"][e.name].get("digest", e.digest) for e in self.exams
        }  # fmt: skip
        for what, digest in here.items():
            if digest != then[what]:
                raise InputError(f"--resume: {what} is not what it was when {self.out} began (sha256 {digest[:12]}, "
                                 f"was {then[what][:12]}); put it back, or take another --out")  # fmt: skip

    def steps(self, began: float) -> int:
        """The steps of a training: what --steps says, or what the budget leaves."""
        plan, path = self.plan, self.out / self.file
        if plan.run.steps:
            return plan.run.steps
        said = read_json(path)
        if "steps" not in said:
            cells = len(plan.factors) + plan.seeds - 1
            lines = [self.ledger.find(kind="base", task=exam.name)[0] for exam in self.exams]
            costs = [self.ledger.find(kind="cost", method=name)[0] for name in self.entries]
            fixed = len(costs) * sum(cells * line["evaluating"] + plan.seeds * line["seconds"] for line in lines)
            fixed += 3 * sum(line["compile_seconds"] for line in costs) + time.monotonic() - began
            a_step = cells * len(lines) * sum(line["seconds"] for line in costs)
            steps = math.floor((plan.budget * 60 * SPARE - fixed) / a_step)
            if steps < LEAST:
                need = math.ceil((fixed + LEAST * a_step) / 60 / SPARE)
                raise InputError(f"--budget {plan.budget:g}: {len(costs) * len(lines) * cells} trainings of {LEAST} "
                                 f"steps, with what they are evaluated and scored on, need about {need} minutes; give "
                                 "more, or fewer methods, tasks, seeds, or rows")  # fmt: skip
            said["steps"] = steps
            atomic_write(path, json.dumps(said, indent=1) + "\n")
            console.print(f"--budget {plan.budget:g}: {steps} steps a training, {format_time(fixed)} for all else")
        elif said["budget"] != plan.budget:
            console.print(f"--budget {plan.budget:g}: changes nothing any more, a training has {said['steps']} steps")
        return said["steps"]

    def train(self, steps: int) -> None:
        """Both sweeps; a line for each cell of the first, and for each seed's run of the second."""
        made = [(exam.name, name, factor, 0) for name in self.entries for exam in self.exams
                for factor in self.plan.factors]  # fmt: skip
        for (task, name, factor, _), cell in zip(made, self._sweep("search", made, steps), strict=True):
            if not self.ledger.find(kind="search", task=task, method=name, factor=factor):
                self.ledger.add({"kind": "search", "task": task, "method": name, "factor": factor, **_found(cell)})
        best = {(e.name, name): chosen(self.ledger.lines, e.name, name) for name in self.entries for e in self.exams}
        more = [(task, name, line["factor"], seed) for (task, name), line in best.items() if line
                for seed in range(1, self.plan.seeds)]  # fmt: skip
        runs = {(*pair, 0): line for pair, line in best.items() if line}
        for (task, name, _, seed), cell in zip(more, self._sweep("seeds", more, steps) if more else [], strict=True):
            runs[task, name, seed] = _found(cell)
        self.runs = {key: runs[key] for key in sorted(runs, key=lambda k: (list(self.entries).index(k[1]), k))}

    def _sweep(self, stage: str, made: list[Any], steps: int) -> list[Trial]:
        """The cells of a sweep of its own, done."""
        out, cells = self.out / stage, []
        for n, (task, name, factor, seed) in enumerate(made):
            run = self.plan.run_of(task, self.entries[name], factor, seed, steps)
            values = {"data.task": task, "method": name, "optim.lr": f"{run.optim.lr:g}", "seed": str(seed)}
            cells.append(Trial(n, values, dataclasses.replace(run, out=str(out / "cells" / f"{n:03d}"))))
        shared = dataclasses.replace(self.plan.run, out=str(out), steps=steps)
        shared = dataclasses.replace(shared, resume="auto" if out.exists() else "never")
        console.print(f"{stage}: {len(cells)} trainings of {steps} steps")
        return carry_out(Sweep(shared, (), lanes=self.plan.lanes), cells, self.ground, self.stop)

    def test(self) -> None:
        """Each chosen run's answers to the test."""
        left = [key for key in self.runs if not self._tested(*key)]
        began = time.monotonic()
        for i, (task, name, seed) in enumerate(left):
            self.stop.check()
            line, exam = self.runs[task, name, seed], next(e for e in self.exams if e.name == task)
            kept = {k: line[k] for k in line if k not in ("kind", "factor")}
            row = {"kind": "test", "task": task, "method": name, "seed": seed, **kept}
            row |= {"examples": n} if (n := self.entries[name].examples) else {}
            if line["status"] == "done":
                row |= exam.timed(self.ground.tuned(self._run_of(line["folder"])))
            self.ledger.add(row)
            rest = (time.monotonic() - began) / (i + 1) * (len(left) - i - 1)
            said = f"{exam.metric} {row['score']:.4f}" if "score" in row else line["status"]
            console.print(
                f"test {i + 1}/{len(left)}: {exam.label} {name} seed {seed}: {said} · {format_time(rest)} left"
            )

    def _tested(self, task: str, name: str, seed: int) -> list[Line]:
        return self.ledger.find(kind="test", task=task, method=name, seed=seed)

    def _run_of(self, folder: str) -> Run:
        return dataclasses.replace(from_json(self.out / folder / "config.json"), out=str(self.out / folder))


def chosen(lines: list[Line], task: str, method: str) -> Line | None:
    """The rate with the least validation loss; None if none has any."""
    tried = found(lines, kind="search", task=task, method=method, status="done")
    return min(tried, key=lambda line: line["valid_loss"], default=None)


def _found(cell: Trial) -> Line:
    """What a cell found, and what it is known by."""
    folder = Path(cell.run.out)
    line = {"lr": cell.run.optim.lr, "steps": cell.run.steps, "status": "diverged",
            "folder": str(Path(*folder.parts[-3:]))}  # fmt: skip
    after, before = (told(cell).get(part, {}) for part in ("after", "before"))
    if diverged(cell):
        return line
    made = {"valid_loss": after.get("valid_loss", math.nan), "loss": told(cell)["loss"]}
    if "held_out_loss" in after and "held_out_loss" in before:
        made["forgetting"] = after["held_out_loss"] - before["held_out_loss"]
    if not all(map(math.isfinite, made.values())):
        return line
    line |= {"status": "done", **made}
    manifest = CheckpointWriter(folder / "checkpoints").manifest(cell.run.steps)
    digests = {"trainable": trained_digest(manifest), "rows": manifest["rows_digest"], "data": manifest["data"],
               "tokenizer": manifest["tokenizer"]}  # fmt: skip
    return line | {"digests": digests}
