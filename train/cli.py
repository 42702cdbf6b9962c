"""The command line: `graftax COMMAND ...`. People read stderr; `--json` prints one JSON object on stdout."""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from .. import InputError, __version__
from ..bounds import is_text
from ..model.pattern import pattern_source
from .cluster.distributed import STOPPED
from .cluster.launch import run_processes
from .config import MALLOC_ENV, did_you_mean
from .flags import WORDS, parse, run_of, suggestion, take, take_json


def _train(phase: str) -> Callable[[list[str]], Any]:
    def command(args: list[str]) -> Any:
        run = run_of(phase, args)
        from .runs.train import train

        with pattern_source(args[0]) if args[0].endswith(".json") else contextlib.nullcontext():
            folder = train(run)
        return json.loads((folder / "summary.json").read_text("utf-8")) | {"out": str(folder)}

    return command


def _lazy(name: str, module: str = "commands") -> Callable[[list[str]], Any]:
    def command(args: list[str]) -> Any:
        spec = getattr(importlib.import_module(f".{module}", __package__), name)
        return parse(spec, args, f"graftax {name.lower()}", description=spec.__doc__ or "").run()

    return command


def _demo(args: list[str]) -> Any:
    from .demo import Demo, demo

    return demo(parse(Demo, args, "graftax demo", description=Demo.__doc__ or ""))


def _plan(args: list[str]) -> Any:
    from .plan.command import Plan

    return Plan.from_flags(args).run()


def _experiment(module: str, name: str) -> Callable[[list[str]], Any]:
    def command(args: list[str]) -> Any:
        return getattr(importlib.import_module(f".experiments.{module}", __package__), name).from_flags(args).run()

    return command


COMMANDS: dict[str, tuple[str, Callable[[list[str]], Any]]] = {
    "demo": ("pretrain a small base, tune it six ways, compare: the whole path in minutes", _demo),
    "pretrain": (
        "train a base on domains of text: graftax pretrain five_domains --data.root FOLDER",
        _train("pretrain"),
    ),
    "finetune": (
        "tune a base on a task: graftax finetune sft --base RUN_OR_MODEL --data FILE.jsonl",
        _train("finetune"),
    ),
    "plan": ("what a run needs, before it runs: graftax plan sft --base llama-3.1-8b --topology v5e:4x4", _plan),
    "sweep": (
        "train many variations of a fine-tune at once: graftax sweep sft --base RUN --over optim.lr=1e-3,3e-3",
        _experiment("sweep.command", "Sweep"),
    ),
    "compare": (
        "compare methods on tasks, with confidence intervals: graftax compare --base RUN --task T --methods lora,ia3",
        _experiment("compare", "Compare"),
    ),
    "decide": (
        "find the cheapest approach to a target score: graftax decide --base RUN --task T --target 'accuracy>=0.8'",
        _experiment("decide", "Decide"),
    ),
    "eval": ("held-out loss and a task's score of a run: graftax eval RUN", _lazy("Eval")),
    "generate": ("text from a run or a Hugging Face model: graftax generate RUN --prompt TEXT", _lazy("Generate")),
    "merge": (
        "fold an adapter into its base, and check: graftax merge RUN --out FOLDER",
        _lazy("Merge", "runs.commands"),
    ),
    "import": (
        "a run directory from a Hugging Face model: graftax import FOLDER_OR_HUB_ID --out RUN",
        _lazy("Import", "runs.commands"),
    ),
    "export": (
        "a Hugging Face folder from a run, checked: graftax export RUN --out FOLDER",
        _lazy("Export", "runs.commands"),
    ),
    "masks": (
        "what a mask picks of a base, before anything runs: graftax masks RUN_OR_PRESET --where RULE",
        _lazy("Masks"),
    ),
    "lineage": ("where a run comes from, phase by phase: graftax lineage RUN", _lazy("Lineage", "runs.commands")),
    "methods": ("the methods, and what each trains on a preset: graftax methods", _lazy("Methods")),
    "tokenizer": ("train a tokenizer: graftax tokenizer SOURCE --out FOLDER", _lazy("Tokenizer")),
}


READING = ("lineage", "masks", "methods")  # these compile nothing, and leave nothing behind


def usage() -> str:
    lines = [f"graftax {__version__}: pretrain a base, graft onto it", "", "graftax COMMAND --help", ""]
    return "\n".join(lines + [f"  {name:10} {about}" for name, (about, _) in COMMANDS.items()])


def keep_memory() -> None:
    """On Linux, start over once with an allocator that keeps its memory (config.MALLOC); not with GRAFTAX_MALLOC=0."""
    if sys.platform != "linux" or os.environ.get("GRAFTAX_MALLOC") == "0" or any(k in os.environ for k in MALLOC_ENV):
        return
    os.execve(sys.executable, [sys.executable, "-m", "graftax.train.cli", *sys.argv[1:]], os.environ | MALLOC_ENV)


def keep_compilations() -> None:
    """Reuse compiled programs between commands: in the user's cache, or where JAX_COMPILATION_CACHE_DIR says."""
    import jax

    from .caches import cache_folder

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (folder := cache_folder("jax")):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: list[str] | None = None) -> None:
    """Run a command; exit 0 only if it did all that was asked, 2 for a mistake in what was given."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "--version"):
        print(__version__ if args[:1] == ["--version"] else usage())
        raise SystemExit(0 if args else 2)
    name, (as_json, rest) = args[0], take_json(args[1:])
    try:
        if odd := next((arg for arg in args if not is_text(arg)), None):
            raise InputError(f"the argument {odd!a} is not UTF-8; give Unicode text (or rename the file)")
        processes, rest = take(rest, "--processes")
        if name not in COMMANDS:
            words = suggestion(name, WORDS, COMMANDS)
            hint = f"; did you mean {' or '.join(words)}?" if words else did_you_mean(name, COMMANDS)
            raise InputError(f"no command {name!r}{hint}; there are {', '.join(COMMANDS)}")
        if argv is None:
            keep_memory()
            if name not in READING:
                keep_compilations()
        if name in ("pretrain", "finetune"):
            result = run_processes(processes, lambda: COMMANDS[name][1](rest))
        elif processes:
            raise InputError(f"--processes: only pretrain and finetune run in several processes, not {name}")
        else:
            result = COMMANDS[name][1](rest)
    except InputError as error:
        print(f"graftax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if argv is None and stop.code == STOPPED:  # all is saved; XLA, left in the middle of something, may crash now
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED)
        raise
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
