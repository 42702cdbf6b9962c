"""Other people's checkpoints: Hugging Face model folders to (Config, params), and back."""

from .load import load, save
from .config import config_from_hf, config_to_hf
from .files import fetch_checkpoint

__all__ = ["config_from_hf", "config_to_hf", "fetch", "load", "save"]
