"""Dataclasses from flags by tyro, what a flag or command that does not exist may have meant, and `--json`."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import InputError, peft
from ..model import Config
from .config import Data, Optim, Run, did_you_mean, from_json, method_class
from .recipes import recipes

# Ours -> theirs (transformers, TRL, HF PEFT, torchtune, vLLM). Of several the first that a command has is named.
FOREIGN = {
    "--data.bad-rows": "bad",  # the names that graftax had before
    "--data.max-bad-rows": "bad-cap",
    "--eval-base-first": "score-base no-score-base",
    "--force": "accept",
    "--max-skipped": "max-bad",
    "--optim.lr": "learning-rate base-learning-rate",
    "--lr": "learning-rate",
    "--optim.warmup": "warmup-ratio warmup-steps num-warmup-steps",
    "--optim.schedule": "lr-scheduler lr-scheduler-type lr-schedule",
    "--optim.clip": "max-grad-norm gradient-clipping grad-clip clip-grad-norm",
    "--optim.b1": "adam-beta1 beta1",
    "--optim.b2": "adam-beta2 beta2",
    "--optim.eps": "adam-epsilon",
    "--optim.name": "optim optimizer",
    "--data.batch": "batch-size train-batch-size per-device-train-batch-size micro-batch-size global-batch-size bs",
    "--data.T": "max-seq-length max-seq-len max-length seq-len seq-length block-size cutoff-len context-length",
    "--data.tokenizer": "tokenizer-name tokenizer-path",
    "--data.held-out": "val-size validation-split eval-split",
    "--data FILE.jsonl": "dataset dataset-name train-file train-data data-path",
    "--steps": "max-steps num-steps train-steps",
    "--epochs": "num-train-epochs num-epochs",
    "--accumulate": "gradient-accumulation-steps grad-accum gradient-accumulation",
    "--out": "output-dir save-dir output output-path",
    "--base": "model-name-or-path model-name model model-id base-model pretrained pretrained-model-name-or-path",
    "--new": "max-new-tokens max-tokens max-length num-tokens",
    "--temperature": "do-sample",
    "--dtype bfloat16": "bf16 torch-dtype precision",
    "--dtype float16": "fp16",
    "--quantize nf4": "load-in-4bit qlora quantization quantization-config",
    "--quantize int8": "load-in-8bit",
    "--remat full": "gradient-checkpointing activation-checkpointing",
    "--log-every": "logging-steps log-steps log-interval",
    "--eval-every": "eval-steps eval-interval evaluation-strategy eval-strategy",
    "--save-every": "save-steps save-interval save-strategy",
    "--keep": "save-total-limit",
    "--resume": "resume-from-checkpoint resume-from",
    "--wandb": "report-to wandb-project",
    "--mesh": "tensor-parallel-size num-gpus gpus devices fsdp",
    "--shard-gb": "max-shard-size",
    "--method.rank": "lora-r lora-rank r lora-dim",
    "--method.alpha": "lora-alpha",
    "--method.dropout": "lora-dropout",
    "--method.where": "target-modules lora-target-modules target-module modules-to-save",
    "--method.tokens": "num-virtual-tokens prompt-length prefix-length",
    "--method lora": "use-lora use-peft peft peft-type peft-method adapter",
    "--method lora --method.rank": "lora-r lora-rank r rank",
    "--method lora --method.alpha": "lora-alpha alpha",
    "--method lora --method.dropout": "lora-dropout dropout",
    "--method lora --method.where": "target-modules lora-target-modules",
    "--method prompt --method.tokens": "num-virtual-tokens",
}
RUN_FLAGS = ("--method", "--data")  # flags that `run_and_flags` takes beside the fields of a run
WORDS = {  # commands, likewise
    "pretrain": "train from-scratch",
    "finetune": "train fine-tune tune sft lora peft dpo",
    "generate": "chat run sample infer inference predict complete",
    "eval": "evaluate test score benchmark",
    "merge": "fuse merge-and-unload",
    "import": "convert download load",
    "export": "convert save push quantize",
    "sweep": "grid search tune hpo",
    "lineage": "history provenance",
}


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


def run_and_flags(phase: str, args: list[str]) -> tuple[Run, list[str]]:
    """Return the run of `RECIPE --method NAME`, and the flags that are left, which change its fields.

    RECIPE may be a run's config.json. Raises InputError for an unknown recipe or method, and if there is no recipe.
    """
    mine = _phase_recipes(phase)
    name, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
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
        if "--help" not in flags and "-h" not in flags:
            raise InputError(f"graftax {phase} wants a recipe: {', '.join(mine)}")
    method, flags = take(flags, "--method")
    if method is not None:
        run = dataclasses.replace(run, method=method_class(method)())
    for i, arg in enumerate(flags):
        if arg == "--resume" and (i + 1 == len(flags) or flags[i + 1].startswith("-")):
            flags[i] = "--resume=auto"
    return run, ["--data.task" if arg == "--data" else re.sub("^--data=", "--data.task=", arg) for arg in flags]


def run_of(phase: str, args: list[str]) -> Run:
    """Return the run of `RECIPE --method NAME --data FILE --any.field value`; RECIPE may be a run's config.json."""
    mine = _phase_recipes(phase)
    listed = "\n\n".join(f"{name}: {' '.join((make.__doc__ or '').split())}" for name, make in mine.items())
    about = (
        f"Example: graftax {phase} {next(iter(mine))} --optim.lr 3e-4\n\nRecipes (or a run's config.json)\n\n{listed}"
    )
    if phase == "finetune":
        about += "\n\nMethods: --method NAME, then --method.FIELD (masks: --method.where NAME or a rule)\n\n"
        about += "\n\n".join(f"{n}: {(c.__doc__ or '').splitlines()[0]}" for n, c in sorted(peft.methods.items()))
    run, flags = run_and_flags(phase, args)
    return parse(Run, flags, f"graftax {phase} RECIPE", default=run, description=about, also=RUN_FLAGS)


def _phase_recipes(phase: str) -> dict[str, Callable[[], Run]]:
    return {name: make for name, make in recipes.items() if make().phase == phase}


def parse(
    cls: Any, args: list[str], prog: str, default: Any = None, description: str = "", also: Sequence[str] = ()
) -> Any:
    """cls from dotted flags by tyro. A flag that does not exist, or a bad value, is an InputError in one line; `also`
    are the flags that were taken out of `args` before."""
    import tyro

    shown = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(shown):
            made, unknown = tyro.cli(
                cls,
                args=args,
                prog=prog,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
                **kwargs,
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        if (reason := _cause(stop)) is not None:
            raise reason from None
        raise InputError(_one_line(shown.getvalue())) from None
    if unknown:
        if not unknown[0].startswith("-"):
            raise InputError(f"{prog}: unexpected argument {unknown[0]!r} (see {prog} --help)")
        flag, flags = unknown[0].split("=")[0], re.findall(r"--[\w.-]+", _help(cls, prog, kwargs))
        raise InputError(f"{prog}: unknown flag {flag}{nearest_flag(flag, [*flags, *also])} (see {prog} --help)")
    return made


def _help(cls: Any, prog: str, kwargs: Any) -> str:
    import tyro

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"], prog=prog, config=(tyro.conf.AvoidSubcommands,), **kwargs)
    return out.getvalue()


def _cause(error: BaseException | None) -> InputError | None:
    """The InputError of a dataclass that tyro was making when it stopped, if there is one."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def _one_line(box: str) -> str:
    """The words of tyro's error box."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"[│╭╮╰╯─┌┐└┘]+", " ", line).strip() for line in text.splitlines()]
    return re.sub(r"\s+", " ", "; ".join(line for line in lines if line)) or "bad command line"


def suggestion(word: str, theirs: Mapping[str, str], ours: Iterable[str]) -> list[str]:
    """What another library's word is here, as far as it is one of `ours`."""
    known, word = set(ours), plain(word)
    return [text for text, words in theirs.items() if word in words.split() and text.split()[0] in known]


def nearest_flag(flag: str, flags: Iterable[str]) -> str:
    """`; did you mean --optim.lr?` for `--lr` or `--learning-rate`, or nothing.

    First the same name with another prefix, then the word of another library, then what is spelt like it.
    """
    names, tail = list(dict.fromkeys(flags)), plain(flag)
    found = [name for name in names if plain(name) == tail] or suggestion(tail, FOREIGN, names)[:1]
    if not found:
        found = difflib.get_close_matches(flag, names, 1, 0.75)
    if not found:
        near = difflib.get_close_matches(tail, list(map(plain, names)), 1, 0.7)
        found = [name for name in names if plain(name) in near]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def plain(flag: str) -> str:
    """`--optim.Weight_Decay` as `weight-decay`: no prefix, no case."""
    return re.sub(r"^--?|.*\.", "", flag).lower().replace("_", "-")


def take_json(args: list[str]) -> tuple[bool, list[str]]:
    """(whether `--json` is there, the other arguments). Behind a flag that takes a value it is that value."""
    asked, rest = False, []
    for arg in args:
        if arg != "--json":
            rest.append(arg)
        elif rest and re.fullmatch("--[^=]+", rest[-1]) and not _stands_alone(rest[-1]):
            rest[-1] += "=--json"
        else:
            asked = True
    return asked, rest


def _stands_alone(flag: str) -> bool:
    """Whether a flag takes no value: a field that is true or false, or one of a few that are no field."""
    from . import commands  # seconds to import

    owners: Any = (Run, Data, Optim, Config, commands.Eval, commands.Generate, *peft.methods.values())
    switches = {field.name for owner in owners for field in dataclasses.fields(owner) if field.type in (bool, "bool")}
    name = flag[2:].rpartition(".")[2].replace("-", "_").removeprefix("no_")
    return name in switches | {"resume", "search", "compile", "model", "help"}
