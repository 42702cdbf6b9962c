"""A method from an HF PEFT config: modules with the same settings together, what trains beside them in a chain."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ... import InputError
from ...model import Config, shapes_of
from ...model.pattern import compile_pattern
from ...model.tree import did_you_mean, named
from ..base import Method, chain
from .names import Module, family_of, modules, resolve, rules_of, where_of
from .types import Kind, kinds

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "TRAINABLE_TOKENS")
_FEEDFORWARD = {"gpt2": ["mlp.c_proj"]}


def build(c: dict[str, Any], config: Config, where: str) -> Method:
    """The Method of a completed config; a chain where biases, whole modules or tokens train beside it."""
    kind = kinds[c["peft_type"]]
    if c["peft_type"] in PROMPTS:
        return _before_the_text(kind, c, config, where)
    picked = resolve(c, config, where)
    if c["peft_type"] == "LN_TUNING":
        if odd := [m for m, at in picked.items() if at.kind != "norm"]:
            raise InputError(f"{where}: LN_TUNING of {odd[0]}, which is no norm, is not known here; leave it out")
        mains: list[Method] = [_class("LNTuning")(where=where_of(_places(picked.values()), config.L))]
    else:
        _refuse(c, picked, config, where)
        mains = [_ia3(c, picked, config)] if c["peft_type"] == "IA3" else list(_groups(kind, c, picked, config, where))
    first, last = _beside(c, picked, config, where)
    every = [*first, *mains, *last]
    return every[0] if len(every) == 1 else chain(*every)


def _class(name: str) -> Any:
    from ..methods import by_name as methods

    return methods[name.lower()]


def _before_the_text(kind: Kind, c: dict[str, Any], config: Config, where: str) -> Method:
    fields = {ours: c[theirs] for theirs, ours in kind.fields.items()} | kind.read(c, "")
    if c["peft_type"] == "PROMPT_TUNING":
        fields["init_from"] = "vocab" if c["prompt_tuning_init"] == "SAMPLE_VOCAB" else "random"
    if c["peft_type"] == "ADAPTION_PROMPT":
        fields["after_output_proj"] = family_of(config) == "gpt2"
        if config.o_bias and not fields["after_output_proj"]:
            raise InputError(f"{where}: the output of attention has a bias in this base, which HF PEFT adds a second "
                             "time behind an adaption prompt; that is not here")  # fmt: skip
    if c["peft_type"] == "TRAINABLE_TOKENS":
        table = next(m for m, at in modules(config).items() if at.path == "embed/table")
        wanted = [c["target_modules"]] if isinstance(c["target_modules"], str) else c["target_modules"] or ()
        if not all(table == w or table.endswith(f".{w}") for w in wanted):
            raise InputError(f"{where}: target_modules {wanted}: trainable tokens are rows of {table} here")
    if c.get("encoder_reparameterization_type", "MLP") != "MLP":
        raise InputError(f"{where}: the LSTM encoder of P-tuning is not here; MLP is")
    return _class(fields.pop("class", kind.classes[0]))(**fields)


def _refuse(c: dict[str, Any], picked: Mapping[str, Module], config: Config, where: str) -> None:
    """InputError for targets that a method cannot act on."""
    tables = ("LORA", "HIRA")
    for module, at in picked.items():
        if at.kind == "norm" or (at.kind == "table" and (c["peft_type"] not in tables or at.path != "embed/table")):
            raise InputError(f"{where}: {c['peft_type']} of {module}, a {at.kind}, is not known here; leave it out")
        if _is_tied_head(at, config) and (c["peft_type"] != "LORA" or c["trainable_token_indices"]):
            what = "trainable tokens beside LORA" if c["peft_type"] == "LORA" else c["peft_type"]
            raise InputError(f"{where}: {what} of lm_head, which is the token table of this base, is not known here; "
                             "leave lm_head out")  # fmt: skip


def _places(found: Iterable[Module]) -> list[tuple[str, int | None]]:
    """(path, layer) of weights and biases of modules."""
    return [(path, at.layer) for at in found for path in (at.path, at.bias) if path]


def _groups(
    kind: Kind, c: dict[str, Any], picked: Mapping[str, Module], config: Config, where: str
) -> Iterator[Method]:
    """A method for each set of modules with the same settings; fields that have rules do not part them."""

    shapes = named(shapes_of(dataclasses.replace(config, scan=True)))

    def fields(module: str) -> dict[str, Any]:
        found = {ours: c[theirs] for theirs, ours in kind.fields.items()}
        found |= {f: find(c[key], module, found[f]) for f, (key, find) in kind.patterns.items()}
        if c.get("boft_block_num") and not c["boft_block_size"]:  # so many blocks, of what width that makes
            found["block"] = shapes[picked[module].path].shape[-2] // c["boft_block_num"]
        return found | kind.read(c, module)

    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    last = []
    for module in picked:
        own = fields(module)
        if _is_tied_head(picked[module], config):
            last.append(_tied_head(own, where))
            continue
        groups.setdefault(tuple((k, v) for k, v in own.items() if k not in kind.varies), {})[module] = own
    for same, members in groups.items():
        args, rules = dict(same), {}
        for field, ruled in kind.varies.items():
            values = [own[field] for own in members.values()]
            usual = max(values, key=values.count)
            args[field] = usual = c["init_r"] if field == "kept" else usual
            other = {(picked[m].path, picked[m].layer): own[field] for m, own in members.items() if own[field] != usual}
            rules[ruled] = tuple(rules_of(other, config.L))
        args.pop("kept", None)
        places = where_of([(picked[m].path, picked[m].layer) for m in members], config.L)
        yield _class(args.pop("class", kind.classes[0]))(where=places, **args, **rules)
    yield from last


def _is_tied_head(at: Module, config: Config) -> bool:
    """Whether a module is the output projection of a base that has the token table there."""
    return config.tied and at.path == "head/matrix"


def _tied_head(own: dict[str, Any], where: str) -> Method:
    """LoRA of the output projection of a tied base, with the fields of a LoRA."""
    name, fields = own["class"], {k: v for k, v in own.items() if k != "class"}
    if name not in ("LoRA", "RsLoRA"):
        raise InputError(f"{where}: {name} of lm_head, which is the token table of this base, is not known here, plain "
                         "LoRA is; leave lm_head out")  # fmt: skip
    return _class("LoRAHead")(**fields, rslora=name == "RsLoRA")


def _ia3(c: dict[str, Any], picked: Mapping[str, Module], config: Config) -> Method:
    inner = c["feedforward_modules"]
    if inner is None:
        inner = _FEEDFORWARD.get(family_of(config), ["down_proj"])
    whole = isinstance(inner, str)
    before = {
        m for m in picked if (compile_pattern(inner).fullmatch(m) if whole else any(m.endswith(f) for f in inner))
    }
    at = lambda names: where_of([(picked[m].path, picked[m].layer) for m in names], config.L)  # noqa: E731
    return _class("IA3")(where=at([m for m in picked if m not in before]), inner=at([m for m in picked if m in before]))


def _below(module: str, name: str) -> bool:
    """Whether modules_to_save means a module, or one that it is in: their ends count, from a dot on or not."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def _beside(
    c: dict[str, Any], picked: Mapping[str, Module], config: Config, where: str
) -> tuple[list[Method], list[Method]]:
    """What trains before and behind the method itself: biases, modules_to_save, trainable tokens."""
    every, first, last = modules(config), [], []
    bias = c.get("bias", "none")
    whose = {} if bias == "none" else every if bias == "all" else picked
    places = [(at.bias, at.layer) for at in whose.values() if at.bias]
    for name in c.get("modules_to_save") or []:
        found = {m: at for m, at in every.items() if _below(m, name)}
        if config.tied and found.pop("lm_head", None):
            first.append(_class("Head")())
        elif not found:
            raise InputError(f"{where}: modules_to_save {name!r} is no module of this base{did_you_mean(name, every)}")
        if config.tied and any(at.path == "embed/table" for at in found.values()):
            first.append(_class("Lookup")())  # HF PEFT trains a copy for the lookup alone
        else:
            places += _places(found.values())
    if places:  # one Subset: two could not both have an array
        order = [(path, at.layer) for at in every.values() for path in (at.path, at.bias)]
        first.append(_class("Subset")(where=where_of(sorted(set(places), key=order.index), config.L)))
    if ids := c.get("trainable_token_indices"):
        table = next(m for m, at in every.items() if at.path == "embed/table")
        if isinstance(ids, dict):
            if len(ids) != 1 or not (table == (name := next(iter(ids))) or table.endswith(f".{name}")):
                raise InputError(f"{where}: trainable_token_indices of {', '.join(ids)}: rows of {table} are, here")
            ids = next(iter(ids.values()))
        last.append(_class("Tokens")(ids=tuple(ids)))
    return first, last
