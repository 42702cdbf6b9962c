"""HF PEFT to graftax: a method from an adapter_config.json, and its trainable tree from a folder."""

import contextlib
import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...model import Config
from ...model.hf.files import read_header, read_json
from ...model.pattern import Pattern
from ..base import Method, chain
from ..hf_spec import AdapterConfig, HFModel, Key, Module, Picked, Tensors
from ..methods import by_name
from .fixed import read_fixed
from .names import hf_model, saved_modules, target_modules
from .tensors import entries, fill, links, to_hf

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Keys of all types that change nothing that is computed here.
NEUTRAL = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
           "inference_mode", "fan_in_fan_out", "init_weights", "runtime_config"}  # fmt: skip

TYPES: dict[str, list[type[Method]]] = {}  # peft_type -> its classes, the plain one before others without flags
for _cls in by_name.values():
    if _cls.hf.type:
        TYPES.setdefault(_cls.hf.type, []).append(_cls)
# Subclasses share the spec of Subset, which stands last: whole tables first, then what is left.
COMPANIONS = [*dict.fromkeys(cls.hf.companion for cls in reversed(by_name.values()) if cls.hf.companion)][::-1]


def method_from_config(adapter_config: Mapping[str, Any], config: Config) -> Method:
    """Return the method of an HF adapter_config.json; keys that it leaves out have HF PEFT's defaults.

    Raises InputError for an unknown type, key or target. Fixed arrays that a file would hold (VeRA's projections,
    SHiRA's places) are drawn from a seed here; `load` takes those of the file.
    """
    with _errors_of(CONFIG):
        return _build(with_defaults(adapter_config), hf_model(config))


def load(folder: str | Path, config: Config, params: Any) -> tuple[Method, Any]:
    """Return (method, trainable) of an HF PEFT folder, for a base with stacked or unrolled layers.

    A P-tuning or prefix file holds what the MLP has computed, so that the method is a plain Prompt or Prefix. Raises
    InputError for a pickle, for missing, unexpected or mis-shaped tensors, and for a config that is not understood.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: has no {CONFIG}; give the folder that save_pretrained wrote")
    c = read_json(folder / CONFIG)
    with _errors_of(folder / CONFIG):
        c, model = with_defaults(c), hf_model(config)
        spec = _class_of(c).hf
    tensors = read_tensors(folder, spec.fixed.integers if spec.fixed else ())
    with _errors_of(folder / CONFIG):
        c = with_defaults(spec.stored_config(c, tensors))
        method = _build(c, model)
    shapes = jax.eval_shape(method.init, jax.random.key(0), params)
    with _errors_of(folder / FILE):
        for link in links(method, shapes):
            tensors = link.method.hf.split(tensors, link.trainable)
        found = entries(method, shapes, model)
        method = read_fixed(method, shapes, c, found, params, tensors)
        _compare(tensors, {entry.name: tuple(to_hf(entry, shapes).shape) for entry in found})
    return method, fill(shapes, found, tensors)


def read_tensors(folder: Path, integers: tuple[str, ...] = ()) -> Tensors:
    """Return {name: array} of an adapter's safetensors. Names that end as one of `integers` may be whole numbers.

    Raises InputError for a pickle, for other dtypes, and for NaN or infinity.
    """
    file = folder / FILE
    if not file.is_file():
        pickles = [path.name for path in folder.glob("*.bin")]
        why = f"; {pickles[0]} is a pickle, which can run code: save it with safe_serialization=True" if pickles else ""
        raise InputError(f"{folder}: has no {FILE}{why}")
    read_header(file)
    from safetensors.flax import load_file

    tensors = {name: np.asarray(x) for name, x in load_file(file).items()}
    for name, x in tensors.items():
        if not jnp.issubdtype(x.dtype, jnp.floating) and not (integers and name.endswith(integers)):
            raise InputError(f"{file}: {name} is {x.dtype}; floats are wanted, save the adapter in float32")
        if not np.isfinite(x).all():
            raise InputError(f"{file}: {name} holds NaN or infinity: its training failed; take an earlier one")
    return tensors


def with_defaults(c: Mapping[str, Any]) -> AdapterConfig:
    """Return the keys of a config that are understood, with HF PEFT's defaults.

    Raises InputError for an unknown type, for an unknown key with a value, for a value of the wrong kind, and for a
    pattern that is no regular expression.
    """
    name = str(c.get("peft_type") or "").rsplit(".", 1)[-1]
    if name not in TYPES:
        raise InputError(f"peft_type {c.get('peft_type')!r} is not known here; known: {', '.join(sorted(TYPES))}")
    spec = TYPES[name][0].hf
    for key, value in c.items():
        if key not in spec.all_keys and key not in NEUTRAL and key not in spec.neutral and value and value != "none":
            raise InputError(f"{key} = {value!r} is not understood, and may change what the adapter computes")
    values = {"peft_type": name} | {key: x.default for key, x in spec.all_keys.items()}
    for key, x in spec.all_keys.items():
        if (value := c.get(key)) is None or x.kind is None:
            continue
        if not x.kind.accepts(value):
            raise InputError(f"{key} is {reprlib.repr(value)}; {x.kind.expected} is wanted")
        for text in ([value] if isinstance(value, str) else value) if x.kind.patterns else ():
            Pattern(text, key)
        values[key] = x.kind.normalize(value)
    return values


def _class_of(c: AdapterConfig) -> type[Method]:
    """Return the class that a config means: the one whose flags it has, or the type's plain one."""
    classes = TYPES[c["peft_type"]]
    flagged = [cls for cls in classes if cls.hf.flags and all(c[key] == x for key, x in cls.hf.flags.items())]
    flagged = [cls for cls in flagged if not any(_includes(other, cls) for other in flagged if other is not cls)]
    if len(flagged) > 1:
        raise InputError(f"{' with '.join(cls.__name__ for cls in flagged)} in one adapter is not known here")
    return flagged[0] if flagged else next(cls for cls in classes if not cls.hf.flags)


def _includes(cls: type[Method], other: type[Method]) -> bool:
    """Return whether a class understands the flags of another."""
    return set(other.hf.flags) <= set(cls.hf.other_flags)


def _class_for(cls: type[Method], module: Module) -> type[Method]:
    """Return the class for one module: `cls`, or another of its type that acts on modules of this kind."""
    if module.kind in cls.hf.kinds:
        return cls
    for other in TYPES[cls.hf.type]:
        if module.kind in other.hf.kinds and _includes(other, cls):
            return other
    name = cls.__name__ if cls.hf.flags else cls.hf.type
    phrase = "which is the token table of this base" if module.kind == "tied head" else f"a {module.kind}"
    raise InputError(f"{name} of {module.name}, {phrase}, is not known here; leave {module.name} out")


def _build(c: AdapterConfig, model: HFModel) -> Method:
    """Return the method of a config with defaults; a chain if modules, biases or tokens train beside it."""
    cls = _class_of(c)
    if not cls.hf.kinds:
        return cls(**_fields(cls, c, None, model))
    targets, bias = target_modules(c, model, cls.hf.default_targets), c.get("bias", "none")
    biased = [] if bias == "none" else list(model.modules.values()) if bias == "all" else targets
    picked = Picked(targets, saved_modules(c, model), biased)
    methods: dict[bool, list[Method]] = {False: [], True: []}  # whether it is bound after the main one
    for companion in COMPANIONS:
        if (method := companion.read(c, picked, model)) is not None:
            methods[companion.last].append(method)
    every = [*methods[False], *_main_methods(cls, c, targets, model), *methods[True]]
    return every[0] if len(every) == 1 else chain(*every)


def _fields(cls: type[Method], c: AdapterConfig, module: Module | None, model: HFModel) -> dict[str, Any]:
    """Return the fields of a method for one module, or for none before the text."""
    values = {}
    for key, x in cls.hf.all_keys.items():
        if x.field:
            values[x.field] = x.find(c[x.exceptions], module.name, c[key]) if module and x.exceptions else c[key]
    return values | cls.hf.read(c, values, module, model)


def _main_methods(cls: type[Method], c: AdapterConfig, targets: list[Module], model: HFModel) -> Iterator[Method]:
    """Yield a method for each set of modules with the same settings; fields that have rules may differ in a set."""
    groups: dict[tuple[Any, ...], dict[Module, dict[str, Any]]] = {}
    for module in targets:
        own_cls = _class_for(cls, module)
        fields = _fields(own_cls, c, module, model)
        ruled = {x.field for x in _ruled(own_cls).values()}
        same = tuple((field, value) for field, value in fields.items() if field not in ruled)
        groups.setdefault((own_cls, same), {})[module] = fields
    for (own_cls, same), members in groups.items():
        args = dict(same) | own_cls.hf.where(c, list(members), model)
        for key, x in _ruled(own_cls).items():
            values = {(module.path, module.layer): fields[x.field] for module, fields in members.items()}
            usual = c[key] if x.fixed_default else max(values.values(), key=list(values.values()).count)
            others = {place: value for place, value in values.items() if value != usual}
            args |= {x.field: usual, x.rules: model.rules(others)}
        yield own_cls(**args)


def _ruled(cls: type[Method]) -> dict[str, Key]:
    """Return the keys in which the modules of one method may differ."""
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {key: x for key, x in cls.hf.all_keys.items() if x.rules in fields}


def _compare(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError that lists the tensors that are missing, unexpected, or of another shape."""
    wrong_shape = [f"{name} {list(tensors[name].shape)} (wanted {list(shape)})" for name, shape in expected.items()
                   if name in tensors and tensors[name].shape != shape]  # fmt: skip
    lists = {"missing": sorted(set(expected) - set(tensors)), "unexpected": sorted(set(tensors) - set(expected)),
             "of another shape": wrong_shape}  # fmt: skip
    parts = [f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
             for what, names in lists.items() if names]  # fmt: skip
    if parts:
        raise InputError(f"{'; '.join(parts)}. Is this the adapter of another base, or were names changed? Those that "
                         "save_pretrained writes are wanted")  # fmt: skip


@contextlib.contextmanager
def _errors_of(file: str | Path) -> Iterator[None]:
    """Prefix the errors of a block with the file that they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
