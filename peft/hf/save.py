"""graftax to HF PEFT: the adapter_config.json of a method, and a folder of it and the trainable tree."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ...model import Config, shapes_of
from ...model.hf.files import output_folder
from ...model.hf.hub import split_revision
from ...model.tree import match_rules
from ..base import Chain, Method
from ..hf_spec import AdapterConfig, HFModel, HFSpec, Module
from .fixed import write_fixed
from .load import CONFIG, FILE
from .names import hf_model
from .tensors import Link, entries, iter_places, links, to_hf

PEFT_VERSION = "0.21.2"  # of HF PEFT, whose defaults and names these are


def save(
    folder: str | Path, config: Config, method: Method, trainable: Any, base: str = "", params: Any = None
) -> None:
    """Write an adapter as PeftModel.save_pretrained does, into a new or empty folder.

    base: the name of the base model for the config; the revision of a hub id `owner/name@revision` gets its own key.
    params: the base, whose tables are copied beside an adapter of them, as HF PEFT does; without it those of the file
    that `load` read the method from. Raises InputError for a method that HF PEFT has no type for, and for tables that
    are in neither of the two (`dataclasses.replace` drops a file's); nothing is written then.
    """
    folder, model = output_folder(folder), hf_model(config)
    adapter_config = _config_of(method, trainable, model, base)
    tensors = named_tensors(config, method, trainable)
    method, trainable = to_exportable(method, trainable, config)
    shapes = _shapes(config, links(method, trainable))
    tensors |= write_fixed(method, trainable, entries(method, trainable, model), model, shapes, params)
    from safetensors.numpy import save as to_bytes  # its save_file makes files that only their owner can read

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}
    (folder / FILE).write_bytes(to_bytes(arrays, {"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n", "utf-8")


def type_of(method: Method) -> str:
    """Return HF PEFT's name for a method's type; empty if it has none."""
    return method.hf.type


def to_exportable(method: Method, trainable: Any, config: Config) -> tuple[Method, Any]:
    """Return (method, trainable) as a file has them: the rows that an MLP computes, the A that LoRA-FA draws."""
    every = links(method, trainable)
    shapes = _shapes(config, every)
    pairs = {link.branch: link.method.hf.to_exportable(link.method, link.trainable, shapes) for link in every}
    if all(pairs[link.branch][0] is link.method for link in every):
        return method, trainable
    if not isinstance(method, Chain):
        return pairs[""]
    return Chain(tuple((name, m) for name, (m, _) in pairs.items())), {name: t for name, (_, t) in pairs.items()}


def named_tensors(config: Config, method: Method, trainable: Any, gradient: bool = False) -> dict[str, np.ndarray]:
    """Return {name in an adapter file: fp32 array} of a trainable tree, or of the gradient by the file's arrays."""
    method, trainable = to_exportable(method, trainable, config)
    found = entries(method, trainable, hf_model(config))
    tensors = {entry.name: np.asarray(to_hf(entry, trainable, gradient), np.float32) for entry in found}
    for link in links(method, trainable):
        tensors = link.method.hf.join(tensors)
    return tensors


def _shapes(config: Config, every: list[Link]) -> Any:
    """Return the shapes of the base, with stacked or unrolled layers as the trainable trees have them."""
    unrolled = any(re.search(r"layers/\d", key) for link in every for key in link.trainable)
    return shapes_of(dataclasses.replace(config, scan=not unrolled))


def _config_of(method: Method, trainable: Any, model: HFModel, base: str) -> AdapterConfig:
    """Return the adapter_config.json of a method. Raises InputError for what HF PEFT cannot express."""
    every = links(method, trainable)
    mains, spec = _main(every, model)
    first, main_branches = mains[0].method, [link.branch for link in mains]
    if len(every) > 1 and not spec.kinds:
        raise InputError(f"{spec.type} beside another method: an HF PEFT folder holds one; save each link by itself")
    if model.conv1d and not spec.conv1d:
        raise InputError(f"{type(first).__name__}: HF PEFT does not take the Conv1D matrices of GPT-2 for it; merge "
                         "it: --format hf")  # fmt: skip
    arrays = {model.at[place]: arrays for link in mains for key, arrays in link.trainable.items()
              for _, place in iter_places(key, arrays) if place in model.at}  # fmt: skip
    repo, revision = split_revision(base)
    keys = {key: x.default for key, x in spec.all_keys.items()}
    keys |= {"peft_type": spec.type, "base_model_name_or_path": repo, "revision": revision, "task_type": "CAUSAL_LM",
             "inference_mode": True, "peft_version": PEFT_VERSION}  # fmt: skip
    fields = {key: getattr(first, x.field) for key, x in spec.all_keys.items() if x.field}
    keys |= {key: 0 if x is None else x for key, x in fields.items()}  # a method outside a run may have no seed: 0
    keys |= _class_keys(first) | _varying_keys(mains, spec, model)
    if spec.kinds:
        keys["target_modules"] = model.short_names(arrays)
    keys |= spec.write_modules(first, arrays, model)
    for link in [link for link in every if link.branch not in main_branches]:
        name, companion = type(link.method).__name__, link.method.hf.companion
        if companion is None:
            raise InputError(f"{name} beside {spec.type}: HF PEFT has no file for it; merge it: --format hf")
        own = companion.write(link.method, set(link.places), list(arrays), spec, model)
        own["modules_to_save"] = [*(keys.get("modules_to_save") or ()), *own.get("modules_to_save", ())] or None
        keys |= own
    # PEFT warns of keys that a type does not know; null and none are its defaults.
    kept = {
        key: x for key, x in keys.items() if (x is not None and x != "none") or key in ("revision", "target_modules")
    }
    return {key: int(x) if isinstance(x, float) and x == int(x) else x for key, x in kept.items()}


def _main(every: list[Link], model: HFModel) -> tuple[list[Link], HFSpec]:
    """Return the links that give a file its type, and their spec. Raises InputError if there is none, or two."""
    mains = [link for link in every if link.is_main]
    if not mains:
        alone = [(link, spec) for link in every if link.method.hf.companion
                 and (spec := link.method.hf.companion.alone(set(link.places), model))]  # fmt: skip
        if len(alone) != 1:
            names = ", ".join(type(link.method).__name__ for link in every)
            raise InputError(f"{names}: HF PEFT has no file for it; merge it into the base: --format hf")
        return [alone[0][0]], alone[0][1]
    first = mains[0].method
    if len(types := {link.method.hf.type for link in mains}) > 1:
        raise InputError(
            f"{' and '.join(sorted(types))} at once: an HF PEFT folder holds one; save each link by itself"
        )
    if odd := next((link.method for link in mains if _class_keys(link.method) != _class_keys(first)), None):
        raise InputError(f"{type(first).__name__} and {type(odd).__name__} at once: an HF PEFT folder holds one; save "
                         "each link by itself")  # fmt: skip
    return mains, first.hf


def _class_keys(method: Method) -> AdapterConfig:
    """Return the keys of a config that all methods of a file must share: those that say the class, and a few fields."""
    spec = method.hf
    flags = {key: spec.all_keys[key].default for key in (*spec.flags, *spec.other_flags)}
    return flags | dict(spec.flags) | spec.write(method)


def _varying_keys(mains: list[Link], spec: HFSpec, model: HFModel) -> AdapterConfig:
    """Return the keys in which modules differ: the most common value, and the exceptions by whole paths."""
    keys: AdapterConfig = {}
    for key, x in spec.all_keys.items():
        if not x.exceptions or x.fixed_default:
            continue
        values: dict[Module, Any] = {}
        for link in mains:
            default, rules = getattr(link.method, x.field), getattr(link.method, x.rules, ())
            rows = match_rules(rules, model.shapes, default=default) if rules else {}
            for path, layer in [place for place in link.places if place in model.at]:
                row = rows.get(path, [default])
                values[model.at[path, layer]] = row[layer or 0] if len(row) > 1 else row[0]
        if values:
            usual = max(values.values(), key=list(values.values()).count)
            keys |= {key: usual, x.exceptions: {m.name: value for m, value in values.items() if value != usual}}
    return keys
