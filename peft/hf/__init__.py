"""Other people's adapters: Hugging Face PEFT folders to (method, trainable), and back."""

from .adapter import load, method_from_config, save, type_of
from .write import plain

__all__ = ["load", "method_from_config", "plain", "save", "type_of"]
