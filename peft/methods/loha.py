"""LoHa: an elementwise product of two low-rank updates (FedPara, arXiv:2108.06098)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, random

from ...bounds import Real, Size
from ...model import Weight
from ..base import Method
from ..hf_spec import TRANSPOSED, HFSpec, Key
from ..random_projections import recomputed
from ..targets import Target, uniform_fan_in, wrap_weights


class LoHaWeight(Weight):
    """x @ (w + (a1 b1) * (a2 b2)), whose update has a rank of up to R^2; b1 has the scale in it."""

    w: Any  # [D, F] frozen
    a1: Array  # [D, R]
    b1: Array  # [R, F]
    a2: Array  # [D, R]
    b2: Array  # [R, F]

    def __rmatmul__(self, x: Array) -> Array:
        update = recomputed(lambda x, a1, b1, a2, b2: x @ ((a1 @ b1) * (a2 @ b2)))
        return x @ self.w + update(x, self.a1, self.b1, self.a2, self.b2)


class LoHa(Method):
    """W + (alpha / rank) (A1 B1) * (A2 B2), with A2 = 0 at first (arXiv:2108.06098).

    A1, A2 [D, R], B1, B2 [R, F]; A1 is uniform in +-D^-1/2, B1 and B2 in +-R^-1/2. HF PEFT: LOHA.
    """

    demo = False
    axes: ClassVar = {"a1": "DR", "b1": "RF", "a2": "DR", "b2": "RF"}

    rank: Size = 8
    alpha: Real = 8.0
    where: str = "linear"

    hf = HFSpec(
        "LOHA",
        keys={"r": Key(8, "rank", exceptions="rank_pattern"), "alpha": Key(8.0, "alpha", exceptions="alpha_pattern")},
        neutral=("rank_dropout", "module_dropout", "use_effective_conv2d"),
        tensors=TRANSPOSED.tensors(b1="hada_w1_a", a1="hada_w1_b", b2="hada_w2_a", a2="hada_w2_b"),
        conv1d=False,
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        D, F = target.shape
        keys, R = random.split(key, 3), self.rank
        a1 = uniform_fan_in(keys[0], (D, R), D)
        b1, b2 = (uniform_fan_in(k, (R, F), R) for k in keys[1:])
        return {"a1": a1, "b1": b1, "a2": jnp.zeros((D, R)), "b2": b2}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        scale = self.alpha / self.rank
        return wrap_weights(params, {k: t | {"b1": scale * t["b1"]} for k, t in trainable.items()}, LoHaWeight)
