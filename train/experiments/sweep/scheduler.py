"""A sweep under way: its cells in programs, chunk by chunk, to their ends or to the rung at which they stop."""

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
from .groups import Group, groups
from .lane_count import balanced, lanes_that_fit
from .lanes import Lane, Stack, common_step
from .results import diverged, reached, write
from .trials import Trial

FILE = "sweep.json"


class Scheduler:
    """A sweep under way."""

    def __init__(self, sweep: Any, ground: BaseCache, stop: Stop, made: list[Trial]):
        """Finds the programs, and says them. Writes nothing."""
        self.sweep, self.ground, self.stop, self.made = sweep, ground, stop, made
        self.out, self.devices = Path(sweep.run.out), jax.devices()
        self.guard: Any = lambda: None  # raises if another process writes here now
        self.seconds, self.since, self.taken, self.left = 0.0, 0.0, 0, 0  # in steps; lane-steps done here, and to do
        self.groups, apart = groups(made, ground.model)
        if sweep.halve and not all(ground.rows(cell.run)[2] for cell in made):
            raise InputError("--halve: the task has no validation rows, so that nothing says which cells are the best; "
                             "drop the flag, or give --data.valid FILE")  # fmt: skip
        for cell in made:  # a bad row is said before anything is written
            ground.rows(cell.run)
            if sweep.score:
                ground.asked(cell.run, sweep.score)
        print_programs(self.groups, apart, len(made))

    def go(self) -> None:
        """All cells to their end, or to the rung at which they stop."""
        found, most, alive = self.groups, self._at_once(), {cell.number for cell in self.made}
        for rung in range(len(self.sweep.rungs(1))):
            ends = [self.sweep.rungs(group.run.steps)[rung] for group in found]
            before = [self.sweep.rungs(group.run.steps)[rung - 1] if rung else 0 for group in found]
            parts = [[i for i, cell in enumerate(g.cells) if cell.number in alive] for g in found]
            self.left = sum((b - a) * len(part) for a, b, part in zip(before, ends, parts, strict=True))
            for group, part, until, lanes in zip(found, parts, ends, most, strict=True):
                K = balanced(len(part), lanes, len(self.devices)) if part else 1
                for at in range(0, len(part), K):
                    self.advance(group, part[at : at + K], K, until)
                    write(self.out, self.made)
            alive = self._best(alive, rung)

    def _at_once(self) -> list[int]:
        """How many lanes of each group at once: what sweep.json says, so that a resumed sweep is the same programs."""
        said = read_json(self.out / FILE)
        if "lanes" not in said:
            said["lanes"] = [
                lanes_that_fit(group, self.ground, self.sweep.lanes, self.devices) for group in self.groups
            ]
            atomic_write(self.out / FILE, json.dumps(said, indent=1) + "\n")
        return said["lanes"]

    def _best(self, alive: set[int], rung: int) -> set[int]:
        """The cells that go on after a rung: those with the least validation loss there."""
        if not self.sweep.halve:
            return alive
        losses = {}
        for cell in self.made:
            if cell.number in alive and not diverged(cell):
                at = self.sweep.rungs(cell.run.steps)[rung]
                losses[cell.number] = logged_evaluation(Path(cell.run.out), at).get("valid_loss", math.nan)
        order = sorted(losses, key=lambda n: (not math.isfinite(losses[n]), losses[n], n))
        return set(order[: max(len(alive) // self.sweep.halve, 1)])

    def advance(self, group: Group, which: list[int], K: int, until: int) -> None:
        """Cells of a group from where they are to step `until`, which is evaluated and saved."""
        chosen = [group.cells[i] for i in which]
        if all(reached(cell) >= until for cell in chosen):
            return
        self.stop.check()
        lanes = [Lane(cell, self.ground, self.guard) for cell in chosen]
        at = common_step(lanes, until)
        with contextlib.ExitStack() as held:
            for lane in lanes:
                with quiet(lane is not lanes[0]):
                    lane.begin(at)
                held.callback(lane.close)
                if lane.log and not logged_evaluation(lane.folder, 0):
                    lane.log.write({"step": 0, **self.ground.before(lane.run)})
            stack, i = None, at
            if at < until and not all(lane.dead for lane in lanes):
                stack = Stack(group, which, [lane.phase for lane in lanes], K, self.devices, self.ground)
                i = self.steps(lanes, stack, at, until)
            judged = self.save(lanes, stack, i, until)
            self.stop.end_steps()
        if not judged:
            console.print(f"stopped at step {i} of {span(chosen)}, saved but not evaluated; go on with --resume")
            raise Stopped
        if i < until and not all(lane.dead for lane in lanes):
            console.print(f"stopped at step {i} of {until} of {span(chosen)}, saved; "
                          "go on with --resume", soft_wrap=True)  # fmt: skip
            raise Stopped

    def steps(self, lanes: list[Lane], stack: Stack, at: int, until: int) -> int:
        """Steps at + 1 to `until`, or to where a signal ends them; returns the last."""
        run, pending, i = lanes[0].run, [], at
        self.stop.check()  # before this loop: it has no step to end with
        self.stop.begin_steps(at)
        self.clock(lanes)
        while i < until:
            for lane in lanes:
                lane.checkpoints.check()
            if self.stop.asked or not self.stop.may_step(i + 1) or all(lane.dead for lane in lanes):
                break
            i += 1
            faults.at("step", i)
            pending.append((i, stack.take(stack.put([lane.feed() for lane in lanes]))))
            saves = bool(run.save_every) and i % run.save_every == 0 and i < until
            if i % run.log_every == 0 or i == until:
                self.take(lanes, stack, pending)
                self.log(lanes, i, until)
            if saves:
                self.take(lanes, stack, pending)
                self.save(lanes, stack, i, until)
                self.clock(lanes)
        if pending:
            self.take(lanes, stack, pending)
            self.log(lanes, i, until)
        return i

    def clock(self, lanes: list[Lane]) -> None:
        """Rates count from now on: what was before is no step."""
        self.since = time.perf_counter()
        for lane in lanes:
            if lane.log:
                lane.log.last = self.since

    def take(self, lanes: list[Lane], stack: Stack, pending: list[Any]) -> None:
        """Give each lane what the steps since the last time gave; one transfer for all."""
        rows = [(step, jax.device_get(metrics)) for step, metrics in pending]
        pending.clear()
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        self.taken, self.left = self.taken + len(rows) * len(lanes), self.left - len(rows) * len(lanes)
        for k, lane in enumerate(lanes):
            lane.took(rows, k, stack.shares[k])

    def log(self, lanes: list[Lane], i: int, until: int) -> None:
        """Write each lane's log, and say how far all are, about ten times."""
        for lane in lanes:
            was = lane.dead
            lane.write()
            if lane.dead and not was:
                console.print(f"cell {lane.cell.number} ({lane.cell.name}) diverged: {lane.died}", soft_wrap=True)
        every = lanes[0].run.log_every
        if i < until and i * 10 // until == (i - every) * 10 // until:
            return
        rate = self.taken / self.seconds
        losses = [lane.log.row["loss"] for lane in lanes if not lane.dead] or [float("nan")]
        loss = " to ".join(f"{x:.4f}" for x in sorted({min(losses), max(losses)}))
        console.print(f"{span([lane.cell for lane in lanes])} · step {i}/{until} · loss {loss} · {rate:.2f} "
                      f"lane-steps/s · {format_time(max(self.left, 0) / rate)} left", soft_wrap=True)  # fmt: skip

    def save(self, lanes: list[Lane], stack: Stack | None, i: int, until: int) -> bool:
        """Each living lane's checkpoint; at `until`, when all are there, what each is worth. Whether no signal ended
        that."""
        states, ended, whole = stack.split_up() if stack else [lane.phase.state for lane in lanes], [], True
        for lane, state in zip(lanes, states, strict=True):
            if lane.dead or (stack is None and reached(lane.cell) >= until):
                continue
            lane.phase.state = jax.device_put(state, self.ground.whole)
            try:
                check_finite(lane.phase.state.trainable, i, lane.run)
            except InputError as error:
                lane.die(str(error))
                console.print(f"cell {lane.cell.number} ({lane.cell.name}) diverged: {error}", soft_wrap=True)
                continue
            before = logged_evaluation(lane.folder, i) if stack is None else {}  # killed behind the last save
            evaluates = not before and i == until
            found = self.stop.interruptible(lambda lane=lane: evaluate_losses(lane.phase)) if evaluates else before
            whole = whole and found is not None
            lane.course.save(found or {})
            lane.phase.state = None  # type: ignore[assignment]  # the stack has it
            if i == until and found is not None:
                ended.append((lane, state, found, bool(before)))
        for lane, state, found, noted_before in ended:
            lane.checkpoints.wait()
            lane.phase.state = state
            scores = {} if noted_before else self.stop.interruptible(lambda lane=lane: self.scores(lane))
            if whole := whole and scores is not None:
                found |= scores
                if not noted_before:
                    lane.log.write({"step": i, **found})
                said = summarize(lane.phase, lane.folder, self.ground.before(lane.run), found, cost(stack, len(lanes)))
                said |= {"status": "done" if i == lane.run.steps else "stopped", "steps": i}
                atomic_write(lane.folder / "summary.json", json.dumps(said, indent=1) + "\n")
            lane.phase.state = None  # type: ignore[assignment]
        return whole

    def scores(self, lane: Lane) -> dict[str, Any]:
        """The scores of a lane at its end on validation rows, if the sweep asks for them."""
        if not self.sweep.score or lane.course.last_step != lane.run.steps:
            return {}
        phase, rows = lane.phase, self.ground.asked(lane.run, self.sweep.score)
        phase.state = jax.device_put(phase.state, self.ground.whole)
        with explain_scoring_failure(lane.run, lane.run.steps):
            answers = generate_answers(*bound_model(phase), phase.tokenizer, rows, longest_reply(rows, phase.tokenizer))
            return {"valid_scores": phase.task.score(rows, answers)}


def cost(stack: Stack | None, lanes: int) -> dict[str, Any]:
    """What the compiler says of a stack's program, and how many cells share its steps."""
    made = {"step_peak_bytes": stack.peak, "compile_seconds": round(stack.seconds, 2)} if stack else {}
    return made | {"lanes": lanes}


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Say nothing, if on."""
    before, console.quiet = console.quiet, on or console.quiet
    try:
        yield
    finally:
        console.quiet = before


def span(cells: list[Trial]) -> str:
    """`cells 0-3`, `cell 4`."""
    first, last = cells[0].number, cells[-1].number
    return f"cells {first}-{last}" if last > first else f"cell {first}"


def print_programs(found: list[Group], apart: dict[str, str], n: int) -> None:
    """Say which programs there are, and why not one."""
    console.print(f"{n} cells in {len(found)} program{'s' * (len(found) > 1)}: each trains its cells as lanes of one "
                  "step. They share the base, the compilation and the launches, not the FLOPs: it pays where one run "
                  "does not fill the machine", soft_wrap=True)  # fmt: skip
    for name, why in sorted(apart.items()):
        console.print(f"cells that differ in {name} are apart: {why}", soft_wrap=True)
    for i, group in enumerate(found):
        varies = ", ".join(group.numbers) or "data alone"
        cells = ", ".join(str(cell.number) for cell in group.cells[:8]) + (", ..." if len(group.cells) > 8 else "")
        name = type(group.run.method).__name__.lower()
        console.print(f"program {i + 1}: {len(group.cells)} lane{'s' * (len(group.cells) > 1)} of {name} ({cells}); "
                      f"in arrays: {varies}; {group.run.steps} steps", soft_wrap=True)  # fmt: skip
