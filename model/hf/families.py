"""The Hugging Face families: one configuration table and one name table each.

Add a family by an entry of `families`: how its config.json maps to Config, and how its tensor names map to our paths.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..config import Config
from ..init import shapes_of
from ..tree import is_stacked, named

# Keys that no logit depends on: bookkeeping, generation, dropout and initialisation of training from scratch.
IGNORED_KEYS = """
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
# Keys of published files that are understood only with these values, which change nothing.
NO_EFFECT = {"full_attn_mod": 1, "interpolate_factor": 1}
# Switches that must be off, except in families that have a field for them.
MUST_BE_OFF = (
    "is_encoder_decoder", "add_cross_attention", "is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size",
    "quantization_config", "use_bidirectional_attention", "attention_bias", "mlp_bias", "use_sliding_window",
    "use_parallel_residual", "qk_layernorm", "use_qk_norm", "use_mrope", "rope_interleaved", "clip_qkv", "lm_head_bias",
)  # fmt: skip

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
    """A family: how its config.json maps to Config, and how its tensor names map to our paths."""

    architecture: str  # the class in transformers
    keys: Mapping[str, str]  # key of config.json -> field of Config; two fields are joined by a space
    defaults: Mapping[str, Any]  # of transformers, for keys that a config.json may leave out
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields that every model of the family has
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys that are understood with one value
    has_window: Callable[[int, Mapping[str, Any]], bool] | None = None  # (layer, config.json) -> bool
    ignored: tuple[str, ...] = ()  # further keys without effect
    reads_layer_types: bool = False  # layer_types overrides `has_window`
    scaled_embeddings: bool = False  # embeddings are multiplied by sqrt(D)
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)  # tensor name -> path, see below
    conv1d: bool = False  # matrices are stored as [in, out], like ours


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


def _names(layers: str, outer: Mapping[str, str], layer: Mapping[str, str]) -> dict[str, str]:
    """The name table {tensor name: path} of modules outside the layers, and of a layer, whose prefix is `layers`.

    {} stands for the layer. Paths joined by a space are concatenated along the output axis. A module has a weight and,
    if the model has it, a bias.
    """
    modules = dict(outer) | {
        f"{layers}.{{}}.{module}": " ".join(f"layers/{path}" for path in paths.split())
        for module, paths in layer.items()
    }
    names = {}
    for module, paths in modules.items():
        suffixes = ("/scale", "/bias") if paths.endswith("norm") else ("", "_bias")
        for kind, suffix in zip(("weight", "bias"), suffixes, strict=True):
            names[f"{module}.{kind}"] = " ".join(path + suffix for path in paths.split())
    return names


_OUTER = {"model.embed_tokens": "embed/table", "lm_head": "head/matrix", "model.norm": "final_norm"}
_MATRICES = {
    "self_attn.q_proj": "attn/q", "self_attn.k_proj": "attn/k", "self_attn.v_proj": "attn/v",
    "self_attn.o_proj": "attn/o", "self_attn.q_norm": "attn/q_norm", "self_attn.k_norm": "attn/k_norm",
    "mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up", "mlp.down_proj": "mlp/down",
}  # fmt: skip
_PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
_POST_NORMS = {"post_attention_layernorm": "attn_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
_BOTH_NORMS = {**_POST_NORMS, "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "mlp_norm"}
LLAMA_NAMES = _names("model.layers", _OUTER, {**_MATRICES, **_PRE_NORMS})
_OLMO2_NAMES = _names("model.layers", _OUTER, {**_MATRICES, **_POST_NORMS})
_GEMMA2_NAMES = _names("model.layers", _OUTER, {**_MATRICES, **_BOTH_NORMS})
_PHI3_NAMES = _names("model.layers", _OUTER, {
    "self_attn.qkv_proj": "attn/q attn/k attn/v", "self_attn.o_proj": "attn/o",
    "mlp.gate_up_proj": "mlp/gate mlp/up", "mlp.down_proj": "mlp/down", **_PRE_NORMS,
})  # fmt: skip
_GPT2_NAMES = _names("transformer.h", {
    "transformer.wte": "embed/table", "transformer.wpe": "embed/positions", "lm_head": "head/matrix",
    "transformer.ln_f": "final_norm",
}, {
    "attn.c_attn": "attn/qkv", "attn.c_proj": "attn/o", "mlp.c_fc": "mlp/up", "mlp.c_proj": "mlp/down",
    "ln_1": "attn_norm", "ln_2": "mlp_norm",
})  # fmt: skip
# Buffers of old checkpoints: tables that transformers computes.
BUFFERS = r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"


def _qwen_window(i: int, tree: Mapping[str, Any]) -> bool:
    return bool(tree["use_sliding_window"]) and i >= tree["max_window_layers"]


families: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", keys={**_SIZES, **_BIAS, "mlp_bias": "mlp_bias"}, defaults=_LLAMA),
    "mistral": Family(
        "MistralForCausalLM", keys=_SIZES,
        defaults={**_LLAMA, "max_position_embeddings": 131072, "sliding_window": 4096},
        has_window=lambda i, tree: True),
    "qwen2": Family(
        "Qwen2ForCausalLM", keys=_SIZES, defaults=_QWEN, fixed={"qkv_bias": True},
        has_window=_qwen_window, reads_layer_types=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", keys={**_SIZES, **_BIAS}, defaults={**_QWEN, "head_dim": 128}, fixed={"qk_norm": "head"},
        has_window=_qwen_window, reads_layer_types=True),
    "gemma": Family(
        "GemmaForCausalLM", keys={**_SIZES, **_BIAS},
        defaults={**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
        fixed={"norm_offset": 1.0}, scaled_embeddings=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", keys=_GEMMA2_KEYS, names=_GEMMA2_NAMES,
        defaults={**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed={"norm_offset": 1.0, "norm_at": "both"}, scaled_embeddings=True,
        ignored=("hidden_act", "sliding_window_size"),
        has_window=lambda i, tree: i % 2 == 0, reads_layer_types=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", keys=_without(_GEMMA2_KEYS, "attn_logit_softcapping"), names=_GEMMA2_NAMES,
        defaults={**_GEMMA2, "max_position_embeddings": 131072, "sliding_window_pattern": 6,
                  "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        fixed={"norm_offset": 1.0, "norm_at": "both", "qk_norm": "head"}, scaled_embeddings=True,
        ignored=("hidden_act", "attn_logit_softcapping"),  # the model never reads that cap
        has_window=lambda i, tree: (i + 1) % tree["sliding_window_pattern"] != 0, reads_layer_types=True),
    "gpt2": Family(
        "GPT2LMHeadModel", keys=_GPT2_SIZES, names=_GPT2_NAMES, conv1d=True,
        defaults={"n_inner": None, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
                  "tie_word_embeddings": True},
        fixed={"norm": "layer", "gated": False, "rope": None, "learned_positions": True, "fused_qkv": True,
               "qkv_bias": True, "o_bias": True, "mlp_bias": True},
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}),
    "phi3": Family(
        "Phi3ForCausalLM", keys=_SIZES, names=_PHI3_NAMES,
        defaults={**_LLAMA, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                  "original_max_position_embeddings": 4096, "sliding_window": None},
        has_window=lambda i, tree: True),
    "olmo2": Family(
        "Olmo2ForCausalLM", keys={**_SIZES, **_BIAS}, names=_OLMO2_NAMES, defaults={**_LLAMA, "rms_norm_eps": 1e-5},
        fixed={"norm_at": "post", "qk_norm": "full"}),
    "stablelm": Family(
        "StableLmForCausalLM",
        keys={**_without(_SIZES, "rms_norm_eps"), "layer_norm_eps": "norm_eps", "use_qkv_bias": "qkv_bias"},
        defaults={**_LLAMA, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "use_qkv_bias": False,
                  "partial_rotary_factor": 0.25},
        fixed={"norm": "layer"}, required={"use_parallel_residual": False, "qk_layernorm": False}),
}  # fmt: skip


class Source(NamedTuple):
    """The place of one layer of a parameter: in a tensor, from an offset along its output axis."""

    name: str
    offset: int
    transposed: bool  # [out, in] on disk, [in, out] here


def tensor_sources(config: Config) -> tuple[dict[str, list[Source]], dict[str, tuple[int, ...]]]:
    """({path: the source of each layer}, {tensor name: shape}) of a config whose family is known."""
    family, shapes = families[config.family], named(shapes_of(dataclasses.replace(config, scan=True)))
    sources: dict[str, list[Source]] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    for hf_name, joined in family.names.items():
        paths = joined.split()
        if not all(path in shapes for path in paths):
            continue
        stacked = is_stacked(paths[0])
        parts = [shapes[path].shape[stacked:] for path in paths]
        matrix = len(parts[0]) == 2 and not paths[0].startswith("embed/")
        transposed = matrix and (not family.conv1d or paths[0] == "head/matrix")
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        for layer in range(config.L) if stacked else [0]:
            name, offset = hf_name.format(layer), 0
            tensors[name] = shape[::-1] if transposed else shape
            for path, part in zip(paths, parts, strict=True):
                sources.setdefault(path, []).append(Source(name, offset, transposed))
                offset += part[-1]
    assert not set(shapes) - set(sources), f"{config.family} has no name for {set(shapes) - set(sources)}"
    return sources, tensors
