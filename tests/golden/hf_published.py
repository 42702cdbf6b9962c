"""Published models as their `config.json` on the hub spells them, and how many parameters each has.

`write` is called by `make_hf.py`: it builds every one on the meta device (nothing is allocated, nothing downloaded),
holds the count against the number known from the hub, and writes `published.json` and `params.json`. The configs were
written from memory of the hub, in the spelling of their time: `rope_theta` with `rope_scaling` and `torch_dtype`.
"""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "phi-3-mini": 3_821_079_552,
    "olmo-2-1b": 1_484_916_736,
    "smollm2-135m": 134_515_008,
    "stablelm-2-1.6b": 1_644_515_328,
}


def _hub(architecture, model_type, shape, dtype, version, **special):
    """One config; `shape` is (layers, hidden, intermediate, heads, kv heads, vocab, positions)."""
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {"architectures": [architecture], "model_type": model_type}
    config |= dict(zip((*keys, "vocab_size", "max_position_embeddings"), shape, strict=True))
    config |= {"initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype, "transformers_version": version}
    return config | special


def _llama3_rope(factor):
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return {"rope_scaling": scaling, "rope_theta": 500000.0}


_SILU = {"hidden_act": "silu"}
_PLAIN = {"attention_bias": False, "attention_dropout": 0.0}
_GEMMA = {**_PLAIN, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 256, "rms_norm_eps": 1e-6}
_LLAMA3 = {**_SILU, **_PLAIN, "bos_token_id": 128000, "eos_token_id": 128001, "mlp_bias": False, "pretraining_tp": 1}

PUBLISHED = {
    "llama-2-7b": _hub(
        *("LlamaForCausalLM", "llama", (32, 4096, 11008, 32, 32, 32000, 4096), "float16", "4.31.0.dev0"),
        **{**_SILU, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
        **{"rope_scaling": None, "tie_word_embeddings": False},
    ),
    "llama-3.1-8b": _hub(
        *("LlamaForCausalLM", "llama", (32, 4096, 14336, 32, 8, 128256, 131072), "bfloat16", "4.43.0.dev0"),
        **{**_LLAMA3, **_llama3_rope(8.0), "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "llama-3.2-1b": _hub(
        *("LlamaForCausalLM", "llama", (16, 2048, 8192, 32, 8, 128256, 131072), "bfloat16", "4.45.0.dev0"),
        **{**_LLAMA3, **_llama3_rope(32.0), "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "head_dim": 64},
    ),
    "mistral-7b": _hub(
        *("MistralForCausalLM", "mistral", (32, 4096, 14336, 32, 8, 32000, 32768), "bfloat16", "4.34.0.dev0"),
        **{**_SILU, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"sliding_window": 4096, "tie_word_embeddings": False},
    ),
    "qwen2.5-0.5b": _hub(
        *("Qwen2ForCausalLM", "qwen2", (24, 896, 4864, 14, 2, 151936, 32768), "bfloat16", "4.40.1"),
        **{**_SILU, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "rms_norm_eps": 1e-6},
        **{"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False},
        **{"rope_theta": 1000000.0, "tie_word_embeddings": True},
    ),
    "qwen3-0.6b": _hub(
        *("Qwen3ForCausalLM", "qwen3", (28, 1024, 3072, 16, 8, 151936, 40960), "bfloat16", "4.51.0"),
        **{**_SILU, **_PLAIN, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "rms_norm_eps": 1e-6},
        **{"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False},
        **{"rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": True},
    ),
    "gemma-2b": _hub(
        *("GemmaForCausalLM", "gemma", (18, 2048, 16384, 8, 1, 256000, 8192), "bfloat16", "4.38.0.dev0"),
        **{**_GEMMA, "hidden_act": "gelu", "rope_scaling": None, "rope_theta": 10000.0},
    ),
    "gemma-2-2b": _hub(
        *("Gemma2ForCausalLM", "gemma2", (26, 2304, 9216, 8, 4, 256000, 8192), "float32", "4.42.4"),
        **{**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
        **{"cache_implementation": "hybrid", "rope_theta": 10000.0, "sliding_window": 4096},
    ),
    "gemma-3-1b": _hub(
        *("Gemma3ForCausalLM", "gemma3_text", (26, 1152, 6912, 4, 1, 262144, 32768), "bfloat16", "4.50.0.dev0"),
        **{**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"},
        **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000},
        **{"sliding_window": 512, "sliding_window_pattern": 6},
    ),
    "gpt2": {
        **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"},
        **{"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02},
        **{"layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256},
        **{"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
        **{"summary_type": "cls_index", "summary_use_proj": True},
        **{"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    },
    "phi-3-mini": _hub(
        *("Phi3ForCausalLM", "phi3", (32, 3072, 8192, 32, 32, 32064, 4096), "bfloat16", "4.40.2"),
        **{**_SILU, **_PLAIN, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, "rms_norm_eps": 1e-5},
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096, "rope_scaling": None},
        **{"rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False},
    ),
    "olmo-2-1b": _hub(
        *("Olmo2ForCausalLM", "olmo2", (16, 2048, 8192, 16, 16, 100352, 4096), "float32", "4.51.3"),
        **{**_SILU, **_PLAIN, "eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-6},
        **{"rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
    ),
    "smollm2-135m": _hub(
        *("LlamaForCausalLM", "llama", (30, 576, 1536, 9, 3, 49152, 8192), "bfloat16", "4.40.1"),
        **{**_SILU, **_PLAIN, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.041666666666666664},
        **{"is_llama_config": True, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_interleaved": False},
        **{"rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True},
    ),
    "stablelm-2-1.6b": _hub(
        *("StableLmForCausalLM", "stablelm", (24, 2048, 5632, 32, 32, 100352, 4096), "float16", "4.38.0"),
        **{**_SILU, "bos_token_id": 100257, "eos_token_id": 100257, "layer_norm_eps": 1e-5, "use_qkv_bias": True},
        **{"partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False},
    ),
}
# Other sizes of the same families: what their files say otherwise.
_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
for _name, _like, _shape, _more in (
    ("llama-3.2-3b", "llama-3.2-1b", (28, 3072, 8192, 24, 8), {"head_dim": 128}),
    ("qwen2.5-7b", "qwen2.5-0.5b", (28, 3584, 18944, 28, 4), {"vocab_size": 152064, "max_position_embeddings": 131072,
     "sliding_window": 131072, "max_window_layers": 28, "tie_word_embeddings": False}),
    ("qwen3-8b", "qwen3-0.6b", (36, 4096, 12288, 32, 8), {"max_window_layers": 36, "tie_word_embeddings": False}),
):  # fmt: skip
    PUBLISHED[_name] = PUBLISHED[_like] | dict(zip(_KEYS, _shape, strict=True)) | _more
for _name, _layers, _width, _heads in (("gpt2-medium", 24, 1024, 16), ("gpt2-large", 36, 1280, 20)):
    PUBLISHED[_name] = PUBLISHED["gpt2"] | {"n_layer": _layers, "n_embd": _width, "n_head": _heads}


def count(config: dict) -> int:
    """How many parameters transformers gives the model of `config`; a tied head counts once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    return sum(p.numel() for p in model.parameters())


def write(out: Path):
    """Write `published.json` and `params.json`, or fail where a count is not the known one."""
    counts = {name: count(config) for name, config in PUBLISHED.items()}
    assert counts == COUNTS, {n: (c, COUNTS[n]) for n, c in counts.items() if c != COUNTS[n]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "params.json").write_text(json.dumps(counts, indent=2) + "\n")
    (out / "published.json").write_text(json.dumps(PUBLISHED, indent=1) + "\n")
