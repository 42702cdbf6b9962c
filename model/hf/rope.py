"""The rotary part of a Hugging Face config.json <-> Rope, in both spellings: rope_parameters, and the hub's older
rope_theta + rope_scaling."""

import math
from collections.abc import Mapping
from typing import Any

from ... import InputError
from ..config import Config
from ..rope import Rope

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_OLD = {"su": "longrope"}
_INNER = {  # what each kind may say besides its kind, theta and partial_rotary_factor
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
             "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}  # fmt: skip
_LAYERS = ("full_attention", "sliding_attention")


def ropes_from_hf(kind: str, tree: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"rope", "rope_local", "context"} of a config.json."""
    said = dict(tree.get("rope_scaling") or tree.get("rope_parameters") or {})
    by_layer = {k: dict(said.pop(k)) for k in _LAYERS if isinstance(said.get(k), Mapping)}
    for inner in by_layer.values():
        inner.pop("truncate", None)  # transformers looks for it one level up only
    common = {k: tree[k] for k in ("rope_theta", "partial_rotary_factor") if tree.get(k) is not None}
    whole = common | by_layer.get("full_attention", said)
    if kind == "phi3":  # the outer value wins
        whole["original_max_position_embeddings"] = tree["original_max_position_embeddings"]
    rope, context = _rope(kind, whole, fields, where)
    found: dict[str, Any] = {"rope": rope, "context": context}
    if "rope_local_base_freq" in tree:
        local = {"rope_theta": tree["rope_local_base_freq"], **by_layer.get("sliding_attention", {})}
        found["rope_local"] = _rope(kind, local, fields, where)[0]
    elif by_layer and by_layer.get("sliding_attention", by_layer.get("full_attention")) != by_layer.get(
        "full_attention", by_layer.get("sliding_attention")
    ):
        raise InputError(f"{where}: rope_parameters differ between kinds of layers, which {kind} has not")
    return found


def _rope(kind: str, said: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> tuple[Rope, int]:
    """(Rope, the context it reaches)."""
    how = str(said.get("rope_type") or said.get("type") or "default")
    how = "longrope" if kind == "phi3" and how == "yarn" else _OLD.get(how, how)
    if how not in _INNER:
        raise InputError(f"{where}: rope_type {how!r} is not known; one of {', '.join(_INNER)} is wanted")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    known |= {"finetuned"}  # says how it came to be
    unknown = [k for k in said if k not in known | set(_INNER[how]) and said[k] is not None]
    if said.get("partial_rotary_factor") not in (None, 1) and kind not in ("phi3", "stablelm"):
        unknown.append("partial_rotary_factor")  # transformers turns the whole head all the same, or fails
    missing = [k for k in _INNER[how] if k in _WANTED[how] and said.get(k) is None]
    if unknown or missing:
        text = "; ".join(f"{what} {', '.join(k)}" for what, k in (("unknown", unknown), ("missing", missing)) if k)
        raise InputError(f"{where}: rope of kind {how}: {text}")
    try:
        return _numbers(how, said, fields)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError):
        raise InputError(f"{where}: rope of kind {how} has something that is no number: {dict(said)}") from None


_WANTED = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor"),
}  # fmt: skip


def _numbers(how: str, said: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[Rope, int]:
    H, context = fields["H"], fields["context"]
    width = int(H * float(said.get("partial_rotary_factor") or 1.0))
    rope: dict[str, Any] = {"theta": float(said.get("rope_theta", 10_000.0)), "width": 0 if width == H else width}
    if how == "default":
        return Rope(**rope), context
    # transformers stretches dynamic from max_position_embeddings whatever else is said.
    original = 0 if how == "linear" else context if how == "dynamic" else said.get("original_max_position_embeddings")
    original = int(original if original is not None else context)
    factor = float(said["factor"]) if said.get("factor") is not None else context / original
    rope |= {"kind": how, "factor": factor, "original": original}
    if how == "llama3":
        rope |= {"low": float(said["low_freq_factor"]), "high": float(said["high_freq_factor"])}
    if how == "yarn":
        rope |= {"low": float(said.get("beta_slow") or 1), "high": float(said.get("beta_fast") or 32)}
        rope["truncate"] = bool(said.get("truncate", True))
    if how == "longrope":
        rope |= {"short": tuple(map(float, said["short_factor"])), "long": tuple(map(float, said["long_factor"]))}
    if how in ("yarn", "longrope"):
        rope["magnitude"] = _magnitude(how, said, factor, original)
    # Where max_position_embeddings was left as it was, the stretched context is what the model reaches.
    return Rope(**rope), max(context, round(factor * original)) if how in ("yarn", "dynamic") else context


def _magnitude(how: str, said: Mapping[str, Any], factor: float, original: int) -> float:
    """What sin and cos are multiplied by: as said, or by the rule of the paper."""
    if said.get("attention_factor") is not None:
        return float(said["attention_factor"])
    if how == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    if said.get("mscale") and said.get("mscale_all_dim"):
        return scale(said["mscale"]) / scale(said["mscale_all_dim"])
    return scale(1)


def ropes_to_hf(kind: str, config: Config) -> dict[str, Any]:
    """The rotary keys of a config.json, in the spelling of the hub."""
    if config.rope is None:
        return {}
    rope = config.rope
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
            scaling["original_max_position_embeddings"] = rope.original
        if rope.kind == "llama3":
            scaling |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        if rope.kind == "yarn":
            scaling |= {"beta_slow": rope.low, "beta_fast": rope.high, "truncate": rope.truncate}
        if rope.kind == "longrope":
            scaling |= {"short_factor": list(rope.short), "long_factor": list(rope.long)}
        if rope.kind in ("yarn", "longrope"):
            scaling["attention_factor"] = rope.magnitude
    if kind == "phi3":
        tree["original_max_position_embeddings"] = rope.original or config.context
    return tree
