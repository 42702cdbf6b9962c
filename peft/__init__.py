"""Methods of training: what trains, as its own pytree, and `bind`, which combines it with the frozen base."""

from ..model import Weight, static
from . import hf, masks, merging, rows
from .base import Chain, Method, apply, chain, count, fold, merge, partition
from .methods import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    FourierFT,
    Gradual,
    Head,
    HiRA,
    Houlsby,
    LLaMAAdapter,
    LNTuning,
    LoHa,
    LoKr,
    Lookup,
    LoRA,
    LoRABias,
    LoRAFA,
    LoRAHead,
    LoRAPlus,
    MiSS,
    MiSSBat,
    OLoRA,
    Parallel,
    Pfeiffer,
    PiSSA,
    Prefix,
    PrefixMLP,
    Prompt,
    PTuning,
    RandLoRA,
    RoAd,
    RsLoRA,
    SHiRA,
    Subset,
    Tokens,
    VeRA,
)  # fmt: skip
from .methods import by_name as methods

__all__ = [
    "BOFT", "C3A", "HRA", "IA3", "OFT", "AdaLoRA", "BitFit", "Chain", "DoRA", "FourierFT", "Gradual", "Head", "HiRA",
    "Houlsby", "LLaMAAdapter", "LNTuning", "LoHa", "LoKr", "LoRA", "LoRABias", "LoRAFA", "LoRAHead", "LoRAPlus",
    "Lookup", "Method", "MiSS", "MiSSBat", "OLoRA", "PTuning", "Parallel", "Pfeiffer", "PiSSA", "Prefix", "PrefixMLP",
    "Prompt", "RandLoRA", "RoAd", "RsLoRA", "SHiRA", "Subset", "Tokens", "VeRA", "Weight", "apply", "chain", "count",
    "fold", "hf", "masks", "merge", "merging", "methods", "partition", "rows", "static",
]  # fmt: skip
