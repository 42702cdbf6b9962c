"""The tiny Hugging Face models of `make_hf.py`: one config for each thing that an importer can get wrong.

Plain data, nothing here needs torch. Norm epsilons are large and rope bases unusual so that a reader who ignores a key
and takes a default instead is caught by the numbers.
"""


def _case(model_type, layers, hidden, inter, heads, kv, vocab=61, **special):
    """Keyword arguments of a config class; `special` holds what the case is about."""
    common = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inter}
    common |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab}
    common |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    common |= {"layer_norm_eps" if model_type == "stablelm" else "rms_norm_eps": 1e-3}
    return {"model_type": model_type, **common, **special}


def _rope(theta, rope_type="default", **special):
    return {"rope_type": rope_type, "rope_theta": theta, **special}


# with these, head width 6 has one frequency that is kept, one that is smoothed and one that is divided
_LLAMA3_ROPE = _rope(
    100.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_LLAMA3 = _case(
    "llama", 2, 24, 20, 4, 2, 63, tie_word_embeddings=True, max_position_embeddings=512, rope_parameters=_LLAMA3_ROPE
)
_QWEN3 = _case("qwen3", 2, 20, 24, 4, 2, 65, head_dim=8, tie_word_embeddings=True, rope_parameters=_rope(3000.0))
_SLIDING, _FULL = "sliding_attention", "full_attention"

CASES = {
    "llama2": _case("llama", 2, 16, 20, 2, 2, rms_norm_eps=1e-5),
    "llama3": _LLAMA3,
    "llama_linear": _case(
        "llama", 2, 20, 24, 4, 2, head_dim=12, attention_bias=True, rope_parameters=_rope(10000.0, "linear", factor=2.5)
    ),
    "llama_dynamic": _case(
        "llama", 2, 16, 28, 2, 2, max_position_embeddings=16, rope_parameters=_rope(500.0, "dynamic", factor=2.0)
    ),
    "llama_yarn": _case(
        *("llama", 2, 24, 20, 2, 1),
        mlp_bias=True,
        rope_parameters=_rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_legacy": _LLAMA3,
    "mistral": _case("mistral", 2, 16, 28, 4, 2, 67, sliding_window=5, rope_parameters=_rope(700.0)),
    "qwen2": _case(
        *("qwen2", 3, 16, 20, 4, 2),
        rope_parameters=_rope(2000.0),
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3": _QWEN3,
    "qwen3_bf16": _QWEN3 | {"dtype": "bfloat16"},
    "gemma": _case("gemma", 2, 20, 28, 2, 1, 69, head_dim=12, rope_parameters=_rope(400.0)),
    "gemma2": _case(
        *("gemma2", 4, 16, 20, 4, 2, 67),
        head_dim=6,
        rope_parameters=_rope(400.0),
        query_pre_attn_scalar=3,
        sliding_window=5,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _case(
        *("gemma3_text", 4, 16, 20, 4, 1, 67),
        head_dim=6,
        query_pre_attn_scalar=7,
        sliding_window=5,
        layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING],
        rope_parameters={_SLIDING: _rope(50.0), _FULL: _rope(900.0, "linear", factor=8.0)},
    ),
    "gpt2": {
        **{"model_type": "gpt2", "n_layer": 2, "n_embd": 33, "n_head": 3, "n_inner": 20, "n_positions": 44},
        **{"vocab_size": 71, "layer_norm_epsilon": 1e-3, "bos_token_id": 1, "eos_token_id": 2},
    },
    "phi3": _case("phi3", 2, 32, 20, 2, 1, rope_parameters=_rope(600.0, partial_rotary_factor=0.75)),
    "phi3_long": _case(
        *("phi3", 2, 24, 20, 2, 1),
        original_max_position_embeddings=16,
        rope_parameters=_rope(
            *(600.0, "longrope"),
            short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.5],
            long_factor=[1.1, 1.5, 2.0, 2.75, 3.5, 5.0],
        ),
    ),
    "olmo2": _case("olmo2", 2, 16, 28, 4, 2, 65, rope_parameters=_rope(800.0)),
    "smollm2": _case("llama", 2, 24, 24, 3, 1, 97, tie_word_embeddings=True, rope_parameters=_rope(5000.0)),
    "stablelm": _case(
        "stablelm", 2, 32, 20, 2, 1, use_qkv_bias=True, rope_parameters=_rope(900.0, partial_rotary_factor=0.25)
    ),
}
