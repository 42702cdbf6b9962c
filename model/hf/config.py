"""Conversion between a Hugging Face `config.json` and Config. Every key that may change a logit is read or refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ... import InputError
from ..config import Config
from .families import IGNORED_KEYS, MUST_BE_OFF, NO_EFFECT, Family, families
from .rope import ROPE_KEYS, ropes_from_hf, ropes_to_hf
from .values import check_value

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip
_MAY_BE_NULL = ("head_dim", "num_key_value_heads", "n_inner", "attn_logit_softcapping", "final_logit_softcapping")


# --- config.json -> Config ---


def config_from_hf(tree: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a config.json. `where` names it in errors.

    Raises InputError for an unknown architecture, a missing size, and a key or value that is not understood.
    """
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        hint = " (a model of text and images: give its text part)" if "text_config" in tree else ""
        raise InputError(f"{where}: model_type {kind!r} is not known{hint}; families: {', '.join(families)}")
    family, keys = families[kind], {k: v for k, v in tree.items() if not k.startswith("_")}
    try:
        _check_keys(family, keys, where)
        return _config(kind, family, {**family.defaults, **keys}, where)
    except (TypeError, ValueError, KeyError, ArithmeticError, StopIteration) as error:
        if isinstance(error, InputError):
            raise error if where in str(error) else InputError(f"{where}: {error}") from None
        raise InputError(f"{where}: a value is not understood ({type(error).__name__}: {error})") from None


def _check_keys(family: Family, keys: Mapping[str, Any], where: str) -> None:
    """Raise InputError that lists every key that is not understood, or for the first value of a wrong type."""
    rope = () if "rope" in family.fixed else ROPE_KEYS
    only = {**NO_EFFECT, **family.required}
    known = {*family.keys, *family.defaults, *family.ignored, *rope, *only, "layer_types"}
    bad = [f"{k} = {keys[k]!r} (only {v!r} is)" for k, v in only.items() if keys.get(k, v) != v]
    bad += [f"{k} = {keys[k]!r}" for k in MUST_BE_OFF if keys.get(k) and k not in known]
    unknown = [k for k in keys if k not in known and k not in IGNORED_KEYS.split() and k not in MUST_BE_OFF]
    # A key that is null or empty changes nothing, whatever it is for.
    bad += [f"{k} = {keys[k]!r:.60}" for k in unknown if keys[k] not in (None, [], {}, "")]
    if bad:
        raise InputError(f"{where}: not understood, and it may change what the model computes: {'; '.join(bad)}")
    for key in [k for k in keys if k in known]:
        check_value(key, keys[key], where)
    sizes = [keys[k] for k in ("sliding_window", "sliding_window_size") if keys.get(k) is not None]
    if len(set(sizes)) > 1:
        raise InputError(f"{where}: sliding_window and sliding_window_size differ: {sizes}")


def _config(kind: str, family: Family, full: Mapping[str, Any], where: str) -> Config:
    """The Config of a checked config.json in which keys that were left out have their defaults."""
    fields: dict[str, Any] = {**family.fixed, "family": kind}
    for key, names in family.keys.items():
        if full.get(key) is not None:
            fields |= dict.fromkeys(names.split(), _field_value(kind, names, full[key], f"{where}: {key}"))
        elif key in full and key not in _MAY_BE_NULL:
            raise InputError(f"{where}: {key} is null")
    _derive_fields(family, full, fields, where)
    fields["windows"] = _windows(family, full, fields["L"], where)
    if "rope" not in family.fixed:
        fields |= ropes_from_hf(kind, full, fields, where)
    dtype = str(full.get("dtype") or full.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{where}: dtype {dtype!r} is not known; wanted float32, bfloat16 or float16")
    return Config(**fields, param_dtype=dtype, dtype=dtype)


def _field_value(kind: str, name: str, value: Any, where: str) -> Any:
    """The value of a field of Config from that of its key."""
    if name == "activation":
        value = "gelu_pytorch_tanh" if kind == "gemma" and value == "gelu" else value  # its first release meant tanh
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise InputError(f"{where}: activation {value!r} is not known; wanted one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]
    if name == "query_scale":
        return float(value) ** -0.5
    if isinstance(value, bool):
        return value
    return int(value) if name in (*"VDLNKHF", "context") else float(value)


def _derive_fields(family: Family, full: Mapping[str, Any], fields: dict[str, Any], where: str) -> None:
    """Set the fields that follow from others: K, H and F where they are left out, the scale of Gemma's embeddings."""
    key_of = {names: key for key, names in family.keys.items()}
    if missing := [key_of[name] for name in "VDLN" if name not in fields]:
        raise InputError(f"{where}: has no {', '.join(missing)}")
    fields.setdefault("K", fields["N"])
    if "H" not in fields and fields["D"] % fields["N"]:
        raise InputError(f"{where}: {key_of['D']} {fields['D']} does not divide into {fields['N']} heads")
    fields.setdefault("H", fields["D"] // fields["N"])
    if "F" not in fields:
        if "n_inner" not in full:
            raise InputError(f"{where}: has no {key_of['F']}")
        fields["F"] = 4 * fields["D"]
    if full.get("hidden_activation") and "hidden_act" in family.keys:  # Gemma 1: transformers 4 and 5 read one each
        other = _field_value("gemma", "activation", full["hidden_activation"], f"{where}: hidden_activation")
        if other != fields["activation"]:
            raise InputError(f"{where}: hidden_act and hidden_activation differ; keep one of them")
    if family.scaled_embeddings:
        fields["embed_scale"] = fields["D"] ** 0.5


def _windows(family: Family, full: Mapping[str, Any], L: int, where: str) -> tuple[int, ...]:
    """The windows of the layers, as the shortest tuple that repeats to them; () for none."""
    window, types = full.get("sliding_window") or 0, full.get("layer_types")
    window = int(window) if full.get("use_sliding_window", True) else 0
    windows = [window if family.has_window and family.has_window(i, full) else 0 for i in range(L)]
    if types is not None:
        window_of = {"full_attention": 0, "sliding_attention": window}
        if len(types) != L or not all(isinstance(t, str) and t in window_of for t in types):
            raise InputError(f"{where}: layer_types is {types!r:.80}; wanted {L} of {', '.join(window_of)}")
        if "sliding_attention" in types and not window:
            raise InputError(f"{where}: layer_types has sliding_attention, but there is no sliding_window")
        listed = [window_of[t] for t in types]
        if listed != windows and not family.reads_layer_types:
            raise InputError(f"{where}: layer_types differs from what this family does, and nothing reads it; drop it")
        windows = listed
    period = next(n for n in range(1, L + 1) if all(windows[i] == windows[i % n] for i in range(L)))
    return tuple(windows[:period]) if any(windows) else ()


# --- Config -> config.json ---


def config_to_hf(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a Config, in the spelling of the hub.

    Raises InputError if its family, or no family where it names none, computes what the config does.
    """
    if config.family and config.family not in families:
        raise InputError(f"family {config.family!r} is not known; families: {', '.join(families)}")
    reason = ""
    for kind in [config.family] if config.family else families:
        tree = _tree(kind, config, dtype)
        try:
            differences = _differences(config_from_hf(tree), config)
        except InputError as error:
            differences = [str(error)]
        if not differences:
            return tree
        reason = reason or f"{kind} cannot express {', '.join(differences)}"
    raise InputError(f"no Hugging Face family computes what this config does ({reason})")


def _tree(kind: str, config: Config, dtype: str) -> dict[str, Any]:
    """The config.json that is closest to a Config in one family."""
    family = families[kind]
    tree: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind, "torch_dtype": dtype}
    tree |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the defaults of a class may lie outside V
    for key, names in family.keys.items():
        value = getattr(config, names.split()[0])
        if names == "activation":
            value = next(k for k, v in _ACTIVATIONS.items() if v == value)
        elif names == "query_scale":
            scalar = (value or config.H**-0.5) ** -2
            value = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
        elif names in ("attn_cap", "logit_cap"):
            value = value or None
        tree[key] = value
    if family.has_window:
        layers = config.layer_windows
        # transformers wants a number for a Gemma of which no layer has a window, too.
        tree["sliding_window"] = max(layers) or (config.context if kind.startswith("gemma") else None)
        if "use_sliding_window" in family.defaults:
            first = next((i for i, window in enumerate(layers) if window), config.L)
            tree |= {"use_sliding_window": any(layers), "max_window_layers": first}
        if kind.startswith("gemma") or (kind.startswith("qwen") and any(layers)):
            tree["layer_types"] = ["sliding_attention" if window else "full_attention" for window in layers]
    return tree | dict(family.required) | ropes_to_hf(kind, config)


def same_model(a: Config, b: Config) -> bool:
    """Return whether two Configs compute the same function; dtypes and layout may differ."""
    return not _differences(a, b)


def _differences(a: Config, b: Config) -> list[str]:
    """The fields, with b's values, in which two Configs compute different functions."""
    other = ("param_dtype", "dtype", "logits_dtype", "scan", "remat", "attention", "family", "windows", "query_scale")
    fields = [f.name for f in dataclasses.fields(Config) if f.name not in other]
    names = [name for name in fields if getattr(a, name) != getattr(b, name)]
    scales = [c.query_scale or c.H**-0.5 for c in (a, b)]
    names += ["query_scale"] * (abs(scales[0] - scales[1]) > 1e-12)
    names += ["windows"] * (a.layer_windows != b.layer_windows)
    return [f"{name} = {getattr(b, name)!r}" for name in names]
