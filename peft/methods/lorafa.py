"""LoRA-FA: LoRA whose A stays as it was drawn (arXiv:2308.03303)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import Drawn
from ...model.tree import canonical, cut_key
from ..base import Method
from ..random_projections import sides
from .lora import LoRA
from ..targets import Target, each_layer, layer_keys, uniform


class LoRAFA(LoRA):
    """W + (alpha / rank) A B: B = 0 at first and trains, A [D, R] in +-D^-1/2 does not (arXiv:2308.03303)."""

    demo = False
    padded = Method.padded  # another rank draws another A

    seed: Drawn = None  # of A, which is drawn where it is needed; None: the run's seed, or 0 outside a run

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return {name: {"b": jnp.zeros_like(t["b"])} for name, t in super().init(key, params).items()}

    def drawn(self, params: Any, trainable: Any) -> dict[str, Any]:
        """The tree of a LoRA, with the A of every target in it."""

        def one(key: str, b: Array) -> Array:
            (path, cut), (name, layers), stacked = cut_key(key), canonical(key), b.ndim == 3
            (R, F), (D, _) = b.shape[-2:], sides(params, key)
            t = Target(key, path, name, range(len(b)) if stacked and not cut else layers, stacked, (D, F))
            return each_layer(t, lambda k: uniform(k, (D, R), D), layer_keys(jax.random.key(self.seed or 0), t, "a"))

        return {key: t | {"a": one(key, t["b"])} for key, t in trainable.items()}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return super().bind(params, self.drawn(params, trainable))
