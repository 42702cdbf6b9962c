"""A Hugging Face `config.json` <-> Config. No key that may change a logit is passed over."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ... import InputError
from ..config import Config
from .families import NEUTRAL, OFF, ONLY, Family, families
from .rope import ROPE_KEYS, ropes_from_hf, ropes_to_hf

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip


def config_from_hf(tree: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a config.json. InputError for an unknown architecture, a missing size, a key not understood."""
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        hint = " (a model of text and images: give its text part)" if "text_config" in tree else ""
        raise InputError(f"{where}: model_type {kind!r} is not known{hint}; families: {', '.join(families)}")
    given = {k: v for k, v in tree.items() if not k.startswith("_")}
    try:
        _check_kinds(given, where)
        _refuse(families[kind], given, where)
        return _config(kind, families[kind], {**families[kind].defaults, **given}, where)
    except (TypeError, ValueError, KeyError, ArithmeticError, StopIteration) as error:
        if isinstance(error, InputError):
            raise error if where in str(error) else InputError(f"{where}: {error}") from None
        raise InputError(f"{where}: a value is of a wrong kind ({type(error).__name__}: {error})") from None


def _config(kind: str, family: Family, full: Mapping[str, Any], where: str) -> Config:
    fields: dict[str, Any] = {**family.fixed, "family": kind}
    for theirs, ours in family.keys.items():
        if full.get(theirs) is not None:
            fields |= dict.fromkeys(ours.split(), _decode(kind, ours, full[theirs], f"{where}: {theirs}"))
        elif theirs in full and theirs not in _NULL:
            raise InputError(f"{where}: {theirs} is null")
    _derive(family, full, fields, where)
    fields["windows"] = _windows(family, full, fields["L"], where)
    if "rope" not in family.fixed:
        fields |= ropes_from_hf(kind, full, fields, where)
    dtype = str(full.get("dtype") or full.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{where}: dtype {dtype!r}; float32, bfloat16 or float16 is wanted")
    return Config(**fields, param_dtype=dtype, dtype=dtype)


_NULL = ("head_dim", "num_key_value_heads", "n_inner", "attn_logit_softcapping", "final_logit_softcapping")
_KINDS = {  # of keys that are no field by themselves
    dict: ("rope_scaling", "rope_parameters"), list: ("layer_types",), bool: ("use_sliding_window",),
    int: ("sliding_window", "sliding_window_size", "sliding_window_pattern", "max_window_layers",
          "original_max_position_embeddings"),
    float: ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
}  # fmt: skip


def _check_kinds(given: Mapping[str, Any], where: str) -> None:
    for kind, keys in _KINDS.items():
        for key in keys:
            value = given.get(key)
            if value is not None and not _is(kind, value):
                raise InputError(f"{where}: {key} is {value!r:.60}; wanted: {kind.__name__}")
    sizes = [given.get(k) for k in ("sliding_window", "sliding_window_size") if given.get(k) is not None]
    if len(set(sizes)) > 1:
        raise InputError(f"{where}: sliding_window and sliding_window_size differ: {sizes}")


def _is(kind: type, value: Any) -> bool:
    """Whether a value of JSON is a finite one of a kind; numbers are not negative."""
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12
        return number and (kind is float or value == int(value))
    return isinstance(value, kind)


def _refuse(family: Family, given: Mapping[str, Any], where: str) -> None:
    """InputError that lists every key that is not understood."""
    rope = () if "rope" in family.fixed else ROPE_KEYS
    known = {*family.keys, *family.defaults, *family.must, *family.neutral, *rope, *ONLY, "layer_types"}
    only = {**ONLY, **family.must}
    bad = [f"{k} = {given[k]!r} (only {v!r} is)" for k, v in only.items() if given.get(k, v) != v]
    bad += [f"{k} = {given[k]!r}" for k in OFF if given.get(k) and k not in known]
    unknown = [k for k in given if k not in known and k not in NEUTRAL.split() and k not in OFF]
    # A key that is null or empty changes nothing, whatever it is for.
    bad += [f"{k} = {given[k]!r:.60}" for k in unknown if given[k] not in (None, [], {}, "")]
    if bad:
        raise InputError(f"{where}: not understood, and it may change what the model computes: {'; '.join(bad)}")


def _decode(kind: str, ours: str, value: Any, where: str) -> Any:
    """A value of config.json as one of Config."""
    if ours == "activation":
        value = "gelu_pytorch_tanh" if kind == "gemma" and value == "gelu" else value  # its first release meant tanh
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise InputError(f"{where}: activation {value!r} is not known; one of {', '.join(_ACTIVATIONS)} is wanted")
        return _ACTIVATIONS[value]
    size = ours in (*"VDLNKHF", "context")
    wanted = bool if ours.split()[0].endswith("bias") or ours == "tied" else int if size else float
    least, most = (1, 10_000 if ours == "L" else 1 << 40) if size else (1e-9 if ours == "query_scale" else 0, 1e12)
    if not _is(wanted, value) or (wanted is not bool and not least <= value <= most):
        raise InputError(f"{where}: {value!r}; wanted: {wanted.__name__}{f' of {least} or more' if size else ''}")
    return float(value) ** -0.5 if ours == "query_scale" else wanted(value)


def _derive(family: Family, full: Mapping[str, Any], fields: dict[str, Any], where: str) -> None:
    """What follows from other fields: K, H and F where they are left out, the scale of Gemma's embeddings."""
    back = {ours: theirs for theirs, ours in family.keys.items()}
    if missing := [back[f] for f in "VDLN" if f not in fields]:
        raise InputError(f"{where}: has no {', '.join(missing)}")
    fields.setdefault("K", fields["N"])
    if "H" not in fields and fields["D"] % fields["N"]:
        raise InputError(f"{where}: {back['D']} {fields['D']} does not divide into {fields['N']} heads")
    fields.setdefault("H", fields["D"] // fields["N"])
    if "F" not in fields:
        if "n_inner" not in full:
            raise InputError(f"{where}: has no {back['F']}")
        fields["F"] = 4 * fields["D"]
    if full.get("hidden_activation") and "hidden_act" in family.keys:  # Gemma 1: transformers 4 took this, 5 the other
        other = _decode("gemma", "activation", full["hidden_activation"], f"{where}: hidden_activation")
        if other != fields["activation"]:
            raise InputError(f"{where}: hidden_act and hidden_activation differ; keep one of them")
    if family.scaled:
        fields["embed_scale"] = fields["D"] ** 0.5


def _windows(family: Family, full: Mapping[str, Any], L: int, where: str) -> tuple[int, ...]:
    """The windows of the layers, as the shortest list that repeats to them; () for none."""
    window, types = full.get("sliding_window") or 0, full.get("layer_types")
    window = int(window) if full.get("use_sliding_window", True) else 0
    row = [window if family.window and family.window(i, full) else 0 for i in range(L)]
    if types is not None:
        known = {"full_attention": 0, "sliding_attention": window}
        if len(types) != L or not all(isinstance(t, str) and t in known for t in types):
            raise InputError(f"{where}: layer_types {types!r:.80}; {L} of {', '.join(known)} are wanted")
        if "sliding_attention" in types and not window:
            raise InputError(f"{where}: layer_types has sliding_attention, but there is no sliding_window")
        said = [known[t] for t in types]
        if said != row and not family.mixed:
            raise InputError(f"{where}: layer_types differs from what this family does, and nothing reads it; drop it")
        row = said
    size = next(n for n in range(1, L + 1) if all(row[i] == row[i % n] for i in range(L)))
    return tuple(row[:size]) if any(row) else ()


def config_to_hf(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a Config, in the spelling of the hub; InputError where no family, or not its own, has it."""
    if config.family and config.family not in families:
        raise InputError(f"family {config.family!r} is not known; families: {', '.join(families)}")
    why = ""
    for kind in [config.family] if config.family else families:
        tree = _tree(kind, config, dtype)
        try:
            differ = _differ(config_from_hf(tree), config)
        except InputError as error:
            differ = [str(error)]
        if not differ:
            return tree
        why = why or f"{kind} cannot say {', '.join(differ)}"
    raise InputError(f"no Hugging Face family computes what this config does ({why})")


def _tree(kind: str, config: Config, dtype: str) -> dict[str, Any]:
    family = families[kind]
    tree: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind, "torch_dtype": dtype}
    tree |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the defaults of a class may lie outside V
    for theirs, ours in family.keys.items():
        value = getattr(config, ours.split()[0])
        if ours == "activation":
            value = next(k for k, v in _ACTIVATIONS.items() if v == value)
        elif ours == "query_scale":
            scalar = (value or config.H**-0.5) ** -2
            value = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
        elif ours in ("attn_cap", "logit_cap"):
            value = value or None
        tree[theirs] = value
    if family.window:
        layers = config.layer_windows
        # transformers wants a number for a Gemma of which no layer has a window, too.
        tree["sliding_window"] = max(layers) or (config.context if kind.startswith("gemma") else None)
        if "use_sliding_window" in family.defaults:
            first = next((i for i, w in enumerate(layers) if w), config.L)
            tree |= {"use_sliding_window": any(layers), "max_window_layers": first}
        if kind.startswith("gemma") or (kind.startswith("qwen") and any(layers)):
            tree["layer_types"] = ["sliding_attention" if w else "full_attention" for w in layers]
    return tree | dict(family.must) | ropes_to_hf(kind, config)


def same_model(a: Config, b: Config) -> bool:
    """Whether two Configs compute the same; how they are run (dtypes, layout) may differ."""
    return not _differ(a, b)


def _differ(a: Config, b: Config) -> list[str]:
    """The fields in which two Configs compute something else."""
    run = ("param_dtype", "dtype", "logits_dtype", "scan", "remat", "attention", "family", "windows", "query_scale")
    names = [f.name for f in dataclasses.fields(Config) if f.name not in run]
    found = [f"{n} = {getattr(b, n)!r}" for n in names if getattr(a, n) != getattr(b, n)]
    scales = [c.query_scale or c.H**-0.5 for c in (a, b)]
    if abs(scales[0] - scales[1]) > 1e-12:
        found.append(f"query_scale = {b.query_scale!r}")
    return found + ([f"windows = {b.windows!r}"] if a.layer_windows != b.layer_windows else [])


def dtype_name(dtype: Any) -> str:
    """'bfloat16' for any spelling of it."""
    return jnp.dtype(dtype).name
