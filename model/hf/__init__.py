"""Other people's checkpoints: Hugging Face model folders to (Config, params), and back."""

from .config import config_from_hf, config_to_hf
from .files import fetch_checkpoint
from .load import load, save

__all__ = ["config_from_hf", "config_to_hf", "fetch_checkpoint", "load", "save"]
