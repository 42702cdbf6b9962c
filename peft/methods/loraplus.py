"""LoRA+: a higher learning rate for B (arXiv:2402.12354)."""

from typing import Any

import jax
import optax

from ...bounds import Positive
from .lora import LoRA


class LoRAPlus(LoRA):
    """LoRA whose B learns `ratio` times as fast as its A (arXiv:2402.12354)."""

    demo = False

    ratio: Positive = 16.0

    def transform(self, steps: int) -> optax.GradientTransformation:
        def faster(path: Any, update: Any) -> Any:
            return self.ratio * update if path[-1].key == "b" else update

        return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(faster, updates))
