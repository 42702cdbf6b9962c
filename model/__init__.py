"""The decoder and what it stands on: config, parameters, attention, sharding, loss, generation, rules over paths."""

from .config import Config
from .generate import Sampling, generate
from .init import init, resize, restack, shapes_of
from .layers import check_prompt_lengths, max_text_length
from .loss import token_losses, token_scores
from .presets import presets
from .rope import Rope
from .transformer import Context, Transformer, forward
from .weight import Weight, matmul, static

__all__ = [
    "Config", "Context", "Rope", "Sampling", "Transformer", "Weight", "check_room", "forward", "generate", "init",
    "matmul", "presets", "resize", "restack", "room", "shapes_of", "static", "token_losses", "token_scores",
]  # fmt: skip
