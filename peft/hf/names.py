"""Names of modules in transformers: the model of a config, and the modules that an adapter_config.json picks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ... import InputError
from ...model import Config, shapes_of
from ...model.hf.config import config_to_hf
from ...model.hf.families import families
from ...model.pattern import compile_pattern
from ...model.tree import did_you_mean, is_stacked, named
from ..hf_spec import AdapterConfig, HFModel, Module, ends_with

# What HF PEFT targets by default, for types that do not declare their own.
DEFAULT_TARGETS = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj")),
    "gpt2": ("c_attn",),
}


def family_of(config: Config) -> str:
    """Return the model_type of a config; without one, that of the first family that expresses it."""
    return config.family or config_to_hf(config)["model_type"]


def hf_model(config: Config) -> HFModel:
    """Return the model that transformers makes of a config.

    Raises InputError for a family with one matrix where graftax has several: no adapter of it has a counterpart.
    """
    family, params = families[family_of(config)], shapes_of(dataclasses.replace(config, scan=True))
    shapes, modules = named(params), {}
    for tensor, path in family.names.items():
        if " " in path:
            raise InputError(f"{family.architecture} computes {path.replace(' ', ', ')} by one matrix, which graftax "
                             "splits: an adapter of it has no counterpart")  # fmt: skip
        if path not in shapes or not tensor.endswith(".weight"):
            continue
        shape = shapes[path].shape[is_stacked(path) :]
        kind = "matrix" if len(shape) == 2 else "norm"
        if path.startswith("embed/"):
            kind = "table" if path == "embed/table" else "position table"
        bias = path.removesuffix("scale") + "bias" if kind == "norm" else f"{path}_bias"
        for layer in range(config.L) if is_stacked(path) else [None]:
            name = tensor.removesuffix(".weight").format(layer)
            modules[name] = Module(name, path, layer, kind, bias if bias in shapes else "", shape)
    if config.tied:  # a module there, whose weight is that of the table
        modules["lm_head"] = Module("lm_head", "head/matrix", None, "tied head", "", shapes["embed/table"].shape[::-1])
    return HFModel(config, family_of(config), family.conv1d, modules, params)


def target_modules(c: AdapterConfig, model: HFModel, defaults: Mapping[str, Any]) -> list[Module]:
    """Return the modules that a config picks, by HF PEFT's rules; `defaults`: of the type, where it names none.

    Raises InputError if there is none.
    """
    targets = c["target_modules"]
    if targets is None:
        targets = {**DEFAULT_TARGETS, **defaults}.get(model.family)
    if targets is None:
        raise InputError(f"{c['peft_type']} has no target_modules, and HF PEFT no default for {model.family}; name "
                         "them")  # fmt: skip
    if isinstance(targets, str) and targets.lower() == "all-linear":
        picked = [m for m in model.modules.values() if m.kind == "matrix" and m.path != "head/matrix"]
    else:
        picked = [m for m in model.modules.values() if _matches(m.name, targets) and _in_layers(m.name, targets, c)]
    saved = [compile_pattern(rf"(^|.*\.){name}($|\..*)") for name in c["modules_to_save"] or ()]
    excluded = c["exclude_modules"] or ()
    picked = [m for m in picked if not _matches(m.name, excluded) and not any(p.match(m.name) for p in saved)]
    if not picked:
        ends = {name.split(".")[-1] for name in model.modules}
        targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise InputError(f"target_modules {targets} match no module of this base{did_you_mean(targets, ends)}")
    return picked


def saved_modules(c: AdapterConfig, model: HFModel) -> list[Module]:
    """Return the modules, and those inside of them, that modules_to_save names by the ends of their paths.

    Raises InputError for a name that no module has.
    """
    saved: dict[Module, None] = {}
    for name in c.get("modules_to_save") or ():
        inside = [m for m in model.modules.values() if _is_inside(m.name, name)]
        if not inside:
            raise InputError(f"modules_to_save {name!r} is no module of this base{did_you_mean(name, model.modules)}")
        saved |= dict.fromkeys(inside)
    return list(saved)


def _is_inside(module: str, name: str) -> bool:
    """Return whether the path of a module, or of one that holds it, ends with a name, from a dot on or not."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def _matches(module: str, names: Any) -> bool:
    """Return whether a pattern matches the whole path of a module, or a list holds the path or its end."""
    return compile_pattern(names).fullmatch(module) if isinstance(names, str) else ends_with(module, names)


def _in_layers(module: str, targets: Any, c: AdapterConfig) -> bool:
    """Return whether layers_to_transform lets a module through; it does not restrict whole paths or a pattern."""
    only = c["layers_to_transform"]
    if only is None or only == [] or isinstance(targets, str) or module in targets:
        return True
    names = c["layers_pattern"] or [r"[^.]*"]
    for name in [names] if isinstance(names, str) else names:
        if match := compile_pattern(rf"(?:^|.*?\.){name}\.(\d+)\.").match(module):
            return int(match[1]) in ([only] if isinstance(only, int) else only)
    return False
