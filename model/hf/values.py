"""Types and ranges of the values in a Hugging Face config.json, whatever the family."""

from typing import Any

from ... import InputError

_INT, _FLOAT, _FLOATS, _BOOL, _LIST, _DICT = (
    "an integer", "a number", "a list of numbers", "true or false", "a list", "an object",
)  # fmt: skip
_ROWS = (  # (keys, type, lowest value, highest value)
    ("vocab_size hidden_size n_embd num_attention_heads n_head num_key_value_heads head_dim", _INT, 1, 1e12),
    ("intermediate_size n_inner max_position_embeddings n_positions sliding_window_pattern", _INT, 1, 1e12),
    ("num_hidden_layers n_layer", _INT, 1, 10_000),
    ("sliding_window sliding_window_size max_window_layers original_max_position_embeddings", _INT, 0, 1e12),
    ("rms_norm_eps layer_norm_eps layer_norm_epsilon", _FLOAT, 0, 1e12),
    ("attn_logit_softcapping final_logit_softcapping", _FLOAT, 0, 1e12),
    ("query_pre_attn_scalar", _FLOAT, 1e-9, 1e12),
    ("rope_theta rope_local_base_freq partial_rotary_factor factor low_freq_factor high_freq_factor", _FLOAT, 0, 1e12),
    ("beta_fast beta_slow attention_factor mscale mscale_all_dim", _FLOAT, 0, 1e12),
    ("short_factor long_factor", _FLOATS, 0, 1e12),
    ("tie_word_embeddings attention_bias mlp_bias use_qkv_bias use_sliding_window truncate", _BOOL, 0, 1),
    ("layer_types", _LIST, 0, 0),
    ("rope_scaling rope_parameters", _DICT, 0, 0),
)
VALUES = {key: row for keys, *row in _ROWS for key in keys.split()}


def check_value(key: str, value: Any, where: str) -> None:
    """Raise InputError for a value of another type, or out of range. null and unknown keys pass."""
    if value is None or key not in VALUES:
        return
    kind, low, high = VALUES[key]
    if not _fits(value, kind, low, high):
        bounds = f" from {low:g} to {high:g}" if kind in (_INT, _FLOAT, _FLOATS) else ""
        raise InputError(f"{where}: {key} is {value!r:.60}; wanted {kind}{bounds}")


def _fits(value: Any, kind: Any, low: Any, high: Any) -> bool:
    if kind == _FLOATS:
        return isinstance(value, list) and all(_fits(x, _FLOAT, low, high) for x in value)
    if kind in (_INT, _FLOAT):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return is_number and (kind == _FLOAT or value == int(value))
    return isinstance(value, {_BOOL: bool, _LIST: list, _DICT: dict}[kind])
