"""Conversion between Rope and the rotary part of a config.json: rope_parameters, or rope_theta + rope_scaling of older
files."""

import math
from collections.abc import Mapping
from typing import Any

from ... import InputError
from ..config import Config
from ..rope import Rope
from .values import check_value

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, "finetuned")
_KEYS = {  # kind: (keys that it needs, further keys that it reads)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": ((), ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def ropes_from_hf(kind: str, tree: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"rope", "rope_local", "context"} of a config.json of a family `kind`; `fields` are those of Config so far."""
    scaling = dict(tree.get("rope_scaling") or tree.get("rope_parameters") or {})
    by_layer = {k: dict(scaling.pop(k)) for k in _LAYER_TYPES if isinstance(scaling.get(k), Mapping)}
    for inner in by_layer.values():
        inner.pop("truncate", None)  # transformers looks for it one level up only
    common = {k: tree[k] for k in ("rope_theta", "partial_rotary_factor") if tree.get(k) is not None}
    values = common | by_layer.get("full_attention", scaling)
    if kind == "phi3":  # the outer value wins
        values[_ORIGINAL] = tree[_ORIGINAL]
    rope, context = _rope(kind, values, fields, where)
    ropes: dict[str, Any] = {"rope": rope, "context": context}
    if "rope_local_base_freq" in tree:
        local = {"rope_theta": tree["rope_local_base_freq"], **by_layer.get("sliding_attention", {})}
        ropes["rope_local"] = _rope(kind, local, fields, where)[0]
    elif len(by_layer) == 2 and by_layer["full_attention"] != by_layer["sliding_attention"]:
        raise InputError(f"{where}: rope_parameters differ between layer types, which {kind} does not support")
    return ropes


def _rope(kind: str, values: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> tuple[Rope, int]:
    """(Rope, the context it reaches) of the values of one layer type."""
    rope_type = str(values.get("rope_type") or values.get("type") or "default")
    rope_type = "longrope" if rope_type == "su" or (kind == "phi3" and rope_type == "yarn") else rope_type
    if rope_type not in _KEYS:
        raise InputError(f"{where}: rope_type {rope_type!r} is not known; wanted one of {', '.join(_KEYS)}")
    needed, optional = _KEYS[rope_type]
    unknown = [k for k, v in values.items() if k not in (*_COMMON_KEYS, *needed, *optional) and v is not None]
    if values.get("partial_rotary_factor") not in (None, 1) and kind not in ("phi3", "stablelm"):
        unknown.append("partial_rotary_factor")  # transformers rotates the whole head all the same, or fails
    missing = [k for k in needed if values.get(k) is None]
    if unknown or missing:
        parts = [f"{label} {', '.join(keys)}" for label, keys in (("unknown", unknown), ("missing", missing)) if keys]
        raise InputError(f"{where}: rope of kind {rope_type}: {'; '.join(parts)}")
    for key, value in values.items():
        check_value(key, value, f"{where}: rope")
    return _checked_rope(rope_type, values, fields)


def _checked_rope(kind: str, values: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[Rope, int]:
    H, context = fields["H"], fields["context"]
    width = int(H * float(values.get("partial_rotary_factor") or 1.0))
    rope: dict[str, Any] = {"theta": float(values.get("rope_theta", 10_000.0)), "width": 0 if width == H else width}
    if kind == "default":
        return Rope(**rope), context
    # transformers extends dynamic from max_position_embeddings, whatever else the file says.
    original = 0 if kind == "linear" else context if kind == "dynamic" else values.get(_ORIGINAL)
    original = int(original if original is not None else context)
    factor = float(values["factor"]) if values.get("factor") is not None else context / original
    rope |= {"kind": kind, "factor": factor, "original": original}
    if kind == "llama3":
        rope |= {"low": float(values["low_freq_factor"]), "high": float(values["high_freq_factor"])}
    if kind == "yarn":
        rope |= {"low": float(values.get("beta_slow") or 1), "high": float(values.get("beta_fast") or 32)}
        rope["truncate"] = bool(values.get("truncate", True))
    if kind == "longrope":
        rope |= {"short": tuple(map(float, values["short_factor"])), "long": tuple(map(float, values["long_factor"]))}
    if kind in ("yarn", "longrope"):
        rope["magnitude"] = _magnitude(kind, values, factor, original)
    # If max_position_embeddings is still the original context, the model reaches the extended one.
    return Rope(**rope), max(context, round(factor * original)) if kind in ("yarn", "dynamic") else context


def _magnitude(kind: str, values: Mapping[str, Any], factor: float, original: int) -> float:
    """The factor of sin and cos: as given, or by the rule of the paper."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1)


def ropes_to_hf(kind: str, config: Config) -> dict[str, Any]:
    """The rotary keys of a config.json of a family `kind`, in the spelling of the hub."""
    rope = config.rope
    if rope is None:
        return {}
    tree: dict[str, Any] = {"rope_theta": rope.theta}
    share = (rope.width or config.H) / config.H
    if share != 1 or kind == "stablelm":
        tree["partial_rotary_factor"] = share
    if config.rope_local:
        tree["rope_local_base_freq"] = config.rope_local.theta
    if rope.kind != "default":
        scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
        tree["rope_scaling"] = scaling
        if rope.kind == "dynamic":
            tree["max_position_embeddings"] = rope.original
        elif rope.kind != "linear":
            scaling[_ORIGINAL] = rope.original
        if rope.kind == "llama3":
            scaling |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        if rope.kind == "yarn":
            scaling |= {"beta_slow": rope.low, "beta_fast": rope.high, "truncate": rope.truncate}
        if rope.kind == "longrope":
            scaling |= {"short_factor": list(rope.short), "long_factor": list(rope.long)}
        if rope.kind in ("yarn", "longrope"):
            scaling["attention_factor"] = rope.magnitude
    if kind == "phi3":
        tree[_ORIGINAL] = rope.original or config.context
    return tree
