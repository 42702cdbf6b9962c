"""The MLP from which PTuning and PrefixMLP compute their rows in training."""

from collections.abc import Callable
from itertools import pairwise

import jax
from jax import Array

from ..targets import uniform_fan_in


def init_encoder(key: Array, P: int, *widths: int) -> dict[str, Array]:
    """Return prompt [P, D] ~ N(0, 1) and w1 [D, h], b1 [h], w2, ... from width to width, initialised as in torch."""
    keys, arrays = iter(jax.random.split(key, 2 * len(widths))), {}
    for i, (D, F) in enumerate(pairwise(widths), 1):
        arrays |= {f"w{i}": uniform_fan_in(next(keys), (D, F), D), f"b{i}": uniform_fan_in(next(keys), (F,), D)}
    return {"prompt": jax.random.normal(next(keys), (P, widths[0]))} | arrays


def encode(arrays: dict[str, Array], act: Callable[[Array], Array]) -> Array:
    """Return act(prompt @ w1 + b1) @ w2 + b2, and so on for more layers."""
    x = arrays["prompt"] @ arrays["w1"] + arrays["b1"]
    for i in range(2, (len(arrays) + 1) // 2):
        x = act(x) @ arrays[f"w{i}"] + arrays[f"b{i}"]
    return x
