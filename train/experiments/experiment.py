"""Experiment: a command that trains many runs in one folder. `Sweep`, `Compare` and `Decide` are experiments."""

import contextlib
import dataclasses
import inspect
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro

from ... import InputError
from ...atomic import atomic_write, is_leftover
from ...bounds import Checked
from ...data.tokenizers.chat import today
from ...model.hf.files import read_json
from ..cluster.signals import Stop
from ..config import Run, flatten, shorten, to_json
from ..config_versions import VERSION, upgrade
from ..flags import RUN_FLAGS, parse, run_and_flags
from ..runs.files import LOCK
from ..runs.lock import Lock
from ..runs.record import make_run_folder
from .base_cache import BaseCache

# Settings that may change with --resume. A budget counts only until the number of steps has been decided.
MAY_CHANGE = ("budget", "run.date", "run.log_every", "run.save_every", "run.keep", "run.tensorboard", "run.verify")
DECIDED = ("lanes", "steps")  # written into the settings file once they are known


@dataclasses.dataclass(frozen=True)
class Experiment(Checked):
    """A command that trains many runs in one folder, and can be stopped and resumed.

    The folder holds `NAME.json` (the settings), `results.jsonl` (a line for each result), a report, and the runs. A
    subclass says what to check (`check`), to do (`execute`) and to report (`report`).
    """

    NAME: ClassVar[str]  # of the command
    NOUN: ClassVar[str]  # in messages
    RECIPE: ClassVar[str] = ""  # if the command line names none; empty: it must
    METHOD: ClassVar[str] = ""  # likewise

    config: Annotated[Run, tyro.conf.arg(name="")]  # what all runs share
    command: tyro.conf.Suppress[str] = dataclasses.field(default="", kw_only=True)  # the command line, for the report

    @classmethod
    def from_flags(cls, args: Sequence[str]) -> Self:
        """Return the experiment of `[RECIPE] --flag value ...`. Raises InputError for an unknown flag or bad value."""
        args = list(args) or ["--help"] * bool(cls.RECIPE)
        command = shlex.join(["graftax", cls.NAME, *(arg for arg in args if not arg.startswith("--resume"))])
        if cls.RECIPE and args[0].startswith("-"):
            args.insert(0, cls.RECIPE)
        from_file = bool(args) and args[0].endswith(".json")
        if cls.METHOD and not from_file and not any(arg.split("=")[0] == "--method" for arg in args):
            args += ["--method", cls.METHOD]
        run, flags = run_and_flags("finetune", args)
        run = run if from_file else dataclasses.replace(run, out=f"runs/{cls.NAME}")
        about = inspect.cleandoc(cls.__doc__ or "")
        default = cls(run, command=command)
        return parse(cls, flags, f"graftax {cls.NAME}", default=default, description=about, also=RUN_FLAGS)

    @property
    def out(self) -> Path:
        """The folder of the experiment."""
        return Path(self.config.out)

    @property
    def file(self) -> Path:
        """The settings file."""
        return self.out / f"{self.NAME}.json"

    @property
    def trial_config(self) -> Run:
        """The config that trials start from: without the flags that concern the folder of the experiment."""
        force = ",".join(word for word in self.config.force.split(",") if word not in ("", "lock"))
        return dataclasses.replace(self.config, resume="never", force=force)

    def run(self) -> dict[str, Any]:
        """Run the experiment, or what is left of it; return its results."""
        experiment = self.with_date()
        experiment.check()
        experiment.check_folder()
        with Stop() as stop:
            experiment.execute(BaseCache(), stop)
        return experiment.report()

    def check(self) -> None:
        """Raise InputError for settings that are missing or do not fit together."""
        raise NotImplementedError

    def execute(self, cache: BaseCache, stop: Stop) -> None:
        """Check all that needs the base and the data, then do what is not done yet, inside `open_folder`."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Write and print the report of the results; return them."""
        raise NotImplementedError

    def with_date(self) -> Self:
        """Return the experiment with the date of its runs: the one given, else that of its first start, else today."""
        run = self.config
        begun = read_json(self.file).get("run", {}) if run.resume != "never" and self.file.is_file() else {}
        date = run.date or begun.get("date") or today()
        return dataclasses.replace(self, config=dataclasses.replace(run, date=date))

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON; lanes are a choice of speed, not a setting."""
        run = json.loads(to_json(dataclasses.replace(self.config, out="", resume="never", force="")))
        names = {field.name for field in dataclasses.fields(self)} - {"config", "command", "lanes"}
        return json.loads(json.dumps({"run": run, **{name: getattr(self, name) for name in sorted(names)}}))

    def check_folder(self) -> None:
        """Raise InputError unless the folder is empty or, with --resume, holds this experiment."""
        out = self.out
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; give a folder")
        names = sorted(p.name for p in out.iterdir()) if out.exists() else []
        names = [name for name in names if name != LOCK and not is_leftover(name)]
        if not names:
            return
        if self.config.resume == "never":
            raise InputError(f"--out {out} is not an empty folder; take another, or go on with --resume")
        if not self.file.exists():
            raise InputError(f"--resume: {out} holds no {self.NOUN} (it has {', '.join(names[:3])}); correct --out")
        stored = read_json(self.file)
        stored["run"] = {"version": VERSION} | upgrade(stored.get("run", {}))
        then, now = flatten(stored), flatten(self.settings())
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key) and key not in MAY_CHANGE and not key.startswith(DECIDED):
                raise InputError(f"--resume: {key} is {shorten(now.get(key))}, but the {self.NOUN} in {out} began with "
                                 f"{shorten(then.get(key))}; put that back, or take another --out")  # fmt: skip

    @contextlib.contextmanager
    def open_folder(self) -> Iterator[Callable[[], None]]:
        """Make the folder and its settings file, and lock it against other processes.

        Yields a function that raises InputError if another process writes into the folder.
        """
        make_run_folder(self.out)
        with Lock(self.out, "lock" in self.config.force.split(",")) as lock:
            if not self.file.exists():
                self.write_settings(self.settings())
            yield lock.check

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings file."""
        atomic_write(self.file, json.dumps(settings, indent=1) + "\n")


def comma_list(kind: Callable[[str], Any], metavar: str) -> Any:
    """Return the tyro specification of a tuple that one argument gives, with commas between its values."""

    def parse_list(args: list[str]) -> tuple[Any, ...]:
        return tuple(kind(value) for value in args[0].split(",") if value)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse_list,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]  # a flag that may be given several times
Words = Annotated[tuple[str, ...], comma_list(str, "A,B,...")]
Floats = Annotated[tuple[float, ...], comma_list(float, "X,Y,...")]
Ints = Annotated[tuple[int, ...], comma_list(int, "N,M,...")]
