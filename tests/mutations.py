"""Forty one-line faults, each of which must make the fast tier fail: `make mutate [ARGS="NAME ..."]`.

Each mutation is applied alone to a copy of the repository. The tests that should notice it run first; if none of them
fails, the whole fast tier runs. A mutation that survives means that a test is missing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One fault: in `file` the text `old`, which occurs once, becomes `new`; `tests` should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


MUTATIONS: tuple[Mutation, ...] = ()


def stale(mutation: Mutation) -> bool:
    """Whether the source no longer has the text that a mutation changes, or has it more than once."""
    return (ROOT / mutation.file).read_text("utf-8").count(mutation.old) != 1


def copy(to: Path) -> Path:
    """Copy the files that git knows to `to/graftax`, so that the copy is the package."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = to / "graftax" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (to / "graftax" / ".cache").symlink_to(ROOT / ".cache")  # compiled programs that a mutation leaves as they are
    return to / "graftax"


def first_failure(package: Path, tests: str) -> str:
    """Run tests of the fast tier in the copy and return the first that fails, or an empty text."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not full", *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    if done.returncode == 5:
        raise SystemExit(f"no test matches {tests!r}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else "" if done.returncode == 0 else f"exit status {done.returncode}"


def main(names: list[str]) -> int:
    """Try the named mutations, or all; return how many survive."""
    survivors = 0
    with tempfile.TemporaryDirectory() as work:
        package = copy(Path(work))
        for mutation in MUTATIONS:
            if names and mutation.name not in names:
                continue
            began, path = time.perf_counter(), package / mutation.file
            source = path.read_text("utf-8")
            path.write_text(source.replace(mutation.old, mutation.new), "utf-8")
            failed = first_failure(package, mutation.tests) or first_failure(package, "-n 2 --dist loadgroup")
            path.write_text(source, "utf-8")
            survivors += not failed
            seconds = time.perf_counter() - began
            print(f"| {mutation.name} | {mutation.file} | {failed or 'SURVIVES'} | {seconds:.0f} s |", flush=True)
    print(f"{survivors} survive")
    return min(survivors, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
