"""The types of HF PEFT: what an adapter_config.json calls our fields, and an adapter file our arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ... import InputError
from .check import check
from .names import by_pattern, by_suffix

Config = dict[str, Any]


class Form(NamedTuple):
    """How one array lies here and there, and a gradient there, where it is not as the array."""

    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    slope: Callable[[Any], Any] | None = None


IDENTITY = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)
COLUMN = Form(lambda x: x[:, 0], lambda x: x[:, None])
ROW = Form(lambda x: x[0], lambda x: x[None])
_NOTHING = lambda c, module: {}  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Kind:
    """One peft_type. `fields`: their keys -> our fields, which a module may have by itself where `varies` says so."""

    classes: tuple[str, ...]  # ours; the first unless `read` says another under "class"
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]  # of HF PEFT, for every key that is understood
    leaves: Mapping[str, tuple[str, Form]]  # our array -> (their name behind the module's, how it lies)
    tables: Mapping[str, tuple[str, Form]] = dataclasses.field(default_factory=dict)  # the same of a token table
    patterns: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)  # our field -> their pattern key
    varies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our field -> our field of rules for it
    read: Callable[[Config, str], dict[str, Any]] = _NOTHING  # what else of a config makes fields
    write: Callable[[Any], Config] = lambda method: {}  # what else of a method makes keys


def _lora(c: Config, module: str) -> dict[str, Any]:
    """The class that a LoRA config means, and its alpha: where HF divides by the root of the rank, another alpha."""
    start = c["init_lora_weights"]
    named = {"pissa": "PiSSA", "olora": "OLoRA"}
    plain = isinstance(start, bool) or start in ("gaussian", "orthogonal", "eva", "mica")
    if not plain and start not in named:
        raise InputError(
            f"init_lora_weights {start!r}: it changes the base in a way that the file does not hold; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    special = [n for n in (c["use_dora"] and "DoRA", c["lora_bias"] and "LoRABias", named.get(start)) if n]
    if len(special) > 1:
        raise InputError(f"{' with '.join(special)} in one adapter is not known here")
    name = special[0] if special else "RsLoRA" if c["use_rslora"] else "LoRA"
    rank = by_pattern(c["rank_pattern"], module, c["r"])
    alpha = by_pattern(c["alpha_pattern"], module, c["lora_alpha"])
    return {"class": name, "alpha": alpha * rank**0.5 if c["use_rslora"] and name != "RsLoRA" else alpha}


def _write_lora(method: Any) -> Config:
    name = type(method).__name__
    start = {"PiSSA": "pissa", "OLoRA": "olora"}.get(name, True)
    root = name == "RsLoRA" or getattr(method, "rslora", False)
    return {"use_dora": name == "DoRA", "lora_bias": name == "LoRABias", "use_rslora": root, "init_lora_weights": start}


def _adalora(c: Config, module: str) -> dict[str, Any]:
    kept = (c["rank_pattern"] or {}).get(f"{module}.lora_E", [True] * c["init_r"])
    return {"kept": sum(kept), "alpha": c["lora_alpha"] if c["lora_alpha"] > 0 else c["init_r"]}


def _oft(c: Config, module: str) -> dict[str, Any]:
    return {"terms": c["num_cayley_neumann_terms"] if c["use_cayley_neumann"] else 0}


def _miss(c: Config, module: str) -> dict[str, Any]:
    return {"bat": {"class": "MiSSBat"}, "mini": {"mini": c["mini_r"]}}.get(str(c["init_weights"]), {})


def _write_miss(method: Any) -> Config:
    mini = getattr(method, "mini", 0)
    return {"mini_r": mini or 1, "init_weights": "bat" if not hasattr(method, "mini") else "mini" if mini else True}


def _randlora(c: Config, module: str) -> dict[str, Any]:
    return {"sparse": "very_sparse" if c["very_sparse"] else "sparse" if c["sparse"] else ""}


def _projections(method: Any) -> Config:
    """Whether the file has the projections; not, if HF PEFT draws them again from the seed."""
    return {"save_projection": method.given is None or "drawn" not in method.given}


_MODULES = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
_COMMON = {**_MODULES, "bias": "none", "modules_to_save": None}
_LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
         "use_dora": False, "lora_bias": False, "init_lora_weights": True, "trainable_token_indices": None}  # fmt: skip
_BOTH = {"rank": ("rank_pattern", by_pattern), "alpha": ("alpha_pattern", by_pattern)}

kinds: dict[str, Kind] = {
    "LORA": Kind(
        ("LoRA", "RsLoRA", "DoRA", "LoRABias", "PiSSA", "OLoRA", "LoRAPlus", "LoRAFA", "LoRAHead"),
        {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}, {**_COMMON, **_LORA},
        {"a": ("lora_A.weight", TRANSPOSED), "b": ("lora_B.weight", TRANSPOSED), "c": ("lora_B.bias", IDENTITY),
         "m": ("lora_magnitude_vector", IDENTITY)},
        {"a": ("lora_embedding_A", TRANSPOSED), "b": ("lora_embedding_B", TRANSPOSED), "m": ("lora_magnitude_vector", IDENTITY)},
        _BOTH, {"rank": "ranks", "alpha": "alphas"}, _lora, _write_lora),
    "ADALORA": Kind(
        ("AdaLoRA",),
        {"init_r": "init_rank", "target_r": "rank", "lora_alpha": "alpha", "tinit": "tinit", "tfinal": "tfinal",
         "deltaT": "every", "beta1": "b1", "beta2": "b2", "orth_reg_weight": "orthogonality"},
        {**_COMMON, "init_r": 12, "target_r": 8, "lora_alpha": 8, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85,
         "beta2": 0.85, "orth_reg_weight": 0.5, "rank_pattern": None, "r": 8, "total_step": None,
         "init_lora_weights": True},
        {"a": ("lora_A", TRANSPOSED), "e": ("lora_E", COLUMN), "b": ("lora_B", TRANSPOSED)}, varies={"kept": "ranks"},
        read=_adalora),
    "VERA": Kind(
        ("VeRA",), {"r": "rank", "d_initial": "d_initial", "projection_prng_key": "seed"},
        {**_COMMON, "r": 256, "d_initial": 0.1, "projection_prng_key": 0, "save_projection": True},
        {"b": ("vera_lambda_b", IDENTITY), "d": ("vera_lambda_d", IDENTITY)}, write=_projections),
    "RANDLORA": Kind(
        ("RandLoRA",), {"r": "rank", "randlora_alpha": "alpha", "projection_prng_key": "seed"},
        {**_COMMON, "r": 32, "randlora_alpha": 640, "projection_prng_key": 0, "save_projection": True, "sparse": False,
         "very_sparse": False},
        {"lam": ("randlora_lambda", IDENTITY), "gamma": ("randlora_gamma", IDENTITY)}, read=_randlora,
        write=lambda m: {"sparse": m.sparse == "sparse", "very_sparse": m.sparse == "very_sparse"} | _projections(m)),
    "LOHA": Kind(
        ("LoHa",), {"r": "rank", "alpha": "alpha"},
        {**_COMMON, "r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}},
        {"b1": ("hada_w1_a", TRANSPOSED), "a1": ("hada_w1_b", TRANSPOSED), "b2": ("hada_w2_a", TRANSPOSED),
         "a2": ("hada_w2_b", TRANSPOSED)}, patterns=_BOTH),
    "LOKR": Kind(
        ("LoKr",), {"r": "rank", "alpha": "alpha", "decompose_factor": "factor", "decompose_both": "both"},
        {**_COMMON, "r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "decompose_factor": -1,
         "decompose_both": False},
        {"k1": ("lokr_w1", TRANSPOSED), "b1": ("lokr_w1_a", TRANSPOSED), "a1": ("lokr_w1_b", TRANSPOSED),
         "k2": ("lokr_w2", TRANSPOSED), "b2": ("lokr_w2_a", TRANSPOSED), "a2": ("lokr_w2_b", TRANSPOSED)}, patterns=_BOTH),
    "OFT": Kind(
        ("OFT",), {"r": "blocks", "oft_block_size": "block", "coft": "coft", "eps": "eps", "block_share": "share"},
        {**_COMMON, "r": 0, "oft_block_size": 32, "coft": False, "eps": 6e-5, "block_share": False,
         "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        {"r": ("oft_R.weight", IDENTITY)}, read=_oft,
        write=lambda m: {"use_cayley_neumann": m.terms > 0, "num_cayley_neumann_terms": m.terms or 5}),
    "BOFT": Kind(
        ("BOFT",), {"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
        {**_COMMON, "boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
        {"r": ("boft_R", IDENTITY), "s": ("boft_s", COLUMN)}),
    "HRA": Kind(
        ("HRA",), {"r": "rank", "apply_GS": "gram_schmidt"}, {**_COMMON, "r": 8, "apply_GS": False},
        {"u": ("hra_u", IDENTITY)}),
    "IA3": Kind(
        ("IA3",), {}, {**_MODULES, "modules_to_save": None, "feedforward_modules": None, "init_ia3_weights": True},
        {"after": ("ia3_l", COLUMN), "before": ("ia3_l", ROW)}),
    "MISS": Kind(
        ("MiSS", "MiSSBat"), {"r": "rank"}, {**_COMMON, "r": 64, "mini_r": 1, "init_weights": True},
        {"s": ("miss_block", IDENTITY)}, read=_miss, write=_write_miss),
    "FOURIERFT": Kind(
        ("FourierFT",), {"n_frequency": "n", "scaling": "scale", "random_loc_seed": "seed"},
        {**_COMMON, "n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "n_frequency_pattern": {}},
        {"spectrum": ("fourierft_spectrum", IDENTITY)}, patterns={"n": ("n_frequency_pattern", by_suffix)},
        varies={"n": "ns"}),
    "SHIRA": Kind(
        ("SHiRA",), {"r": "rank"}, {**_COMMON, "r": 32, "random_seed": None, "mask_type": "random"},
        {"values": ("shira_weight", IDENTITY)}),
    "C3A": Kind(
        ("C3A",), {"block_size": "block"}, {**_COMMON, "block_size": 256, "block_size_pattern": {}},
        {"kernel": ("c3a_kernel", IDENTITY)}, patterns={"block": ("block_size_pattern", by_suffix)},
        varies={"block": "blocks"}),
    "HIRA": Kind(
        ("HiRA",), {"r": "rank", "hira_dropout": "dropout"},
        {**_COMMON, "r": 32, "hira_dropout": 0.0, "rank_pattern": {}},
        {"a": ("hira_A", TRANSPOSED), "b": ("hira_B", TRANSPOSED)},
        {"a": ("hira_embedding_A", TRANSPOSED), "b": ("hira_embedding_B", TRANSPOSED)},
        {"rank": ("rank_pattern", by_pattern)}, {"rank": "ranks"}),
    "ROAD": Kind(
        ("RoAd",), {"group_size": "group"}, {**_COMMON, "variant": "road_1", "group_size": 64},
        {"theta": ("road_theta", IDENTITY), "alpha": ("road_alpha", IDENTITY)},
        read=lambda c, m: {"variant": int(str(c["variant"])[-1])},
        write=lambda m: {"variant": f"road_{m.variant}"}),
    "LN_TUNING": Kind(
        ("LNTuning", "Subset"), {}, {**_MODULES, "modules_to_save": None},
        {"scale": ("ln_tuning_layers.weight", IDENTITY), "bias": ("ln_tuning_layers.bias", IDENTITY)}),
    "TRAINABLE_TOKENS": Kind(
        ("Tokens",), {"token_indices": "ids"}, {"target_modules": None, "token_indices": ()}, {},
        {"rows": ("trainable_tokens_delta", IDENTITY)}, read=lambda c, m: {"ids": tuple(c["token_indices"])}),
    "PROMPT_TUNING": Kind(
        ("Prompt",), {"num_virtual_tokens": "tokens"},
        {"num_virtual_tokens": 20, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}, {},
        {"prompt": ("prompt_embeddings", IDENTITY)}),
    "P_TUNING": Kind(
        ("PTuning",), {"num_virtual_tokens": "tokens", "encoder_hidden_size": "hidden"},
        {"num_virtual_tokens": 20, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 0,
         "encoder_num_layers": 2}, {},
        read=lambda c, m: {"hidden": c["encoder_hidden_size"] or 0}),
    "PREFIX_TUNING": Kind(
        ("Prefix", "PrefixMLP"), {"num_virtual_tokens": "tokens"},
        {"num_virtual_tokens": 20, "prefix_projection": False, "encoder_hidden_size": 0}, {},
        read=lambda c, m: {"class": "PrefixMLP", "hidden": c["encoder_hidden_size"] or 0}
        if c["prefix_projection"] else {}),
    "ADAPTION_PROMPT": Kind(
        ("LLaMAAdapter",), {"adapter_len": "tokens", "adapter_layers": "layers"},
        {"target_modules": None, "adapter_len": 10, "adapter_layers": 30},
        {"prompt": ("adaption_prompt", ROW), "gate": ("adaption_gate", IDENTITY)}),
}  # fmt: skip

# Keys that say nothing about what is computed here, or only how training begins or where HF keeps things.
_NEUTRAL = """
peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode fan_in_fan_out
megatron_core qalora_group_size runtime_config eva_config loftq_config corda_config lora_ga_config init_weights
hra_init_weights init_c3a_weights lora_dropout vera_dropout randlora_dropout boft_dropout miss_dropout
module_dropout rank_dropout rank_dropout_scale init_ia3_weights num_attention_heads num_layers
num_transformer_submodules token_dim tokenizer_name_or_path tokenizer_kwargs encoder_dropout encoder_num_layers
random_seed use_effective_conv2d ephemeral_gpu_offload save_projection init_lora_weights boft_block_num
"""
NEUTRAL = set(_NEUTRAL.split())


def complete(c: Mapping[str, Any], where: str) -> Config:
    """A config with HF PEFT's defaults. InputError: a type or a key that is not known."""
    name = str(c.get("peft_type") or "").rsplit(".", 1)[-1]
    if name not in kinds:
        raise InputError(f"{where}: peft_type {c.get('peft_type')!r} is not known here; known: {', '.join(kinds)}")
    kind = kinds[name]
    for key, value in c.items():
        says = bool(value) and value != "none"
        if key not in kind.defaults and key not in NEUTRAL and says:
            raise InputError(f"{where}: {key} = {value!r} is not understood, and may change what the adapter computes")
    check(c, kind.defaults, where)
    given = {k: v for k, v in c.items() if v is not None or kind.defaults.get(k) is None}
    if str(given.get("init_lora_weights")).lower() in ("olora", "gaussian"):  # of these two HF takes any case
        given["init_lora_weights"] = given["init_lora_weights"].lower()
    return {**kind.defaults, **given, "peft_type": name}


def numpy(x: Any) -> np.ndarray:
    """An array in fp32, as adapters are kept; numbers for places and seeds stay whole."""
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float32)
