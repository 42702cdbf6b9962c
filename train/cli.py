"""The command line: `graftax COMMAND ...`. People read stderr; `--json` prints one JSON object on stdout."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import InputError, __version__
from ..bounds import is_text
from ..model.pattern import pattern_source
from .cluster.distributed import STOPPED
from .cluster.launch import run_processes
from .config import MALLOC_ENV, Run, did_you_mean, from_json, method_class
from .flags import WORDS, parse, suggestion, take_json


def take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """(the value of `--flag value` or `--flag=value`, the other arguments)."""
    for i, arg in enumerate(args):
        if arg == flag:
            if i + 1 == len(args):
                raise InputError(f"{flag} wants a value")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1], args[:i] + args[i + 1 :]
    return None, args


def run_of(phase: str, args: list[str], also: Sequence[str] = ()) -> Run:
    """A Run from `RECIPE --method NAME --data FILE --any.field value`; RECIPE may be a run's config.json. `also`: the
    flags that the caller has taken out of `args`."""
    from .. import peft
    from .recipes import recipes

    mine = {name: make for name, make in recipes.items() if make().phase == phase}
    prog = f"graftax {phase} RECIPE"
    listed = "\n\n".join(f"{name}: {' '.join((make.__doc__ or '').split())}" for name, make in mine.items())
    about = (
        f"Example: graftax {phase} {next(iter(mine))} --optim.lr 3e-4\n\nRecipes (or a run's config.json)\n\n{listed}"
    )
    if phase == "finetune":
        about += "\n\nMethods: --method NAME, then --method.FIELD (masks: --method.where NAME or a rule)\n\n"
        about += "\n\n".join(f"{n}: {(c.__doc__ or '').splitlines()[0]}" for n, c in sorted(peft.methods.items()))
    name, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    if name.endswith(".json"):
        run = from_json(Path(name))
    elif name in mine:
        run = mine[name]()
    elif name:
        hint = f"; it is one of graftax {recipes[name]().phase}" if name in recipes else did_you_mean(name, mine)
        hint = f"; did you mean {phase} sft --method {name}?" if name in peft.methods else hint
        raise InputError(f"no {phase} recipe {name!r}{hint}; there are {', '.join(mine)}")
    else:
        run = next(iter(mine.values()))()
        if "--help" not in rest and "-h" not in rest:
            raise InputError(f"graftax {phase} wants a recipe: {', '.join(mine)}")
    method, rest = take(rest, "--method")
    if method is not None:
        run = dataclasses.replace(run, method=method_class(method)())
    for i, arg in enumerate(rest):
        if arg == "--resume" and (i + 1 == len(rest) or rest[i + 1].startswith("-")):
            rest[i] = "--resume=auto"
    rest = ["--data.task" if arg == "--data" else re.sub("^--data=", "--data.task=", arg) for arg in rest]
    return parse(Run, rest, prog, default=run, description=about, also=("--method", "--data", *also))


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
    from .plan.command import plan

    return plan(args)


def _experiment(name: str) -> Callable[[list[str]], Any]:
    return lambda args: getattr(importlib.import_module(f".experiments.{name}", __package__), name)(args)


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
        "many variations of a fine-tune at once: graftax sweep sft --base RUN --over optim.lr=1e-3,3e-3",
        _experiment("sweep"),
    ),
    "compare": (
        "methods on one ground, with what noise lets one say: graftax compare --base RUN --task T --methods lora,ia3",
        _experiment("compare"),
    ),
    "decide": (
        "the cheapest way to a target, all ways measured: graftax decide --base RUN --task T --target 'accuracy>=0.8'",
        _experiment("decide"),
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
