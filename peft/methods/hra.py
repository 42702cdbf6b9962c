"""HRA: a chain of Householder reflections of the input (arXiv:2405.17484)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import Size
from ...model import Weight, static
from ..base import Method
from ..hf_spec import IDENTITY, HFSpec, Key
from ..targets import Target, uniform_fan_in, wrap_weights


def normalized(u: Array) -> Array:
    """Return the columns of u [D, ...] at length 1; a column of zeros stays."""
    return u * jax.lax.rsqrt(jnp.maximum(jnp.square(u).sum(0), 1e-24))


def orthonormal(u: Array) -> Array:
    """Return the columns of u [D, R] made orthonormal by Gram-Schmidt."""
    columns = []
    for i in range(u.shape[1]):
        columns.append(normalized(u[:, i]))
        u = u - jnp.outer(columns[i], columns[i] @ u)
    return jnp.stack(columns, 1)


class HRAWeight(Weight):
    """(x H_r ... H_1) @ w with H_i = I - 2 u_i u_i^T / |u_i|^2; u_i = 0 reflects nothing."""

    w: Any  # [D, F] frozen
    u: Array  # [D, R]
    gram_schmidt: bool = static(default=False)

    def __rmatmul__(self, x: Array) -> Array:
        u = self.u.astype(jnp.float32)
        if self.gram_schmidt:  # orthogonal reflections commute, so they are one product
            u = orthonormal(u).astype(x.dtype)
            return (x - 2 * (x @ u) @ u.T) @ self.w
        u = normalized(u).astype(x.dtype)
        for i in reversed(range(u.shape[1])):
            x = x - 2 * (x @ u[:, i : i + 1]) * u[:, i]
        return x @ self.w


class HRA(Method):
    """W turned by `rank` reflections, which undo each other in pairs at first (arXiv:2405.17484).

    u [D, R] is uniform in +-(R / 2)^-1/2, with columns in equal pairs. No weight decay: a reflection does not depend on
    the length of u. HF PEFT: HRA.
    """

    demo = False
    decay_rule = ""
    axes: ClassVar = {"u": "DR"}

    rank: Size = 8  # even, or the model does not start as the base
    where: str = "linear"
    gram_schmidt: bool = False  # make the reflections orthogonal to each other; then they cannot undo each other

    hf = HFSpec(
        "HRA",
        keys={"r": Key(8, "rank"), "apply_GS": Key(False, "gram_schmidt")},
        neutral=("hra_init_weights",),
        tensors=IDENTITY.tensors(u="hra_u"),
        conv1d=False,
    )

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.rank % 2 == 0 and not self.gram_schmidt

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        D = target.shape[0]
        if self.gram_schmidt:
            return {"u": uniform_fan_in(key, (D, self.rank), self.rank)}
        half = (self.rank + 1) // 2
        return {"u": jnp.repeat(uniform_fan_in(key, (D, half), half), 2, axis=1)[:, : self.rank]}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, trainable, lambda w, **t: HRAWeight(w, **t, gram_schmidt=self.gram_schmidt))
