"""VeRA: two vectors a matrix, around random projections that all share (arXiv:2310.11454)."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ...bounds import Drawn, Real, Size
from ...model import Weight, static
from ..base import Method
from ..random_projections import hash_uniform, recomputed, widest
from ..targets import each_matrix, wrap_weights


class VeRAWeight(Weight):
    """x @ w + ((x @ A) * d) @ B * b; A and B are made in the product, and again in its backward pass."""

    w: Any  # [D, F] frozen
    d: Array  # [R]
    b: Array  # [F]
    method: Any = static()
    fan: int = static()  # the largest D of all targets

    def __rmatmul__(self, x: Array) -> Array:
        def update(x: Array, d: Array, b: Array) -> Array:
            a, c = (p.astype(x.dtype) for p in projections(self.method, x.shape[-1], b.shape[0], self.fan))
            return ((x @ a.T) * d) @ (c.T * b)

        return x @ self.w + recomputed(update)(x, self.d, self.b)


class VeRA(Method):
    """W + A diag(d) B diag(b), A [D, R] and B [R, F] random, d = `d_initial` and b = 0 at first (arXiv:2310.11454)."""

    demo = False
    lr_multiplier = 50.0

    rank: Size = 256
    d_initial: Real = 0.1
    where: str = "linear"
    seed: Drawn = None  # of A and B; None: the run's seed, or 0 outside a run
    given: Any = None  # a Given of HF's vera_A as `a` and vera_B as `b`, in place of the seed's

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            return {"d": jnp.full(self.rank, self.d_initial), "b": jnp.zeros(F)}

        return each_matrix(key, params, self.where, one, "vera")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        fan = widest(params, trainable)[0]
        return wrap_weights(params, trainable, lambda w, **t: VeRAWeight(w, **t, method=self, fan=fan))


def projections(method: VeRA, D: int, F: int, fan: int = 0) -> tuple[Array, Array]:
    """(vera_A [R, D], vera_B [F, R]) as HF PEFT has them, of a matrix or of the largest: uniform as kaiming's."""
    if method.given is not None:
        return jnp.asarray(method.given["a"])[:, :D], jnp.asarray(method.given["b"])[:F]
    a, b = (
        hash_uniform(method.seed or 0, "a", (D, method.rank)).T,
        hash_uniform(method.seed or 0, "b", (F, method.rank)),
    )
    return (6 / (fan or D)) ** 0.5 * a, (6 / method.rank) ** 0.5 * b
