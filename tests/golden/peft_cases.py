"""The adapters of `make_peft.py`: for each method of HF PEFT the variations that an importer can get wrong.

Plain data, nothing here needs torch. `CASES` maps a folder to (base, config class, keyword arguments of that class).
`COUNTS` maps a spelling of a method to (config class, keyword arguments), where a value that is a dict with the keys
"gpt2" and "other" is chosen by the model.
"""

_ROPE = {"rope_type": "default", "rope_theta": 300.0}
BASES = {
    "llama": {
        **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 61},
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_parameters": _ROPE},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False},
    },
    "gpt2": {
        **{"model_type": "gpt2", "n_layer": 2, "n_embd": 12, "n_head": 3, "n_positions": 48, "vocab_size": 53},
        **{"layer_norm_epsilon": 1e-3, "bos_token_id": 1, "eos_token_id": 2},
    },
    "gemma": {  # a tied table whose rows are scaled, by 4
        **{"model_type": "gemma2", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 61},
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-3, "query_pre_attn_scalar": 4, "sliding_window": 32},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    },
}

# square, narrower, wider, and from the wider back: [16, 16], [8, 16], [24, 16], [16, 24]
_SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]
_WIDE = ["q_proj", "up_proj", "down_proj"]
_CONV = ["c_attn", "c_proj", "c_fc"]
_PLACES = {"llama": _SOME, "gpt2": _CONV, "gemma": _SOME}

CASES = {}


def _add(method, cls, bases=("llama",), own=None, **common):
    """A case for each of `bases`; `own[base]` overrides `common`, target_modules are `_PLACES` unless given."""
    for base in bases:
        kwargs = {"target_modules": _PLACES[base], **common, **(own or {}).get(base, {})}
        CASES[f"{base}_{method}"] = (base, cls, {k: v for k, v in kwargs.items() if v != "default"})


_BOTH = ("llama", "gpt2")
_VO = {"llama": {"target_modules": ["q_proj", "v_proj"]}, "gpt2": {"target_modules": ["c_attn"]}}
_EMBED = {"llama": {"target_modules": ["v_proj", "embed_tokens"]}, "gpt2": {"target_modules": ["c_attn", "wte"]}}

_add("lora", "LoraConfig", _BOTH, target_modules="all-linear", r=3, lora_alpha=5)
_add(
    *("lora_patterns", "LoraConfig", _BOTH),
    **{"r": 2, "lora_alpha": 3},
    own={
        "llama": {
            "rank_pattern": {"v_proj": 4, "^model.layers.1.self_attn.q_proj": 1, r"layers\.0\.mlp.*_proj": 3},
            "alpha_pattern": {"mlp.up_proj": 8, "layers.1.mlp.down_proj": 1},
        },
        "gpt2": {"rank_pattern": {"mlp.c_proj": 4}, "alpha_pattern": {r"h.\d.attn.c_attn": 7}},
    },
)
_add("lora_rslora", "LoraConfig", _BOTH, _VO, r=4, lora_alpha=3, use_rslora=True)
_add("lora_bias", "LoraConfig", _BOTH, _VO, r=2, lora_alpha=3, lora_bias=True)
_add("lora_only", "LoraConfig", ("gpt2",), r=2, lora_alpha=3, bias="lora_only")
_add("lora_all_bias", "LoraConfig", ("gpt2",), _VO, r=2, lora_alpha=3, bias="all", lora_bias=True)
_add("lora_head", "LoraConfig", _BOTH, _VO, r=2, lora_alpha=3, modules_to_save=["lm_head"])
_add("lora_wte", "LoraConfig", ("gpt2",), _VO, r=2, lora_alpha=3, modules_to_save=["wte"])
_add("lora_wte_head", "LoraConfig", ("gpt2",), _VO, r=2, lora_alpha=3, modules_to_save=["wte", "lm_head"])
_add("lora_embed", "LoraConfig", _BOTH, _EMBED, r=2, lora_alpha=3)
_HEAD = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 2, "lora_alpha": 3}
_add("lora_lm_head", "LoraConfig", ("llama", "gemma"), **_HEAD)
_RS = {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"lm_head": 5}}
_add("rslora_lm_head", "LoraConfig", ("gpt2",), target_modules=["c_proj", "lm_head"], **_RS)
_add(
    *("lora_layers", "LoraConfig", _BOTH),
    **{"r": 2, "lora_alpha": 3, "layers_to_transform": [1]},
    own={"llama": {"layers_pattern": "layers"}, "gpt2": {"target_modules": ["c_attn"]}},
)
_add("lora_regex", "LoraConfig", target_modules=r".*\.0\.(self_attn\.k|mlp\.gate)_proj", r=2, lora_alpha=3)
_add("lora_exclude", "LoraConfig", r=2, lora_alpha=3, exclude_modules=["layers.0.self_attn.q_proj", "up_proj"])
_add("lora_tokens", "LoraConfig", _BOTH, _VO, r=2, lora_alpha=3, trainable_token_indices=[3, 17, 40])
_add("dora", "LoraConfig", _BOTH, r=3, lora_alpha=5, use_dora=True)
_add("dora_embed", "LoraConfig", _BOTH, _EMBED, r=2, lora_alpha=3, use_dora=True, use_rslora=True)
_add("pissa", "LoraConfig", _BOTH, r=2, lora_alpha=3, init_lora_weights="pissa")
_add("pissa_converted", "LoraConfig", _BOTH, r=2, lora_alpha=3, init_lora_weights="pissa")
_add("olora", "LoraConfig", r=2, lora_alpha=3, init_lora_weights="olora")

_add("vera", "VeraConfig", _BOTH, r=5)
_add("vera_noproj", "VeraConfig", ("gpt2",), r=5, save_projection=False, projection_prng_key=7)
_ADA = {"lora_alpha": 7, "init_r": 4, "target_r": 2, "total_step": 10, "tinit": 2, "tfinal": 2}
_add("adalora", "AdaLoraConfig", _BOTH, **_ADA)
_add("adalora_pruned", "AdaLoraConfig", _BOTH, **_ADA)
_add("loha", "LoHaConfig", r=2, alpha=3)
_add("lokr", "LoKrConfig", r=2, alpha=3)
_add("lokr_factor", "LoKrConfig", r=2, alpha=3, decompose_factor=8)
_add("lokr_both", "LoKrConfig", r=1, alpha=3, decompose_both=True, decompose_factor=5)
_add("oft", "OFTConfig", oft_block_size=4)
_add("oft_exact", "OFTConfig", oft_block_size=8, use_cayley_neumann=False)
_add("oft_terms", "OFTConfig", r=2, oft_block_size=0, num_cayley_neumann_terms=8)
_add("oft_share", "OFTConfig", oft_block_size=5, block_share=True, num_cayley_neumann_terms=3)
_add("oft_coft", "OFTConfig", oft_block_size=4, coft=True, eps=0.5, use_cayley_neumann=False)
_add("boft", "BOFTConfig", boft_block_size=4)
_add("boft_butterfly", "BOFTConfig", boft_block_size=2, boft_n_butterfly_factor=3)
_add("hra", "HRAConfig", r=4)
_add("hra_gs", "HRAConfig", r=3, apply_GS=True)
_add("ia3", "IA3Config", _BOTH, target_modules="default")
_add("ia3_inputs", "IA3Config", ("gpt2",), target_modules=["c_attn", "c_fc"], feedforward_modules=["c_attn"])
_add("miss", "MissConfig", r=4)
_add("miss_rest", "MissConfig", r=5)
_add("miss_bat", "MissConfig", r=4, init_weights="bat")
_add("miss_mini", "MissConfig", r=4, mini_r=2, init_weights="mini")
_add(
    "randlora", "RandLoraConfig", _BOTH, {"gpt2": {"target_modules": ["c_attn", "attn.c_proj"]}}, r=3, randlora_alpha=6
)
_add("randlora_sparse", "RandLoraConfig", target_modules=_WIDE, r=4, randlora_alpha=8, sparse=True)
_add("randlora_noproj", "RandLoraConfig", target_modules=_WIDE, r=4, randlora_alpha=8, save_projection=False)
_add(
    *("fourierft", "FourierFTConfig", _BOTH),
    **{"n_frequency": 20, "scaling": 20.0, "init_weights": True},
    own={"llama": {"n_frequency_pattern": {"mlp.up_proj": 30}}, "gpt2": {"random_loc_seed": 5}},
)
_add("shira", "ShiraConfig", r=2, random_seed=5)
_add("c3a", "C3AConfig", block_size=4, block_size_pattern={"mlp.down_proj": 8})
_add("ln", "LNTuningConfig", _BOTH, target_modules="default")
_add("ln_head", "LNTuningConfig", _BOTH, target_modules="default", modules_to_save=["lm_head"])
_add("tokens", "TrainableTokensConfig", _BOTH, target_modules="default", token_indices=[3, 17, 40])
_add("hira", "HiraConfig", _BOTH, r=3)
_add("hira_embed", "HiraConfig", ("llama", "gemma"), target_modules=["q_proj", "embed_tokens"], r=3)
for _i in (1, 2, 4):
    _add(f"road_{_i}", "RoadConfig", target_modules=_WIDE, variant=f"road_{_i}", group_size=4)
_NONE = {"target_modules": "default"}
_add("prompt", "PromptTuningConfig", ("llama", "gpt2", "gemma"), num_virtual_tokens=5, **_NONE)
_add("p_tuning", "PromptEncoderConfig", _BOTH, num_virtual_tokens=5, encoder_hidden_size=7, **_NONE)
_add("prefix", "PrefixTuningConfig", _BOTH, num_virtual_tokens=5, **_NONE)
_add("prefix_projection", "PrefixTuningConfig", num_virtual_tokens=5, prefix_projection=True, **_NONE)
_add("adaption_prompt", "AdaptionPromptConfig", _BOTH, adapter_len=4, adapter_layers=1, **_NONE)
_add("adaption_prompt_all", "AdaptionPromptConfig", adapter_len=3, adapter_layers=2, **_NONE)

# the noise of a method that needs larger values to show terms of higher order; of the others make_peft.py chooses it
SCALE = {"oft": [0.25], "boft": [0.25], "hra": [0.2], "road": [0.3]}

_ALL = {"target_modules": "all-linear"}
_TWO = {"target_modules": {"other": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}}
COUNTS = {
    "lora r8 q,v": ("LoraConfig", {"r": 8, **_TWO}),
    "lora r8 default": ("LoraConfig", {"r": 8}),
    "lora r8 all-linear": ("LoraConfig", {"r": 8, **_ALL}),
    "lora r16 all-linear": ("LoraConfig", {"r": 16, **_ALL}),
    "lora r8 all-linear lora_bias": ("LoraConfig", {"r": 8, "lora_bias": True, **_ALL}),
    "dora r8 all-linear": ("LoraConfig", {"r": 8, "use_dora": True, **_ALL}),
    "dora r16 all-linear": ("LoraConfig", {"r": 16, "use_dora": True, **_ALL}),
    "vera r256 all-linear": ("VeraConfig", {"r": 256, **_ALL}),
    "adalora init_r12 all-linear": ("AdaLoraConfig", {"init_r": 12, "total_step": 10, **_ALL}),
    "adalora init_r12 default": ("AdaLoraConfig", {"init_r": 12, "total_step": 10}),
    "loha r8 all-linear": ("LoHaConfig", {"r": 8, **_ALL}),
    "lokr r8 all-linear": ("LoKrConfig", {"r": 8, **_ALL}),
    "lokr r8 decompose_both all-linear": ("LoKrConfig", {"r": 8, "decompose_both": True, **_ALL}),
    "oft b32 all-linear": ("OFTConfig", {"oft_block_size": 32, **_ALL}),
    "oft b32 block_share all-linear": ("OFTConfig", {"oft_block_size": 32, "block_share": True, **_ALL}),
    "boft b4 q,v": ("BOFTConfig", {"boft_block_size": 4, **_TWO}),
    "boft b4 all-linear": ("BOFTConfig", {"boft_block_size": 4, **_ALL}),
    "hra r8 all-linear": ("HRAConfig", {"r": 8, **_ALL}),
    "ia3": ("IA3Config", {}),
    "miss r64 all-linear": ("MissConfig", {"r": 64, **_ALL}),
    "miss r64 bat q,v": ("MissConfig", {"r": 64, "init_weights": "bat", **_TWO}),
    "randlora r32 all-linear": ("RandLoraConfig", {"r": 32, **_ALL}),
    "fourierft n1000 all-linear": ("FourierFTConfig", {"n_frequency": 1000, **_ALL}),
    "shira r32 q,v": ("ShiraConfig", {"r": 32, **_TWO}),
    "c3a b64 q,v": ("C3AConfig", {"block_size": 64, **_TWO}),
    "hira r32 all-linear": ("HiraConfig", {"r": 32, **_ALL}),
    "road_1 g64 q,v": ("RoadConfig", {"variant": "road_1", "group_size": 64, **_TWO}),
    "ln": ("LNTuningConfig", {}),
    "tokens 8": ("TrainableTokensConfig", {"token_indices": list(range(8))}),
    "prompt 20": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "p_tuning 20": ("PromptEncoderConfig", {"num_virtual_tokens": 20}),
    "p_tuning 20 lstm": ("PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_reparameterization_type": "LSTM"}),
    "prefix 30": ("PrefixTuningConfig", {"num_virtual_tokens": 30}),
    "prefix 30 projection": ("PrefixTuningConfig", {"num_virtual_tokens": 30, "prefix_projection": True}),
    "adaption_prompt 10x30": ("AdaptionPromptConfig", {"adapter_len": 10, "adapter_layers": 30}),
}
COUNTED = (
    *("llama-2-7b", "llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen2.5-0.5b", "qwen2.5-7b"),
    *("qwen3-0.6b", "qwen3-8b", "gemma-2-2b", "gpt2", "gpt2-medium", "gpt2-large"),
)
