"""The values of an adapter_config.json before anything is made of them: for a wrong type one line, no traceback."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ... import InputError
from ...model.pattern import Pattern


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(x, str) for x in value)


def _ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(x) is int and x >= 0 for x in value)


def _number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 1 << 63) or (isinstance(value, float) and math.isfinite(value))


def _ranks(value: Any) -> bool:
    """Of AdaLoRA a list of which ranks are kept."""
    values = value.values() if isinstance(value, dict) else [None]
    return all(
        (type(x) is int and x > 0) or (isinstance(x, list) and all(isinstance(k, bool) for k in x)) for x in values
    )


_Rule = tuple[Callable[[Any], bool], str]
_NAMES: _Rule = (lambda v: isinstance(v, str) or _texts(v), "a pattern or a list of names")
_START: _Rule = (lambda v: isinstance(v, bool | str), "true, false or a name")
_WHOLE: _Rule = (lambda v: type(v) is int and 0 <= v < 1 << 63, "a whole number of 0 or more")
_NUMBERS: _Rule = (lambda v: isinstance(v, dict) and all(map(_number, v.values())), "an object of numbers")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"), _NAMES),
    **dict.fromkeys(("init_lora_weights", "init_weights"), _START),
    **dict.fromkeys(("random_seed", "total_step", "oft_block_size", "boft_block_size", "random_loc_seed",
                     "projection_prng_key"), _WHOLE),
    **dict.fromkeys(("rank_pattern", "n_frequency_pattern", "block_size_pattern"),
                    (_ranks, "an object of whole numbers of 1 or more")),
    **dict.fromkeys(("lora_alpha", "alpha", "randlora_alpha"), (_number, "a finite number")),
    "alpha_pattern": _NUMBERS,
    "modules_to_save": (_texts, "a list of names"),
    "variant": (("road_1", "road_2", "road_4").__contains__, "road_1, road_2 or road_4"),
    "layers_to_transform": (lambda v: _ids(v) or _ids([v]), "a layer or a list of layers"),
    "token_indices": (_ids, "a list of ids"),
    "trainable_token_indices": (lambda v: _ids(v) or (isinstance(v, dict) and all(map(_ids, v.values()))),
                                "a list of ids, or an object with one"),
}  # fmt: skip


def check(c: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """InputError for a value that is not of the type HF PEFT has there, or a pattern that is none."""
    for key, value in c.items():
        if key not in defaults or value is None:
            continue
        fits, wanted = _RULES.get(key) or _like(defaults[key])
        if not fits(value):
            raise InputError(f"{where}: {key} is {reprlib.repr(value)}; {wanted} is wanted")
        if key.endswith(("_modules", "_pattern", "_to_save")):
            for pattern in [value] if isinstance(value, str) else value:
                Pattern(pattern, f"{where}: {key}")
    if c.get("boft_block_size") == 0 and not c.get("boft_block_num"):
        raise InputError(f"{where}: boft_block_size and boft_block_num are 0; one of the two is wanted")


def _like(default: Any) -> _Rule:
    """What stands in for a default: a whole number is no smaller than it, or than 1."""
    if isinstance(default, bool):
        return lambda v: isinstance(v, bool), "true or false"
    if isinstance(default, int):
        least = min(default, 1)
        return lambda v: type(v) is int and least <= v < 1 << 31, f"a whole number of {least} or more"
    if isinstance(default, float):
        return _number, "a finite number"
    return lambda v: isinstance(v, str), "text"
