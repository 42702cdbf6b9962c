"""The Hugging Face families: what each one's config.json says, and what it calls its tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# Keys that no logit depends on: bookkeeping, generation, the dropout and initialisation of training from scratch.
NEUTRAL = """
model_type architectures transformers_version torch_dtype dtype auto_map name_or_path bos_token_id eos_token_id
pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class use_cache cache_implementation
return_dict output_hidden_states output_attentions problem_type id2label label2id num_labels chunk_size_feed_forward
torchscript use_bfloat16 tf_legacy_loss pruned_heads finetuning_task task_specific_params prefix max_length min_length
do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens initializer_range pretraining_tp
attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation
summary_proj_to_labels summary_first_dropout n_ctx reorder_and_upcast_attn unsloth_fixed unsloth_version
is_llama_config transformers.js_config n_special predict_special_tokens output_past max_sequence_length
gradient_checkpointing conversational
"""
# Keys of published files that say what is so anyway.
ONLY = {"full_attn_mod": 1, "interpolate_factor": 1}
# Switches that no family here has on, besides those that have a field for them.
OFF = ("is_encoder_decoder", "add_cross_attention", "is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size",
        "quantization_config", "use_bidirectional_attention", "attention_bias", "mlp_bias", "use_sliding_window",
        "use_parallel_residual", "qk_layernorm", "use_qk_norm", "use_mrope", "rope_interleaved",
        "clip_qkv", "lm_head_bias")  # fmt: skip

_SIZES = {
    "vocab_size": "V", "hidden_size": "D", "num_hidden_layers": "L", "num_attention_heads": "N",
    "num_key_value_heads": "K", "head_dim": "H", "intermediate_size": "F", "max_position_embeddings": "context",
    "rms_norm_eps": "norm_eps", "hidden_act": "activation", "tie_word_embeddings": "tied",
}  # fmt: skip
_GPT2_SIZES = {
    "vocab_size": "V", "n_embd": "D", "n_layer": "L", "n_head": "N", "n_inner": "F", "n_positions": "context",
    "layer_norm_epsilon": "norm_eps", "activation_function": "activation", "tie_word_embeddings": "tied",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's config.json says and leaves unsaid. `keys`: theirs -> ours, two of ours joined by a space."""

    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]  # of transformers, for keys that a config.json may leave out
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what every model of the family has
    must: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys of which one value is understood
    window: Callable[[int, Mapping[str, Any]], bool] | None = None  # (layer, config.json): whether it has a window
    neutral: tuple[str, ...] = ()
    mixed: bool = False  # whether layer_types may differ from `window`
    scaled: bool = False  # embeddings are multiplied by sqrt(D)
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)  # theirs -> ours, see above
    conv1d: bool = False  # matrices lie as [in, out], as ours do


def _without(keys: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k not in names}


_BIAS = {"attention_bias": "qkv_bias o_bias"}
_LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
          "rope_theta": 10_000.0}  # fmt: skip
_QWEN = {**_LLAMA, "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
         "max_window_layers": 28}  # fmt: skip
_GEMMA = {**_without(_LLAMA, "hidden_act"), "max_position_embeddings": 8192, "head_dim": 256,
          "tie_word_embeddings": True}  # fmt: skip
_GEMMA2 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2_KEYS = {**_without(_SIZES, "hidden_act"), **_BIAS, "hidden_activation": "activation",
                "query_pre_attn_scalar": "query_scale", "attn_logit_softcapping": "attn_cap",
                "final_logit_softcapping": "logit_cap"}  # fmt: skip

# Tensors: theirs -> ours, {} the layer; several of ours joined by a space are stacked along the output axis.
_ATTENTION = {
    f"model.layers.{{}}.self_attn.{p}_proj.{kind}": f"layers/attn/{p}{ours}"
    for p in "qkvo"
    for kind, ours in (("weight", ""), ("bias", "_bias"))
} | {f"model.layers.{{}}.self_attn.{p}_norm.weight": f"layers/attn/{p}_norm/scale" for p in "qk"}
_MLP = {
    f"model.layers.{{}}.mlp.{p}_proj.{kind}": f"layers/mlp/{p}{ours}"
    for p in ("gate", "up", "down")
    for kind, ours in (("weight", ""), ("bias", "_bias"))
}
_OUTER = {"model.embed_tokens.weight": "embed/table", "lm_head.weight": "head/matrix"}


def _norms(**names: str) -> dict[str, str]:
    """Norms of a layer by their names, and the last one; each with its bias, if it has one."""
    whole = {f"model.layers.{{}}.{k}": f"layers/{v}" for k, v in names.items()} | {"model.norm": "final_norm"}
    parts = (("weight", "scale"), ("bias", "bias"))
    return {f"{k}.{theirs}": f"{v}/{ours}" for k, v in whole.items() for theirs, ours in parts}


LLAMA_NAMES = {**_OUTER, **_ATTENTION, **_MLP,
               **_norms(input_layernorm="attn_norm", post_attention_layernorm="mlp_norm")}  # fmt: skip
_POST = _norms(post_attention_layernorm="attn_post_norm", post_feedforward_layernorm="mlp_post_norm")
_OLMO2_NAMES = {**_OUTER, **_ATTENTION, **_MLP, **_POST}
_GEMMA2_NAMES = {**_OLMO2_NAMES, **_norms(input_layernorm="attn_norm", pre_feedforward_layernorm="mlp_norm")}
_PHI3_NAMES = {k: v for k, v in LLAMA_NAMES.items() if v not in (f"layers/{p}" for p in (
    "attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"))} | {
    "model.layers.{}.self_attn.qkv_proj.weight": "layers/attn/q layers/attn/k layers/attn/v",
    "model.layers.{}.mlp.gate_up_proj.weight": "layers/mlp/gate layers/mlp/up",
}  # fmt: skip
_GPT2_NAMES = {
    "transformer.wte.weight": "embed/table",
    "transformer.wpe.weight": "embed/positions",
    "lm_head.weight": "head/matrix",
} | {
    f"transformer.{theirs}.{kind}": " ".join(path + ours for path in paths.split())
    for theirs, paths, parts in (
        ("h.{}.attn.c_attn", "layers/attn/qkv", ("", "_bias")),
        ("h.{}.attn.c_proj", "layers/attn/o", ("", "_bias")),
        ("h.{}.mlp.c_fc", "layers/mlp/up", ("", "_bias")),
        ("h.{}.mlp.c_proj", "layers/mlp/down", ("", "_bias")),
        ("h.{}.ln_1", "layers/attn_norm", ("/scale", "/bias")),
        ("h.{}.ln_2", "layers/mlp_norm", ("/scale", "/bias")),
        ("ln_f", "final_norm", ("/scale", "/bias")),
    )
    for kind, ours in zip(("weight", "bias"), parts, strict=True)
}
# What old checkpoints hold besides parameters: tables that are computed.
BUFFERS = r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"


def _qwen_window(i: int, tree: Mapping[str, Any]) -> bool:
    return bool(tree["use_sliding_window"]) and i >= tree["max_window_layers"]


families: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {**_SIZES, **_BIAS, "mlp_bias": "mlp_bias"}, _LLAMA),
    "mistral": Family(
        "MistralForCausalLM", _SIZES, {**_LLAMA, "max_position_embeddings": 131072, "sliding_window": 4096},
        window=lambda i, tree: True),
    "qwen2": Family("Qwen2ForCausalLM", _SIZES, _QWEN, {"qkv_bias": True}, window=_qwen_window, mixed=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_SIZES, **_BIAS}, {**_QWEN, "head_dim": 128}, {"qk_norm": "head"}, window=_qwen_window,
        mixed=True),
    "gemma": Family(
        "GemmaForCausalLM", {**_SIZES, **_BIAS}, {**_GEMMA, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None}, {"norm_offset": 1.0}, scaled=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", _GEMMA2_KEYS, {**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"norm_offset": 1.0, "norm_at": "both"}, scaled=True, names=_GEMMA2_NAMES, mixed=True,
        neutral=("hidden_act", "sliding_window_size"),
        window=lambda i, tree: i % 2 == 0),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _without(_GEMMA2_KEYS, "attn_logit_softcapping"), {**_GEMMA2,
        "max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0},
        {"norm_offset": 1.0, "norm_at": "both", "qk_norm": "head"}, scaled=True, names=_GEMMA2_NAMES,
        neutral=("hidden_act", "attn_logit_softcapping"),  # the model never looks at that cap
        mixed=True, window=lambda i, tree: (i + 1) % tree["sliding_window_pattern"] != 0),
    "gpt2": Family(
        "GPT2LMHeadModel", _GPT2_SIZES, {"n_inner": None, "n_positions": 1024, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "tie_word_embeddings": True},
        {"norm": "layer", "gated": False, "rope": None, "learned_positions": True, "fused_qkv": True, "qkv_bias": True,
         "o_bias": True, "mlp_bias": True}, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        names=_GPT2_NAMES, conv1d=True),
    "phi3": Family(
        "Phi3ForCausalLM", _SIZES, {**_LLAMA, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "sliding_window": None}, names=_PHI3_NAMES,
        window=lambda i, tree: True),
    "olmo2": Family(
        "Olmo2ForCausalLM", {**_SIZES, **_BIAS}, {**_LLAMA, "rms_norm_eps": 1e-5},
        {"norm_at": "post", "qk_norm": "full"}, names=_OLMO2_NAMES),
    "stablelm": Family(
        "StableLmForCausalLM", {**_without(_SIZES, "rms_norm_eps"), "layer_norm_eps": "norm_eps",
        "use_qkv_bias": "qkv_bias"}, {**_LLAMA, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5,
        "use_qkv_bias": False, "partial_rotary_factor": 0.25}, {"norm": "layer"},
        {"use_parallel_residual": False, "qk_layernorm": False}),
}  # fmt: skip
