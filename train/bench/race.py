"""Contenders, each a live process, that take turns step by step, so that noise affects all of them alike."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ... import InputError
from ..config import MALLOC_ENV
from .cases import Case

WARM_UP = 2  # rounds that are not counted


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one contender in a case: seconds of each counted step, losses, and memory in MB."""

    case: Case
    method: str
    who: str  # graftax, HF
    seconds: tuple[float, ...]
    cpu: tuple[float, ...]  # of all its threads
    losses: tuple[float, ...]
    facts: dict[str, Any]

    @property
    def ms(self) -> float:
        """Return the median time of a step in milliseconds."""
        return 1e3 * statistics.median(self.seconds)


class Contender:
    """A process that runs a train step on request (see peer.py). The constructor returns when it is ready."""

    def __init__(self, command: list[str], spec: dict[str, Any], env: dict[str, str], name: str):
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen([*command, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=env)  # fmt: skip
        self.started = self.hear()

    def hear(self) -> dict[str, Any]:
        """Return its next message. Raises InputError with the last line of its stderr if it died."""
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.process.wait()
            self.log.seek(0)
            lines = [line.strip() for line in self.log.read().splitlines() if line.strip()] or ["no message"]
            raise InputError(f"bench: {self.name} stopped with exit status {self.process.returncode}: {lines[-1]}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """Run one train step and return its measurements."""
        try:
            self.process.stdin.write("step\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # hear() says why
        return self.hear()

    def end(self) -> dict[str, Any]:
        """Stop the process and return its peak memory."""
        self.process.stdin.close()  # type: ignore[union-attr]
        fact = self.hear()
        self.process.wait()
        return fact


def race(case: Case, steps: int, malloc: str, torch_python: str | None) -> list[Result]:
    """Return the results of all contenders of a case over `steps` counted rounds, in the order A B A B."""
    runners: list[tuple[str, str, Contender]] = []
    try:
        for method in case.methods:
            for who, command in commands(torch_python).items():
                spec = case.spec(method, WARM_UP + steps)
                # Each is ready before the next starts: compiling takes all cores.
                runner = Contender(command, spec, environment(malloc), f"{who} {case.name} {method}")
                runners.append((method, who, runner))
        took: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(runners))}
        for _ in range(WARM_UP + steps):
            for i in took:
                took[i].append(runners[i][2].step())
        return [_result(case, *runner, took[i]) for i, runner in enumerate(runners)]
    finally:
        for _, _, runner in runners:
            runner.process.kill()
            runner.process.wait()


def _result(case: Case, method: str, who: str, runner: Contender, took: list[dict[str, Any]]) -> Result:
    facts = runner.started | runner.end()
    seconds, cpu = (tuple(step[k] for step in took[WARM_UP:]) for k in ("s", "cpu"))
    return Result(case, method, who, seconds, cpu, tuple(step["loss"] for step in took), facts)


def commands(torch_python: str | None) -> dict[str, list[str]]:
    """Return {contender: its command}."""
    found = {"graftax": [sys.executable, "-m", f"{__package__}.jax_peer"]}
    if torch_python:
        # Import this folder as the package `bench`, without the repository on the path: its peft/ would hide HF PEFT.
        start = f"import runpy, sys; sys.path[0] = {str(Path(__file__).parents[1])!r}; import bench; del sys.path[0]"
        found["HF"] = [torch_python, "-c", f"{start}; runpy.run_module('bench.torch_peer', run_name='__main__')"]
    return found


def check_torch(python: str) -> str:
    """Return the path. Raises InputError if that Python lacks torch, transformers or peft."""
    look = "import sys; del sys.path[0]; from importlib.util import find_spec as find; "
    look += "print(*[name for name in ('torch', 'transformers', 'peft') if not find(name)])"
    try:
        answer = subprocess.run([python, "-c", look], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"--torch-python {python}: not a Python that runs ({error})") from None
    if answer.stdout.strip():
        raise InputError(
            f"--torch-python {python}: has no {answer.stdout.strip()}; pip install torch transformers peft"
        )
    return python


def environment(malloc: str) -> dict[str, str]:
    """Return the environment of every contender: the same allocator, and no preallocation of GPU memory."""
    env = {k: v for k, v in os.environ.items() if k not in MALLOC_ENV}
    return env | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (MALLOC_ENV if malloc == "keep" else {})
