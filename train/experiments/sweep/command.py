"""`graftax sweep`: many variations of a fine-tune, as few programs, over one copy of the base.

A sweep is a folder of ordinary runs (`cells/000`, ...), `sweep.json` that says what they vary, and what they found:
`results.jsonl`, a line a cell, a table, and pictures. A cell's run can be evaluated, merged, exported, or gone on with
by itself, as any run.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .... import InputError
from ....atomic import atomic_write, is_leftover
from ....bounds import Checked
from ....data.tokenizers.chat import today
from ....peft import Subset
from ....strict_json import read_json
from ...cluster.signals import Stop
from ...config import Run, flatten, shorten, to_json
from ...config_versions import VERSION, upgrade
from ...runs.files import LOCK
from ...runs.lock import Lock
from ...runs.record import make_run_folder
from ..base_cache import BaseCache
from .results import report
from .scheduler import FILE, Scheduler
from .trials import Trial, given, trials_of

# May change on --resume; a budget counts until it has said how many steps a training has.
FREELY = ("budget", "run.date", "run.log_every", "run.save_every", "run.keep", "run.tensorboard", "run.verify")
CHOSEN = ("lanes", "steps")  # written beside what was asked for
HELP = """graftax sweep RECIPE --over FIELD=VALUES ... [flags of graftax finetune]: many variations, as few programs

Example: graftax sweep sft --base runs/five --data.task snips --data.root DATA --method lora \\
             --over optim.lr=1e-3,3e-3,1e-2 --over method.rank=4,8,16 --over seed=0..2 --steps 120

  --over    an axis: any field of a run, and its values; a..b are the whole numbers from a to b, b too. Every
            combination is a cell. Several --over, several axes
  --halve N successive halving: at steps/N^2 and steps/N the best 1/N by validation loss go on
  --lanes N how many cells train at once; else the plan's memory and a short timing choose
  --score N validation rows that each cell answers at its end (0: none; the test is left to `graftax eval`)
  --out     the folder (runs/sweep): cells/NNN is an ordinary run each; results.jsonl, table.md, pictures
  --resume  go on with a sweep that was ended

Cells whose runs differ in numbers, seeds, data, or ranks (LoRA and its kin) are lanes of one program: a vmap over
what trains, on one copy of the base. Others are programs of their own. Lanes share the base, the compilation and
the launches, not the FLOPs. A cell that diverges stops alone. Each equals its own `graftax finetune`, to rounding."""


@dataclasses.dataclass(frozen=True)
class Sweep(Checked):
    """A recipe's run, the axes, and how the cells are gone through."""

    run: Run
    over: tuple[str, ...]
    halve: int = 0  # successive halving: of this many, one goes on at each rung; 0: all go to the end
    lanes: int = 0  # at once; 0: chosen
    score: int = 0  # validation rows that each cell answers at its end

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.halve == 1:
            raise InputError(f"--halve {self.halve}: wanted 2 or more: of so many cells one goes on; or 0 for all")
        if self.run.mesh not in ((1, -1, 1), (1, 1, 1)):
            raise InputError("--mesh: a sweep lays its lanes over the devices, a lane on one; drop the flag")
        for name in ("offload", "wandb", "eval_every"):
            if getattr(self.run, name):
                raise InputError(f"--{name.replace('_', '-')}: a sweep has no such thing; drop the flag")
        if self.run.resume not in ("never", "auto"):
            raise InputError(f"--resume {self.run.resume}: a sweep goes on from its newest steps; take --resume alone")
        if self.run.method != Subset() and any(text.startswith("method=") for text in self.over):
            raise InputError("--over method=...: another method has other fields, so that those of --method would be "
                             "lost; drop --method, and give fields as axes: --over method.rank=4")  # fmt: skip

    def rungs(self, steps: int) -> list[int]:
        """The steps at which all but the best stop, and the last: steps / halve^2, steps / halve, steps."""
        return [max(round(steps / self.halve**k), 1) for k in (2, 1, 0)] if self.halve else [steps]


def sweep(args: list[str]) -> dict[str, Any]:
    """The command."""
    from ...cli import run_of, take

    if "--help" in args or "-h" in args:
        print(HELP)
        raise SystemExit(0)
    over: list[str] = []
    text, args = take(args, "--over")
    while text is not None:
        over.append(text)
        text, args = take(args, "--over")
    numbers, args = given(args, dict.fromkeys(("halve", "lanes", "score"), int))
    run = run_of("finetune", args, ("--over", "--halve", "--lanes", "--score"))
    run = dataclasses.replace(run, out="runs/sweep") if run.out == "runs/sft" else run
    return execute(Sweep(run, tuple(over), **numbers))


def execute(plan: Sweep) -> dict[str, Any]:
    """Run a sweep, or go on with it; returns its best cell and where all are."""
    plan = dated(plan, FILE)
    run = plan.run
    made = trials_of(plain(run), plan.over, Path(run.out))
    with contextlib.ExitStack() as held:
        stop = held.enter_context(Stop())
        made = carry_out(plan, made, BaseCache(), stop)
    return report(Path(run.out), made)


def dated(plan: Any, file: str) -> Any:
    """The plan with the date of its runs: the one given, that which `file` in its folder began with, or today's."""
    run, path = plan.run, Path(plan.run.out) / file
    began = read_json(path).get("run", {}) if run.resume != "never" and path.is_file() else {}
    return dataclasses.replace(plan, run=dataclasses.replace(run, date=run.date or began.get("date") or today()))


def plain(run: Run) -> Run:
    """The run that cells are made of: what is said of the folder of all of them is not theirs."""
    force = ",".join(word for word in run.force.split(",") if word not in ("", "lock"))
    return dataclasses.replace(run, resume="never", force=force)


def carry_out(plan: Sweep, made: list[Trial], ground: BaseCache, stop: Stop) -> list[Trial]:
    """All cells of a sweep to their ends, in its folder, with all said that their runs needed."""
    out, run = Path(plan.run.out), plan.run
    said = {"run": json.loads(to_json(dataclasses.replace(run, out="", resume="never", force=""))),
            "over": list(plan.over), "halve": plan.halve, "score": plan.score}  # fmt: skip
    check_out(out, run.resume, said, FILE, "sweep")
    made = ground.settled(made)
    work = Scheduler(plan, ground, stop, made)
    with opened(out, run, said, FILE) as work.guard:
        work.go()
    return made


@contextlib.contextmanager
def opened(out: Path, run: Run, said: dict[str, Any], file: str) -> Iterator[Any]:
    """The folder of an experiment, with the file that says what it is, while no other process writes in it; gives what
    raises if one does."""
    make_run_folder(out)
    with Lock(out, "lock" in run.force.split(",")) as lock:
        if not (out / file).exists():
            atomic_write(out / file, json.dumps(said, indent=1) + "\n")
        yield lock.check


def check_out(out: Path, resume: str, said: dict[str, Any], file: str, what: str) -> None:
    """InputError for a folder that does not hold this sweep, or whatever `file` makes of it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    there = sorted(p.name for p in out.iterdir()) if out.exists() else []
    held = [name for name in there if name != LOCK and not is_leftover(name)]
    if not held:
        return
    if resume == "never":
        raise InputError(f"--out {out} is not an empty folder; take another, or go on with --resume")
    if not (out / file).exists():
        raise InputError(f"--resume: {out} holds no {what} (it has {', '.join(held[:3])}); correct --out")
    saved = read_json(out / file)
    then, now = flatten(saved | {"run": {"version": VERSION} | upgrade(saved.get("run", {}))}), flatten(said)
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key) and key not in FREELY and not key.startswith(CHOSEN):
            raise InputError(f"--resume: {key} is {shorten(now.get(key))}, the {what} in {out} began with "
                             f"{shorten(then.get(key))}; put that back, or take another --out")  # fmt: skip
