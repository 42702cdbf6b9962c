"""The adapter_config.json of a method: HF PEFT's names for what it trains and how."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from ... import InputError
from ...model import Config, shapes_of
from ...model.hf.families import families
from ...model.hf.hub import split_revision
from ...model.tree import is_stacked, match_rules, name_and_layers
from ..base import Method
from ..masks import select
from ..methods.encoder import encode
from ..methods.lora import LoRA, LoRAFA
from ..methods.prefix import Prefix, PrefixMLP
from ..methods.prompt import Prompt, PTuning
from ..methods.subset import Subset
from .entries import is_main, kind_of, parts, shapes_like
from .names import Module, family_of, modules, spelled
from .types import Kind, kinds

_LINEAR = ("LOHA", "LOKR", "OFT", "BOFT", "HRA", "MISS", "SHIRA", "C3A", "ROAD")
_ONLY = {"LORA": "lora", "ADALORA": "lora", "FOURIERFT": "fourier"}  # bias: "<this>_only"; of others their own name


def plain(method: Method, trainable: Any, config: Config) -> tuple[Method, Any]:
    """A method as its file has it: what an MLP makes of a prompt or prefix, and the A that LoRA-FA draws."""
    if isinstance(method, LoRAFA):
        own = {f.name: getattr(method, f.name) for f in dataclasses.fields(LoRA)}  # type: ignore[arg-type]
        return LoRA(**own), method.drawn(shapes_like(config, trainable), trainable)
    if isinstance(method, PTuning):
        return Prompt(method.tokens), {"embed/table": {"prompt": encode(trainable["embed/table"], jax.nn.relu)}}
    if isinstance(method, PrefixMLP):
        past = method.context(trainable).past["layers"]["attn"]
        return Prefix(method.tokens), {f"layers/attn/{kv}": past[kv] for kv in "kv"}
    return method, trainable


def config_of(method: Method, trainable: Any, config: Config, base: str) -> dict[str, Any]:
    """The config that HF PEFT reads a method by. InputError: what it has no name for."""
    tree = _config(method, trainable, config, base)
    linear_only = tree["peft_type"] in _LINEAR or tree.get("init_lora_weights") == "olora"
    if linear_only and families[family_of(config)].conv1d:
        what = type(method).__name__
        raise InputError(f"{what}: HF PEFT does not take the Conv1D matrices of GPT-2 for it; merge it: --format hf")
    # Not every type knows every key, and peft warns of those it does not; null and none say nothing.
    said = {k: v for k, v in tree.items() if (v is not None and v != "none") or k in ("revision", "target_modules")}
    return {k: int(v) if isinstance(v, float) and v == int(v) else v for k, v in said.items()}


def _config(method: Method, trainable: Any, config: Config, base: str) -> dict[str, Any]:
    links, every = parts(method), modules(config)
    mains = [(branch, part) for branch, part in links if is_main(part)]
    names = sorted({kind_of(part) for _, part in mains}) or [_alone([part for _, part in links], config)]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)} at once: an HF PEFT folder holds one; save each link by itself")
    kind, name = kinds[names[0]], names[0]
    repo, revision = split_revision(base)
    tree = {**kind.defaults, "peft_type": name, "base_model_name_or_path": repo, "task_type": "CAUSAL_LM",
            "inference_mode": True, "revision": revision, "peft_version": "0.21.2"}  # fmt: skip
    if not mains:
        norms = [part for _, part in links if name != "LN_TUNING" or _of_norms(part, config)]
        rest = [part for _, part in links if part not in norms]
        return tree | _of_base(norms[0], config, every) | (_beside(rest, name, {}, every, config) if rest else {})
    if len(links) > 1 and name in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"):
        raise InputError(f"{name} beside another method: an HF PEFT folder holds one; save each link by itself")
    at = {(m.path, m.layer): module for module, m in every.items()}
    own: dict[str, dict[str, Any]] = {}
    for branch, part in mains:
        for place in _placed(trainable[branch] if branch else trainable, config):
            if place in at:
                own[at[place]] = _settings(kind, part, place, config)
    first = mains[0][1]
    if odd := next((part for _, part in mains if kind.write(part) != kind.write(first)), None):
        raise InputError(f"{type(first).__name__} and {type(odd).__name__} at once: an HF PEFT folder holds one; save "
                          "each link by itself")  # fmt: skip
    values = {theirs: getattr(first, ours) for theirs, ours in kind.fields.items()}
    # A method used outside a run may have no seed of its own; its numbers are those of seed 0.
    tree |= {k: 0 if v is None and kind.fields[k] == "seed" else v for k, v in values.items()} | kind.write(first)
    for field, theirs in ((ours, theirs) for theirs, ours in kind.fields.items() if own and ours in kind.patterns):
        values = [settings[field] for settings in own.values()]
        tree[theirs] = usual = max(values, key=values.count)
        tree[kind.patterns[field][0]] = {m: v for m, s in own.items() if (v := s[field]) != usual}
    tree |= _targets(name, first, own, config, mains, trainable)
    tree |= _beside([part for _, part in links if not is_main(part)], name, own, every, config)
    return tree


def _alone(links: list[Method], config: Config) -> str:
    """The type of a method that is no file's main one: norms, or rows of the table."""
    if len(links) == 1 and kind_of(links[0]) == "TRAINABLE_TOKENS":
        return "TRAINABLE_TOKENS"
    names = [type(part).__name__ for part in links]
    if sum(_of_norms(part, config) for part in links) == 1:
        return "LN_TUNING"
    raise InputError(f"{', '.join(names)}: HF PEFT has no file for it; merge it into the base: --format hf")


def _of_norms(part: Method, config: Config) -> bool:
    return isinstance(part, Subset) and all("norm/" in path for path in select(part.where, shapes_of(config)))


def _of_base(part: Method, config: Config, every: Mapping[str, Module]) -> dict[str, Any]:
    if not isinstance(part, Subset):
        return {"token_indices": list(part.ids), "target_modules": None}  # type: ignore[attr-defined]
    places = _picked(part, config)
    chosen = [m for m, at in every.items() if (at.path, at.layer) in places or (at.bias, at.layer) in places]
    lacking = [m for m in chosen for p in (every[m].path, every[m].bias) if p and (p, every[m].layer) not in places]
    if lacking:
        raise InputError(f"{lacking[0]}: LN_TUNING trains scale and bias of a norm together; take where='norms'")
    return {"target_modules": spelled(chosen, config)}


def _picked(part: Subset, config: Config) -> set[tuple[str, int | None]]:
    """(path, layer) of all that a Subset trains."""
    ranges = select(part.where, shapes_of(config))
    found: set[tuple[str, int | None]] = set()
    for path, layers in ranges.items():
        name, one = name_and_layers(path)
        if is_stacked(path):
            found |= {(name, i) for start, stop in layers for i in range(start, stop)}
        else:
            found.add((name, one[0] if one else None))
    return found


def _placed(tree: Any, config: Config) -> Iterable[tuple[str, int | None]]:
    for key in tree:
        path, layers = name_and_layers(key)
        for layer in layers or (range(config.L) if is_stacked(path) else [None]):
            yield path, layer


def _settings(kind: Kind, part: Any, place: tuple[str, int | None], config: Config) -> dict[str, Any]:
    """What one module has of the fields that modules may differ in."""
    found = {}
    for field in kind.patterns:
        rules = getattr(part, kind.varies.get(field, ""), ())
        rows = match_rules(rules, shapes_of(config), default=getattr(part, field)) if rules else {}
        row = rows.get(place[0], [getattr(part, field)])
        found[field] = row[(place[1] or 0) if len(row) > 1 else 0]
    return found


def _targets(
    name: str, first: Any, own: Mapping[str, Any], config: Config, mains: list[tuple[str, Method]], trainable: Any
) -> dict[str, Any]:
    """target_modules and what else a type says of where it is."""
    sizes = {"num_layers": config.L, "num_attention_heads": config.N, "token_dim": config.D,
             "num_transformer_submodules": 1}  # fmt: skip
    if name in ("PROMPT_TUNING", "P_TUNING"):
        hidden = {} if name == "PROMPT_TUNING" else {"encoder_hidden_size": first.hidden or config.D}
        return sizes | hidden
    if name == "PREFIX_TUNING":
        mlp = isinstance(first, PrefixMLP)
        hidden = (first.hidden or config.K * config.H) if mlp else None
        return sizes | {"num_attention_heads": config.K, "token_dim": config.K * config.H, "prefix_projection": mlp,
                        "encoder_hidden_size": hidden}  # fmt: skip
    if name == "ADAPTION_PROMPT":
        self_attention = "attn" if family_of(config) == "gpt2" else "self_attn"
        return {"target_modules": self_attention, "adapter_layers": min(first.layers, config.L)}
    if name == "IA3":
        inner = [m for m in own if _kept(m, trainable, mains, config)]
        ends, outer = spelled(inner, config), spelled([m for m in own if m not in inner], config)
        return {"target_modules": sorted({*ends, *outer}), "feedforward_modules": ends}
    tree: dict[str, Any] = {"target_modules": spelled(own, config)}
    if name == "BOFT" and len({part.block for _, part in mains}) > 1:  # type: ignore[attr-defined]
        number = next(iter(_leaves(m, trainable, mains, config)["r"].shape[-3] for m in own))
        tree |= {"boft_block_size": 0, "boft_block_num": number}
    if name == "ADALORA":
        tree |= {"total_step": int(first.tinit + first.tfinal) + 1} | _ranks(first, own, mains, trainable, config)
    return tree


def _leaves(module: str, trainable: Any, mains: list[tuple[str, Method]], config: Config) -> dict[str, Any]:
    """The arrays that a module has."""
    at = modules(config)[module]
    for branch, _ in mains:
        tree = trainable[branch] if branch else trainable
        for key, arrays in tree.items():
            path, layers = name_and_layers(key)
            if path == at.path and (layers is None or at.layer in layers):
                return arrays
    raise KeyError(module)


def _kept(module: str, trainable: Any, mains: Any, config: Config) -> bool:
    return "before" in _leaves(module, trainable, mains, config)


def _ranks(first: Any, own: Iterable[str], mains: Any, trainable: Any, config: Config) -> dict[str, Any]:
    """AdaLoRA's rank_pattern: which of the first ranks each module has kept, if any has lost one."""
    kept = {m: _leaves(m, trainable, mains, config)["a"].shape[-1] for m in own}
    if set(kept.values()) == {first.init_rank}:
        return {"rank_pattern": None}
    return {"rank_pattern": {f"{m}.lora_E": [i < n for i in range(first.init_rank)] for m, n in kept.items()}}


def _beside(
    links: list[Any], name: str, own: Mapping[str, Any], every: Mapping[str, Module], config: Config
) -> dict[str, Any]:
    """bias, modules_to_save and trainable_token_indices of what trains beside the method."""
    tree: dict[str, Any] = {}
    whole: list[str] = []
    for part in links:
        if kind_of(part) == "TRAINABLE_TOKENS":
            tree["trainable_token_indices"] = list(part.ids)
            continue
        if type(part).__name__ == "Head":
            whole.append("lm_head")
            continue
        if type(part).__name__ == "Lookup":
            whole.append(next(m for m, at in every.items() if at.path == "embed/table"))
            continue
        if not isinstance(part, Subset):
            raise InputError(f"{type(part).__name__} beside {name}: HF PEFT has no file for it; merge it: --format hf")
        places = _picked(part, config)
        whose = {"none": {}, "all": every, f"{_ONLY.get(name, name.lower())}_only": own}
        for scope, owners in whose.items():
            biases = {(every[m].bias, every[m].layer) for m in owners if every[m].bias}
            rest = places - biases
            chosen = [m for m, at in every.items() if (at.path, at.layer) in rest]
            covered = {(p, every[m].layer) for m in chosen for p in (every[m].path, every[m].bias) if p}
            if biases <= places and rest <= covered <= places:
                tree |= {"bias": scope}
                whole += sorted(chosen)  # whole paths: peft takes every module whose path ends so, from a dot on or not
                break
        else:
            odd = sorted(places, key=str)[0][0]
            raise InputError(
                f"{odd} beside {name}: HF PEFT saves whole modules, or all biases, or those of its targets"
            )
    return tree | ({"modules_to_save": whole} if whole else {})
