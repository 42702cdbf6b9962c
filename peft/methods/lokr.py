"""LoKr: a Kronecker product as the update (LyCORIS, arXiv:2309.14859)."""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import Bounds, Real, Size
from ...model import Weight, static
from ..base import Method
from ..hf_spec import TRANSPOSED, HFSpec, Key
from ..targets import Target, uniform_fan_in, wrap_weights


class LoKrWeight(Weight):
    """x @ w + scale x @ kron(k1, k2). The product is never formed: x as [M, N] is multiplied by k2, then by k1."""

    w: Any  # [D, F] frozen, D = M N, F = P Q
    k1: Any = None  # [M, P], or
    a1: Any = None  # [M, R] and
    b1: Any = None  # [R, P]
    k2: Any = None  # [N, Q], or
    a2: Any = None  # [N, R] and
    b2: Any = None  # [R, Q]
    scale: float = static(default=1.0)

    def __rmatmul__(self, x: Array) -> Array:
        k1 = self.a1 @ self.b1 if self.k1 is None else self.k1
        k2 = self.a2 @ self.b2 if self.k2 is None else self.k2
        y = x.reshape(*x.shape[:-1], k1.shape[0], k2.shape[0]) @ k2
        y = jnp.moveaxis(jnp.moveaxis(y, -2, -1) @ k1, -1, -2)
        return x @ self.w + self.scale * y.reshape(*x.shape[:-1], -1)


class LoKr(Method):
    """W + (alpha / rank) kron(K1, K2), K1 = 0 at first; a large K2 is a product of rank `rank` (arXiv:2309.14859).

    K1 [M, P] and K2 [N, Q] with D = M N and F = P Q; K2 is uniform in +-N^-1/2. A factor that is larger than 2 rank is
    a product of A [., R] and B [R, .], uniform in +-(rows)^-1/2, with B of K1 = 0. HF PEFT: LOKR.
    """

    demo = False

    rank: Size = 8
    alpha: Real = 8.0
    factor: Annotated[int, Bounds(-1)] = -1  # M and P; -1: about the square root of D and F
    where: str = "linear"
    both: bool = False  # a large K1 is a product too

    hf = HFSpec(
        "LOKR",
        keys={
            "r": Key(8, "rank", exceptions="rank_pattern"),
            "alpha": Key(8.0, "alpha", exceptions="alpha_pattern"),
            "decompose_factor": Key(-1, "factor"),
            "decompose_both": Key(False, "both"),
        },
        neutral=("rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"),
        tensors=TRANSPOSED.tensors(
            k1="lokr_w1", b1="lokr_w1_a", a1="lokr_w1_b", k2="lokr_w2", b2="lokr_w2_a", a2="lokr_w2_b"
        ),
        conv1d=False,
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        D, F = target.shape
        (M, N), (P, Q), R = split(D, self.factor), split(F, self.factor), self.rank
        keys, k1 = jax.random.split(key, 3), {"k1": jnp.zeros((M, P))}
        if self.both and max(M, P) / 2 > R:
            k1 = {"a1": uniform_fan_in(keys[2], (M, R), M), "b1": jnp.zeros((R, P))}
        if max(N, Q) / 2 <= R:
            return k1 | {"k2": uniform_fan_in(keys[0], (N, Q), N)}
        return k1 | {"a2": uniform_fan_in(keys[0], (N, R), N), "b2": uniform_fan_in(keys[1], (R, Q), R)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, trainable, lambda w, **t: LoKrWeight(w, **t, scale=self.alpha / self.rank))


def split(n: int, factor: int) -> tuple[int, int]:
    """Return n as two factors: `factor` and the rest if it divides n, else the two nearest to each other.

    The smaller of those is at most `factor`, unless that is -1.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = n if factor == -1 else factor
    best = 1, n
    for m in range(2, math.isqrt(n) + 1):
        if n % m == 0 and best[0] < best[1] and m <= most and m + n // m <= sum(best):
            best = m, n // m
    return min(best), max(best)
