"""`--json`, which every command takes: where it is the switch, and where it is the value of another flag."""

import dataclasses
import re
from typing import Any

from .. import peft
from ..model import Config
from .config import Data, Optim, Run


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
    return name in switches | {"resume", "search", "model", "help"}
