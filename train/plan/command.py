"""`graftax plan`: memory by kind, FLOPs, traffic, time of a run before it runs, and whether it fits."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import jax
import tyro

from ... import InputError
from ...bounds import Checked
from ...peft import Subset
from ..config import Run, did_you_mean, from_json, method_class
from ..flags import RUN_FLAGS, parse, run_and_flags
from ..progress import console
from ..recipes import recipes
from . import report
from .planner import make_plan
from .search import search
from .topology import Target, parse_topology

COMMON_METHODS = ("pretrain", "full", "lntuning", "houlsby", "lora", "qlora", "dora", "ia3", "prefix", "prompt")


@dataclasses.dataclass(frozen=True)
class Plan(Checked):
    """What a run needs, before it runs. Takes the flags of graftax pretrain or finetune.

    Example: graftax plan sft --base llama-3.1-8b --method lora --data.T 4096 --data.batch 16 --topology v5e:4x4

    --base may be a preset's name, a Hugging Face folder or a run; only its config is read. No array is made. With a
    compiler for the target (devices of this machine; TPU slices by libtpu) the numbers are those of the compiled
    program, otherwise those of a model of it, and the plan says which. FLOPs count matrix products only, including
    recomputation. MFU counts 4 N per token and 2 per trained parameter, without recomputation. The expected time of a
    step is max(FLOPs / peak, bytes through memory / bandwidth) + bytes sent / link: collectives are not hidden.
    """

    config: Annotated[Run, tyro.conf.arg(name="")]  # the run to plan
    topology: str = ""  # the devices: v5e:4x4, v5p:2x2x2, gpu:h200x8, cpu:8; empty: those of this machine
    methods: str = ""  # print a table of several: A,B,... of methods and pretrain, full, qlora; or all
    search: bool = False  # try meshes, recomputation and batches; print the few fastest that fit
    compile: bool = True  # --no-compile (or --model): use the model even where there is a compiler

    @classmethod
    def from_flags(cls, args: Sequence[str]) -> Self:
        """Return the plan of `RECIPE --flag value ...`. Raises InputError for an unknown recipe or flag."""
        args = ["--no-compile" if arg == "--model" else arg for arg in args]
        if {"--help", "-h"} & set(args) and args[0].startswith("-"):
            args.insert(0, "sft")
        run, flags = run_and_flags(_phase(args), args)
        about = inspect.cleandoc(cls.__doc__ or "")
        return parse(cls, flags, "graftax plan RECIPE", default=cls(run), description=about, also=RUN_FLAGS)

    def run(self) -> dict[str, Any]:
        """Print the plan, or the table of several; return it as JSON.

        Raises InputError for a bad topology, for settings that the run would refuse, and if no searched plan fits.
        """
        if self.topology and not self.topology.startswith("gpu"):
            jax.config.update("jax_platforms", "cpu")  # only tracing happens here; do not let libtpu look for a TPU
        target = parse_topology(self.topology)
        if self.methods:
            names = COMMON_METHODS if self.methods == "all" else [name.strip() for name in self.methods.split(",")]
            plans = {name: make_plan(self._with_method(name), target, self.compile) for name in names}
            return report.print_table("method", plans, target)
        if self.search:
            return self._search(target)
        plan = make_plan(self.config, target, self.compile)
        report.print_plan(plan)
        return plan

    def _search(self, target: Target) -> dict[str, Any]:
        plans, tried = search(self.config, target, self.compile)
        if not plans:
            raise InputError(
                f"--search: none of {tried} variants of this run fits {target.name}; take more devices, a shorter "
                "--data.T, a method with fewer trainable parameters, or --quantize nf4"
            )
        console.print(f"{tried} variants tried; the fastest that fit:")
        return report.print_table("mesh · remat · batch", {report.format_variant(p): p for p in plans}, target)

    def _with_method(self, name: str) -> Run:
        """Return the run with another method: `pretrain`, `full`, `qlora`, or a method's name."""
        if name in ("pretrain", "full"):
            phase: Any = "pretrain" if name == "pretrain" else self.config.phase
            return dataclasses.replace(self.config, phase=phase, method=Subset("all"), quantize="")
        if name == "qlora":
            return dataclasses.replace(self.config, method=method_class("lora")(), quantize="nf4")
        return dataclasses.replace(self.config, method=method_class(name)())


def _phase(args: Sequence[str]) -> str:
    """Return the phase of the recipe or config.json in args[0]."""
    name = args[0] if args else ""
    if name.endswith(".json"):
        return from_json(Path(name)).phase
    if name not in recipes:
        hint = did_you_mean(name, recipes)
        raise InputError(f"graftax plan needs a recipe, not {name!r}{hint}; recipes: {', '.join(recipes)}")
    return recipes[name]().phase
