"""Adapters of Hugging Face PEFT: folders of adapter_config.json and adapter_model.safetensors, read and written.

What HF PEFT calls a method, its fields and its arrays is declared beside the method (`hf = HFSpec(...)`, see
peft/hf_spec); the code here works over those specs.
"""

from .load import load, method_from_config, read_tensors
from .save import named_tensors, save, to_exportable, type_of

__all__ = ["load", "method_from_config", "named_tensors", "read_tensors", "save", "to_exportable", "type_of"]
