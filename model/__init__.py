"""The decoder and its parts: configuration, parameters, attention, sharding, loss, generation, rules over paths."""

from .config import Config
from .generate import Sampling, check_prompt_lengths, generate, max_text_length
from .init import init, resize, shapes_of
from .layout import restack
from .loss import token_losses, token_scores
from .presets import presets
from .rope import Rope
from .transformer import Context, Transformer, forward
from .weight import Weight, matmul, static

__all__ = [
    "Config", "Context", "Rope", "Sampling", "Transformer", "Weight", "check_prompt_lengths", "forward", "generate",
    "init", "matmul", "max_text_length", "presets", "resize", "restack", "shapes_of", "static", "token_losses",
    "token_scores",
]  # fmt: skip
