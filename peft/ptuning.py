"""P-tuning: a prompt whose rows a small MLP makes (arXiv:2103.10385)."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
from jax import Array

from ..model import Context
from ..model.tree import named, replace
from .base import Method
from .prompt import PromptTable
from .targets import uniform


class PTuning(Method):
    """[mlp(prompt); embed(ids)], prompt N(0, 1), mlp D -> hidden -> hidden -> D with ReLU (arXiv:2103.10385)."""

    identity = False
    rate = 10.0
    demo = False

    tokens: int = 20
    hidden: int = 0  # 0: D

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        D = named(params)["embed/table"].shape[1]
        h = self.hidden or D
        return {"embed/table": encoder(key, self.tokens, D, h, h, D)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        rows = encode(trainable["embed/table"], jax.nn.relu)
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], rows)})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)


def encoder(key: Array, P: int, *widths: int) -> dict[str, Array]:
    """prompt [P, D] ~ N(0, 1), and w1 [D, h], b1 [h], w2, ... from width to width as torch begins a Linear."""
    keys, arrays = iter(jax.random.split(key, 2 * len(widths))), {}
    for i, (D, F) in enumerate(pairwise(widths), 1):
        arrays |= {f"w{i}": uniform(next(keys), (D, F), D), f"b{i}": uniform(next(keys), (F,), D)}
    return {"prompt": jax.random.normal(next(keys), (P, widths[0]))} | arrays


def encode(arrays: dict[str, Array], act: Callable[[Array], Array]) -> Array:
    """What the encoder makes of its prompt: act(prompt @ w1 + b1) @ w2 + b2 and so on."""
    x = arrays["prompt"] @ arrays["w1"] + arrays["b1"]
    for i in range(2, (len(arrays) + 1) // 2):
        x = act(x) @ arrays[f"w{i}"] + arrays[f"b{i}"]
    return x
