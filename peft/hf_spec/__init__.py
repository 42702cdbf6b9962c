"""How Hugging Face PEFT stores a method: data that the method's file declares, and that peft/hf reads and writes by."""

from .modules import HFModel, Module, Place, by_suffix, ends_with
from .spec import (
    COLUMN,
    IDENTITY,
    PREFIX,
    PROMPT_NEUTRAL,
    ROW,
    TRANSPOSED,
    AdapterConfig,
    AdapterFile,
    Companion,
    Entry,
    FixedTensors,
    HFSpec,
    HFTensor,
    Key,
    Picked,
    SharedProjections,
    Tensors,
    no_fields,
)  # fmt: skip
from .values import BOOL_OR_NAME, IDS, NAMES, WHOLE, ValueKind, is_ids

__all__ = [
    "BOOL_OR_NAME", "COLUMN", "IDENTITY", "IDS", "NAMES", "PREFIX", "PROMPT_NEUTRAL", "ROW", "TRANSPOSED", "WHOLE",
    "AdapterConfig", "AdapterFile", "Companion", "Entry", "FixedTensors", "HFModel", "HFSpec", "HFTensor", "Key",
    "Module", "Picked", "Place", "SharedProjections", "Tensors", "ValueKind", "by_suffix", "ends_with", "is_ids",
    "no_fields",
]  # fmt: skip
