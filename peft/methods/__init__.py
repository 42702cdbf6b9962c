"""The methods, one file a family. `by_name` maps a method's command-line name to its class.

A new method is one file here and its class in the list below; the laws in tests/ then hold it without an edit.
"""

from ..base import Method
from .adalora import AdaLoRA
from .c3a import C3A
from .dora import DoRA
from .fourierft import FourierFT
from .hira import HiRA
from .houlsby import Houlsby, Parallel, Pfeiffer
from .hra import HRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .lora_variants import LoRABias, LoRAFA, LoRAHead, LoRAPlus, RsLoRA
from .miss import MiSS, MiSSBat
from .oft import BOFT, OFT
from .pissa import OLoRA, PiSSA
from .prefix import LLaMAAdapter, Prefix, PrefixMLP
from .prompt import Prompt, PTuning
from .randlora import RandLoRA
from .road import RoAd
from .shira import SHiRA
from .subset import BitFit, Gradual, LNTuning, Subset
from .tokens import Head, Lookup, Tokens
from .vera import VeRA

_ALL: tuple[type[Method], ...] = (
    AdaLoRA, BitFit, BOFT, C3A, DoRA, FourierFT, Gradual, Head, HiRA, Houlsby, HRA, IA3, LLaMAAdapter, LNTuning, LoHa,
    LoKr, Lookup, LoRA, LoRABias, LoRAFA, LoRAHead, LoRAPlus, MiSS, MiSSBat, OFT, OLoRA, Parallel, Pfeiffer, PiSSA,
    Prefix, PrefixMLP, Prompt, PTuning, RandLoRA, RoAd, RsLoRA, SHiRA, Subset, Tokens, VeRA,
)  # fmt: skip
by_name: dict[str, type[Method]] = {method.__name__.lower(): method for method in _ALL}

__all__ = [
    "BOFT", "C3A", "HRA", "IA3", "OFT", "AdaLoRA", "BitFit", "DoRA", "FourierFT", "Gradual", "Head", "HiRA", "Houlsby",
    "LLaMAAdapter", "LNTuning", "LoHa", "LoKr", "LoRA", "LoRABias", "LoRAFA", "LoRAHead", "LoRAPlus", "Lookup", "MiSS",
    "MiSSBat", "OLoRA", "PTuning", "Parallel", "Pfeiffer", "PiSSA", "Prefix", "PrefixMLP", "Prompt", "RandLoRA", "RoAd",
    "RsLoRA", "SHiRA", "Subset", "Tokens", "VeRA", "by_name",
]  # fmt: skip
