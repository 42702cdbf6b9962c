"""`python -m graftax.train.bench`: time and memory of train steps, compared with HF Transformers + PEFT."""

import argparse
import os
import sys

from ... import InputError
from .cases import CASES
from .race import check_torch, race
from .table import section, write


def options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        "python -m graftax.train.bench",
        description="Time and memory of a train step; see docs/results/steps.md.",
        epilog="Example: python -m graftax.train.bench --torch-python ~/torch/bin/python --malloc both --write",
    )
    parser.add_argument("--cases", default="", help="names with commas between, e.g. 'S,M lean'; default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"], help="run this device's cases")
    parser.add_argument("--steps", type=int, default=9, help="rounds that count, after 2 that do not")
    parser.add_argument("--malloc", default="keep", choices=["keep", "plain", "both"],
                        help="keep: glibc keeps freed memory and uses huge pages; plain: its defaults")  # fmt: skip
    parser.add_argument("--torch-python", default=os.environ.get("GRAFTAX_TORCH_PYTHON", ""),
                        help="a Python with torch, transformers and peft ($GRAFTAX_TORCH_PYTHON)")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results/steps.md")
    return parser.parse_args(argv)


def bench(argv: list[str] | None = None) -> str:
    """Run the cases and return the tables. Raises InputError for an unknown case or a Python that lacks torch."""
    args = options(argv)
    known = {case.name: case for case in CASES if case.device == args.device}
    names = [name.strip() for name in args.cases.split(",") if name.strip()] or list(known)
    for name in names:
        if name not in known:
            raise InputError(f"--cases {name!r}: the cases on {args.device} are {', '.join(known) or 'none yet'}")
    if not names:
        raise InputError(f"--device {args.device}: no case runs there yet; add a line to train/bench/cases.py")
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: wanted 1 or more")
    torch_python = check_torch(args.torch_python) if args.torch_python else None
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"bench: the load is {load:.1f}: other work slows steps, HF's (OpenMP) more than XLA's", file=sys.stderr)
    sections = []
    for malloc in ["keep", "plain"] if args.malloc == "both" else [args.malloc]:
        results = []
        for name in names:
            print(f"{name} ({malloc}) ...", file=sys.stderr, flush=True)
            results += race(known[name], args.steps, malloc, torch_python)
        sections.append(section(results, malloc))
        if args.write:
            write(sections[-1], f"{args.device} {malloc}")
    return "\n".join(sections)


if __name__ == "__main__":
    try:
        print(bench())
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
