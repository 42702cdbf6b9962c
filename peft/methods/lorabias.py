"""LoRA whose B has a bias (HF PEFT's lora_bias)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from ...model.tree import cut_key, named
from .lora import LoRA, LoRAWeight
from ..targets import on_bias, wrap


class BiasedWeight(LoRAWeight):
    """x @ w + (x @ a) @ b + c, where the base has no bias that c could be added to; then no matrix does the same."""

    c: Any = None  # [F], scaled

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.c is None

    def __rmatmul__(self, x: Array) -> Array:
        y = super().__rmatmul__(x)
        return y if self.c is None else y + self.c


class LoRABias(LoRA):
    """x (W + s A B) + b + s c with s = alpha / rank, B = 0 and c [F] = 0 (HF PEFT's lora_bias; arXiv:2106.09685)."""

    weight: ClassVar[type[LoRAWeight]] = BiasedWeight
    demo = False

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        found = super().init(key, params)
        return {key: t | {"c": jnp.zeros_like(t["b"][..., 0, :])} for key, t in found.items()}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        s, flat = {key: self.factor(params, key, t) for key, t in trainable.items()}, named(params)
        c = {key: {"c": (s[key] * t["c"][..., None, :])[..., 0, :]} for key, t in trainable.items()}
        scaled = {key: {"a": t["a"], "b": s[key] * t["b"]} for key, t in trainable.items()}
        alone = {key: t | c[key] for key, t in scaled.items() if f"{cut_key(key)[0]}_bias" not in flat}
        return wrap(on_bias(params, c, lambda bias, c: bias + c), scaled | alone, self.weight)
