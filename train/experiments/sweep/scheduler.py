"""The schedule of a sweep: trains its trials program by program, in chunks of lanes, to their end or to a rung."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from .... import InputError
from ....atomic import atomic_write
from ....strict_json import read_json
from ... import faults
from ...cluster.signals import Stop, Stopped
from ...evaluate import bound_model, evaluate_losses, generate_answers, longest_reply
from ...health import check_finite
from ...loop import explain_scoring_failure
from ...progress import console, format_time
from ...runs.record import logged_evaluation, summarize
from ..base_cache import BaseCache
from ..step_costs import chunk_size, lanes_that_fit
from .lanes import Lane, LaneStack, common_step
from .programs import Program, group_trials, print_programs
from .results import write_results
from .trials import Trial, span

FILE = "sweep.json"


class Scheduler:
    """Trains trials from `BaseCache.resolve_trials`; `lanes`, `halve` and `score` are fields of `Sweep`.

    The constructor groups and checks them, and writes nothing. It raises InputError for rows that do not fit, and for
    halving or scoring without validation rows.
    """

    def __init__(
        self, out: Path, trials: list[Trial], cache: BaseCache, stop: Stop, lanes: int, halve: int, score: int
    ):
        self.out, self.trials, self.cache, self.stop = out, trials, cache, stop
        self.lanes, self.halve, self.score = lanes, halve, score
        self.devices = jax.devices()
        self.guard: Any = lambda: None  # raises if another process writes into the folder
        self.train_seconds, self.resumed_at = 0.0, 0.0
        self.lane_steps, self.lane_steps_left = 0, 0  # done by this process, and to do until the next rung
        self.programs, reasons = group_trials(trials, cache.model)
        if halve and not all(cache.rows(trial.run)[2] for trial in trials):
            raise InputError("--halve: the task has no validation rows to rank the trials by; drop the flag, or give "
                             "--data.valid FILE")  # fmt: skip
        for trial in trials:
            cache.rows(trial.run)
            if score:
                cache.valid_rows(trial.run, score)
        print_programs(self.programs, reasons, len(trials))

    def run(self) -> None:
        """Train all trials to their end, or to the rung at which they stop."""
        lane_counts, active = self._lane_counts(), {trial.number for trial in self.trials}
        for rung in range(len(rungs(1, self.halve))):
            ends = [rungs(program.run.steps, self.halve)[rung] for program in self.programs]
            starts = [rungs(p.run.steps, self.halve)[rung - 1] if rung else 0 for p in self.programs]
            parts = [[i for i, trial in enumerate(p.trials) if trial.number in active] for p in self.programs]
            self.lane_steps_left = sum((b - a) * len(part) for a, b, part in zip(starts, ends, parts, strict=True))
            for program, part, until, lanes in zip(self.programs, parts, ends, lane_counts, strict=True):
                K = chunk_size(len(part), lanes, len(self.devices)) if part else 1
                for at in range(0, len(part), K):
                    self._train_chunk(program, part[at : at + K], K, until)
                    write_results(self.out, self.trials)
            active = self._survivors(active, rung)

    def _lane_counts(self) -> list[int]:
        """Return the lanes of each program; sweep.json keeps them, so that a resumed sweep runs the same programs."""
        settings = read_json(self.out / FILE)
        if "lanes" not in settings:
            settings["lanes"] = [lanes_that_fit(p, self.cache, self.lanes, self.devices) for p in self.programs]
            atomic_write(self.out / FILE, json.dumps(settings, indent=1) + "\n")
        return settings["lanes"]

    def _survivors(self, active: set[int], rung: int) -> set[int]:
        """Return the trials that go on after a rung: those with the least validation loss."""
        if not self.halve:
            return active
        losses = {}
        for trial in self.trials:
            if trial.number in active and not trial.diverged:
                step = rungs(trial.run.steps, self.halve)[rung]
                losses[trial.number] = logged_evaluation(trial.folder, step).get("valid_loss", math.nan)
        ranked = sorted(losses, key=lambda n: (not math.isfinite(losses[n]), losses[n], n))
        return set(ranked[: max(len(active) // self.halve, 1)])

    def _train_chunk(self, program: Program, indices: list[int], K: int, until: int) -> None:
        """Train some trials of a program as K lanes from where they are to step `until`; evaluate and save them."""
        trials = [program.trials[i] for i in indices]
        if all(trial.finished_steps >= until for trial in trials):
            return
        self.stop.check()
        lanes = [Lane(trial, self.cache, self.guard) for trial in trials]
        start = common_step(lanes, until)
        with contextlib.ExitStack() as resources:
            for lane in lanes:
                with _muted(lane is not lanes[0]):
                    lane.start(start)
                resources.callback(lane.close)
                if lane.log and not logged_evaluation(lane.folder, 0):
                    lane.log.write({"step": 0, **self.cache.base_losses(lane.run)})
            stack, step = None, start
            if start < until and not all(lane.diverged for lane in lanes):
                stack = LaneStack(program, indices, [lane.setup for lane in lanes], K, self.devices, self.cache)
                step = self._train_steps(lanes, stack, start, until)
            evaluated = self._save(lanes, stack, step, until)
            self.stop.end_steps()
        if not evaluated:
            console.print(f"stopped at step {step} of {span(trials)}, saved but not evaluated; go on with --resume")
            raise Stopped
        if step < until and not all(lane.diverged for lane in lanes):
            console.print(f"stopped at step {step} of {until} of {span(trials)}, saved; go on with --resume",
                          soft_wrap=True)  # fmt: skip
            raise Stopped

    def _train_steps(self, lanes: list[Lane], stack: LaneStack, start: int, until: int) -> int:
        """Train steps start + 1 to `until`, or until a signal; return the last step."""
        run, pending, step = lanes[0].run, [], start
        self.stop.check()  # before `begin_steps`, after which a signal waits for the end of a step
        self.stop.begin_steps(start)
        self._resume_clock(lanes)
        while step < until:
            for lane in lanes:
                lane.checkpoints.check()
            if self.stop.asked or not self.stop.may_step(step + 1) or all(lane.diverged for lane in lanes):
                break
            step += 1
            faults.at("step", step)
            pending.append((step, stack.train_step(stack.put([lane.next_batch() for lane in lanes]))))
            if step % run.log_every == 0 or step == until:
                self._collect(lanes, stack, pending)
                self._log(lanes, step, until)
            if run.save_every and step % run.save_every == 0 and step < until:
                self._collect(lanes, stack, pending)
                self._save(lanes, stack, step, until)
                self._resume_clock(lanes)
        if pending:
            self._collect(lanes, stack, pending)
            self._log(lanes, step, until)
        return step

    def _resume_clock(self, lanes: list[Lane]) -> None:
        """Leave the time since the last step (compiling, saving) out of the rates."""
        self.resumed_at = time.perf_counter()
        for lane in lanes:
            if lane.log:
                lane.log.last = self.resumed_at

    def _collect(self, lanes: list[Lane], stack: LaneStack, pending: list[Any]) -> None:
        """Fetch the metrics of the pending steps in one transfer, and give each lane its own."""
        rows = [(step, jax.device_get(metrics)) for step, metrics in pending]
        pending.clear()
        now = time.perf_counter()
        self.train_seconds, self.resumed_at = self.train_seconds + now - self.resumed_at, now
        self.lane_steps += len(rows) * len(lanes)
        self.lane_steps_left -= len(rows) * len(lanes)
        for k, lane in enumerate(lanes):
            lane.add_metrics(rows, k, stack.rms_factors[k])

    def _log(self, lanes: list[Lane], step: int, until: int) -> None:
        """Write the metrics of each lane and print the progress of all lanes, about ten times per chunk of steps."""
        for lane in lanes:
            was_diverged = lane.diverged
            lane.write_log()
            if lane.diverged and not was_diverged:
                _print_diverged(lane)
        every = lanes[0].run.log_every
        if step < until and step * 10 // until == (step - every) * 10 // until:
            return
        rate = self.lane_steps / self.train_seconds
        losses = [lane.log.row["loss"] for lane in lanes if not lane.diverged] or [math.nan]
        loss = " to ".join(f"{x:.4f}" for x in sorted({min(losses), max(losses)}))
        left = format_time(max(self.lane_steps_left, 0) / rate)
        console.print(f"{span([lane.trial for lane in lanes])} · step {step}/{until} · loss {loss} · {rate:.2f} "
                      f"lane-steps/s · {left} left", soft_wrap=True)  # fmt: skip

    def _save(self, lanes: list[Lane], stack: LaneStack | None, step: int, until: int) -> bool:
        """Save a checkpoint of each active lane; at step `until` evaluate them all. Return False if a signal ended
        the evaluation."""
        states, complete = stack.unstack() if stack else [lane.setup.state for lane in lanes], True
        evaluated: list[tuple[Lane, Any, dict[str, Any], bool]] = []
        for lane, state in zip(lanes, states, strict=True):
            if lane.diverged or (stack is None and lane.trial.finished_steps >= until):
                continue
            lane.setup.state = jax.device_put(state, self.cache.replicated)
            try:
                check_finite(lane.setup.state.trainable, step, lane.run)
            except InputError as error:
                lane.mark_diverged(str(error))
                _print_diverged(lane)
                continue
            # Not trained in this process: an earlier one was killed after the last save, and its log has the losses.
            logged = logged_evaluation(lane.folder, step) if stack is None else {}
            losses = logged
            if not logged and step == until:
                losses = self.stop.interruptible(lambda lane=lane: evaluate_losses(lane.setup))
            complete = complete and losses is not None
            lane.runner.save(losses or {})
            lane.setup.state = None  # type: ignore[assignment]  # the stack has it
            if step == until and losses is not None:
                evaluated.append((lane, state, losses, bool(logged)))
        for lane, state, losses, was_logged in evaluated:  # once all lanes are saved
            lane.checkpoints.wait()
            lane.setup.state = state
            scores = {} if was_logged else self.stop.interruptible(lambda lane=lane: self._scores(lane))
            if complete := complete and scores is not None:
                self._write_summary(lane, stack, len(lanes), step, losses | scores, was_logged)
            lane.setup.state = None  # type: ignore[assignment]
        return complete

    def _write_summary(
        self, lane: Lane, stack: LaneStack | None, lanes: int, step: int, after: dict[str, Any], was_logged: bool
    ) -> None:
        if not was_logged:
            lane.log.write({"step": step, **after})
        cost = (
            {"step_peak_bytes": stack.peak_bytes, "compile_seconds": round(stack.compile_seconds, 2)} if stack else {}
        )
        summary = summarize(lane.setup, lane.folder, self.cache.base_losses(lane.run), after, cost | {"lanes": lanes})
        summary |= {"status": "done" if step == lane.run.steps else "stopped", "steps": step}
        atomic_write(lane.folder / "summary.json", json.dumps(summary, indent=1) + "\n")

    def _scores(self, lane: Lane) -> dict[str, Any]:
        """Return the scores on validation rows of a lane at its end, if the sweep asks for them."""
        if not self.score or lane.runner.last_step != lane.run.steps:
            return {}
        setup, rows = lane.setup, self.cache.valid_rows(lane.run, self.score)
        setup.state = jax.device_put(setup.state, self.cache.replicated)
        with explain_scoring_failure(lane.run, lane.run.steps):
            answers = generate_answers(*bound_model(setup), setup.tokenizer, rows, longest_reply(rows, setup.tokenizer))
            return {"valid_scores": setup.task.score(rows, answers)}


def rungs(steps: int, halve: int) -> list[int]:
    """Return the steps at which all but the best stop, and the last: steps / halve^2, steps / halve, steps."""
    return [max(round(steps / halve**k), 1) for k in (2, 1, 0)] if halve else [steps]


@contextlib.contextmanager
def _muted(muted: bool) -> Iterator[None]:
    """Print nothing meanwhile, if `muted`."""
    before, console.quiet = console.quiet, muted or console.quiet
    try:
        yield
    finally:
        console.quiet = before


def _print_diverged(lane: Lane) -> None:
    console.print(f"trial {lane.trial.number} ({lane.trial.name}) diverged: {lane.reason}", soft_wrap=True)
