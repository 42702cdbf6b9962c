"""Rank-stabilised LoRA (arXiv:2312.03732)."""

from typing import Any

from .lora import LoRA


class RsLoRA(LoRA):
    """W + (alpha / sqrt(rank)) A B: the size of the update does not shrink as the rank grows (arXiv:2312.03732)."""

    demo = False

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / rank**0.5
