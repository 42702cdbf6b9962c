"""Checkpoints of Hugging Face models: convert a model folder or hub id to (Config, params), and back."""

from .config import config_from_hf, config_to_hf
from .hub import fetch_checkpoint
from .load import load
from .save import save

__all__ = ["config_from_hf", "config_to_hf", "fetch_checkpoint", "load", "save"]
