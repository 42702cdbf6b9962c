"""Which matrices an HF PEFT config means: module paths of transformers <-> parameters here, and back to a config."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ... import InputError
from ...model import Config, shapes_of
from ...model.hf.config import config_to_hf
from ...model.hf.families import families
from ...model.pattern import compile_pattern
from ...model.tree import did_you_mean, is_stacked, named, true_ranges

PREFIX = "base_model.model."
_QV, _C = ("q_proj", "v_proj"), ("c_attn",)
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
# What HF PEFT takes where target_modules is null; IA3, LN_TUNING and a few more have their own.
_DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {**dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV), "gpt2": _C},
    "IA3": {**dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
            **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj", "down_proj")),
            "gpt2": ("c_attn", "mlp.c_proj")},
    "LN_TUNING": {**dict.fromkeys(("llama", "mistral", "gemma"), _NORMS),
                  **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_NORMS),
                  **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)), "gpt2": ("ln_1", "ln_2", "ln_f")},
    "FOURIERFT": {"gpt2": ("mlp.c_proj",)},
    "C3A": {"gpt2": ("mlp.c_proj",)},
}  # fmt: skip


class Module(NamedTuple):
    """One module of a transformers model that has a weight."""

    path: str  # ours, without a layer: `layers/attn/q`
    layer: int | None
    kind: str  # matrix, table or norm
    bias: str  # the path of its bias, or empty


def family_of(config: Config) -> str:
    """The model_type of a config; of one that names no family, the first that expresses it."""
    return config.family or config_to_hf(config)["model_type"]


def modules(config: Config) -> dict[str, Module]:
    """{module path: Module} of the model that transformers makes of a config. InputError: matrices it has as one."""
    family, shapes = families[family_of(config)], named(shapes_of(dataclasses.replace(config, scan=True)))
    found: dict[str, Module] = {}
    for theirs, ours in family.names.items():
        if " " in ours:
            raise InputError(
                f"{family.architecture} makes {ours.replace(' ', ', ')} by one matrix, which is cut here: an adapter "
                "of it has no counterpart"
            )
        if ours not in shapes or not theirs.endswith(".weight"):
            continue
        ndim = len(shapes[ours].shape) - is_stacked(ours)
        kind = "table" if ours.startswith("embed/") else "matrix" if ndim == 2 else "norm"
        other = ours.removesuffix("scale") + "bias" if kind == "norm" else f"{ours}_bias"
        for layer in range(config.L) if is_stacked(ours) else [None]:
            name = theirs.removesuffix(".weight").format(layer)
            found[name] = Module(ours, layer, kind, other if other in shapes else "")
    if config.tied:
        found["lm_head"] = Module("head/matrix", None, "matrix", "")  # the transpose of the table, a module there
    return found


def resolve(c: Mapping[str, Any], config: Config, where: str) -> dict[str, Module]:
    """The modules that a config's target_modules, exclude_modules and layers_to_transform pick, as HF PEFT picks."""
    found, wanted, kind = modules(config), c.get("target_modules"), c["peft_type"]
    if wanted is None:
        family = family_of(config)
        wanted = {**_DEFAULTS[""], **_DEFAULTS.get(kind, {})}.get(family)
        if wanted is None:
            raise InputError(f"{where}: {kind} has no target_modules, and HF PEFT no default for {family}; name them")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        picked = [m for m, at in found.items() if at.kind == "matrix" and at.path != "head/matrix"]
    else:
        picked = [m for m in found if _matches(m, wanted) and _layer(m, wanted, c)]
    kept, left_out = _listed(c.get("modules_to_save")), _listed(c.get("exclude_modules"))
    if isinstance(c.get("exclude_modules"), str):
        picked = [m for m in picked if not compile_pattern(c["exclude_modules"]).fullmatch(m)]
    picked = [m for m in picked if not _matches(m, left_out)]
    picked = [m for m in picked if not any(compile_pattern(rf"(^|.*\.){k}($|\..*)").match(m) for k in kept)]
    if not picked:
        names = {m.split(".")[-1] for m in found}
        wanted = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
        raise InputError(f"{where}: target_modules {wanted} match no module of this base{did_you_mean(wanted, names)}")
    return {m: found[m] for m in picked}


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list | tuple | set) else []


def _matches(module: str, wanted: Any) -> bool:
    """HF PEFT's rule: a string is a pattern of the whole path, a list holds paths or their last parts."""
    if isinstance(wanted, str):
        return compile_pattern(wanted).fullmatch(module)
    return any(module == w or module.endswith(f".{w}") for w in wanted)


def _layer(module: str, wanted: Any, c: Mapping[str, Any]) -> bool:
    """Whether layers_to_transform lets a module through; a target that is a whole path always passes."""
    only = c.get("layers_to_transform")
    if only is None or only == [] or isinstance(wanted, str) or module in wanted:
        return True
    patterns = c.get("layers_pattern") or []
    for name in [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]:
        if at := compile_pattern(rf"(?:^|.*?\.){name}\.(\d+)\.").match(module):
            return int(at[1]) in ([only] if isinstance(only, int) else only)
    return False


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """rank_pattern, alpha_pattern: the value of the first key that is a pattern of the path's end, from a dot on."""
    return next((v for k, v in (patterns or {}).items() if compile_pattern(rf"(.*\.)?({k})$").match(module)), default)


def by_suffix(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """n_frequency_pattern, block_size_pattern: the same of paths longer than the key, or the path itself."""
    values = patterns or {}
    return next(
        (v for k, v in values.items() if compile_pattern(rf".*\.{k}$").match(module)), values.get(module, default)
    )


def rules_of(values: Mapping[tuple[str, int | None], Any], L: int) -> list[tuple[str, Any]]:
    """Rules over paths that give each (path, layer) its value; layers of one value together."""
    rows: dict[str, dict[int | None, Any]] = {}
    for (path, layer), value in values.items():
        rows.setdefault(path, {})[layer] = value
    found = []
    for path, row in rows.items():
        for value in dict.fromkeys(row.values()):
            for start, stop in [(0, L)] if None in row else true_ranges([row.get(i) == value for i in range(L)]):
                whole = None in row or (start, stop) == (0, L)
                found.append((path if whole else path.replace("layers/", f"layers/[{start}:{stop}]/"), value))
    return found


def where_of(places: Iterable[tuple[str, int | None]], L: int) -> str:
    """`where` for (path, layer) places: rules with commas between."""
    return ", ".join(rule for rule, _ in rules_of(dict.fromkeys(places, True), L))


def spelled(picked: Iterable[str], config: Config, keep: Callable[[Module], bool] = lambda m: True) -> list[str]:
    """target_modules for modules: the shortest ends of their paths that mean them and no other, or their paths."""
    picked, others = list(picked), [m for m, at in modules(config).items() if keep(at)]
    for parts in (1, 2):
        ends = sorted({".".join(m.split(".")[-parts:]) for m in picked})
        if [m for m in others if _matches(m, ends)] == [m for m in others if m in picked]:
            return ends
    return sorted(picked)
