"""LLaMA-Adapter: the upper layers attend to a learned prompt behind a gate that starts shut (arXiv:2303.16199)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Count, Size
from ...model import Weight, static
from ...model.tree import named, nested
from ..base import Method
from ..targets import each_matrix, whole


class GatedPrompt(Weight):
    """States that a layer's queries attend to apart from the text; added before the output projection or behind it."""

    linear = False

    prompt: Array  # [P, D]
    gate: Array  # [1]
    behind: bool = static(default=False)


class LLaMAAdapter(Method):
    """o(attn(x) + gate softmax(q k(prompt)^T) v(prompt)), prompt N(0, 1), gate 0 at init (arXiv:2303.16199).

    No weight decay: the prompt holds states; the gate says how much of them is added.
    """

    rate = 100.0
    decayed = ""
    demo = False

    tokens: Size = 10
    layers: Count = 30  # the topmost ones, all if there are fewer
    behind: bool = False  # added behind o, as HF PEFT does in GPT-2

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, width: int, D: int) -> dict[str, Array]:
            if self.behind and width != D:
                raise InputError(f"llamaadapter: behind=True wants heads of {D} together, this base's have {width}")
            return {"prompt": jax.random.normal(key, (self.tokens, D)), "gate": jnp.zeros(1)}

        return each_matrix(key, params, f"layers/[-{self.layers}:]/attn/o", one, "llamaadapter", "prompt")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        found, flat = whole(params, trainable), named(params)
        new = {path[:-1] + "prompt": GatedPrompt(**arrays, behind=self.behind) for path, _, arrays in found}
        if twice := next((path for path in new if path in flat), ""):
            raise InputError(f"chain: {twice} has a prompt of an earlier method; keep one of them")
        return nested(flat | new)
