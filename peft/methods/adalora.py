"""AdaLoRA: low-rank updates that share one budget of ranks, left to the matrices that need them (arXiv:2303.10512)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...bounds import Count, Decay, Real, Size
from .allocator import allocate, budget
from ..base import Method
from .lora import LoRA
from ..targets import Target, by_value, each_layer, layer_keys, targets


class AdaLoRA(LoRA):
    """W + alpha / init_rank A diag(e) B, e = 0 at first; step by step the least ranks get e = 0 (arXiv:2303.10512)."""

    demo = False
    padded = Method.padded  # a rank is a budget

    rank: Size = 8  # of a matrix at the end, on average
    alpha: Real = 8.0
    init_rank: Size = 12
    tinit: float = 0.0  # steps before the first rank goes; below 1: a part of all steps
    tfinal: float = 0.0  # steps at the end in which the choice stays; likewise
    every: Count = 1  # steps from one choice to the next
    b1: Decay = 0.85  # of the average of |p g|
    b2: Decay = 0.85  # of the average distance from it
    orthogonality: float = 0.5  # weight in the loss of |A^T A - I| and |B B^T - I|, on average over the matrices

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, t: Target, R: int) -> dict[str, Array]:
            (D, F), (k, m) = t.shape, jax.random.split(key)
            a, b = jax.random.normal(k, (D, R)), jax.random.normal(m, (R, F))
            return {"a": 0.02 * a, "b": 0.02 * b, "e": jnp.zeros(R)}

        found = by_value(self.ranks, self.init_rank, targets(self.where, params, 2, "adalora"), params, "rank rule")
        return {t.key: each_layer(t, partial(one, t=t, R=r), layer_keys(key, t)) for t, r in found}

    def scale(self, rank: int, alpha: Any) -> Any:
        return alpha / (self.init_rank + 1e-5)  # also where ranks are gone

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scaled = {k: {"a": t["a"] * t["e"][..., None, :], "b": t["b"]} for k, t in trainable.items()}
        return super().bind(params, scaled)

    def penalty(self, trainable: Any) -> Any:
        def length(a: Array) -> Array:
            square = jnp.square(a.mT @ a - jnp.eye(a.shape[-1])).sum((-2, -1)).ravel()
            return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # a slope at 0 too

        lengths = [length(a) for t in trainable.values() for a in (t["a"], t["b"].mT)]
        return self.orthogonality * jnp.concatenate(lengths).mean()

    def transform(self, steps: int) -> optax.GradientTransformation:
        """Ends ranks: see `allocate`."""
        return allocate(budget(self.rank, self.tinit, self.tfinal, steps, self.every), self.b1, self.b2)
