"""Tokenizers: text to ids and back, trained here or loaded through transformers; chats by a tokenizer's template."""

from .added_tokens import add_special, add_tokens
from .huggingface import for_transformers
from .load import load_tokenizer
from .sentencepiece import train_tokenizer
from .tokenizer import SPECIAL, Tokenizer

__all__ = [
    "SPECIAL", "Tokenizer", "add_special", "add_tokens", "for_transformers", "load_tokenizer", "train_tokenizer",
]  # fmt: skip
