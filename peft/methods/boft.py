"""BOFT: rotations of the input by butterfly factors (arXiv:2311.06243)."""

from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...bounds import Bounds, Count
from ...model import Weight
from ..base import Method
from ..targets import each_matrix, targets, wrap


def cayley(q: Array) -> Array:
    """(I - Q) (I + Q)^-1 of skew blocks [..., b, b] in fp32, where a solver works: orthogonal."""
    eye = jnp.eye(q.shape[-1])
    return jnp.linalg.solve(eye + q, eye - q)  # the two commute


def turned(x: Array, r: Array) -> Array:
    """Each block [b] of x [..., n b] times its matrix of r [n, b, b], or times the one of r [1, b, b]."""
    blocks, r = x.reshape(*x.shape[:-1], -1, r.shape[-1]), r.astype(x.dtype)
    return (blocks @ r[0] if len(r) == 1 else jnp.einsum("...nb,nbc->...nc", blocks, r)).reshape(x.shape)


def butterfly(D: int, run: int, half: int) -> np.ndarray:
    """Places in [0, D): of each run's pieces of length `half` first the even ones, then the odd ones."""
    pieces = np.arange(D).reshape(D // run, run // half, half)
    return np.concatenate([pieces[:, ::2], pieces[:, 1::2]], axis=1).ravel()


class BOFTWeight(Weight):
    """((x G_m ... G_1) @ w) * s, each G a blockwise rotation of what a butterfly gathers; r = 0 turns nothing."""

    w: Any  # [D, F] frozen
    r: Array  # [m, D / b, b, b]
    s: Array  # [F]

    def __rmatmul__(self, x: Array) -> Array:
        r = self.r.astype(jnp.float32)
        m, _, b, _ = r.shape
        for i in reversed(range(m)):
            turn = cayley((r[i] - r[i].swapaxes(1, 2)) / 2)
            if m == 1:
                x = turned(x, turn)
                continue
            places = butterfly(x.shape[-1], b * 2**i, b // 2)
            x = turned(x[..., np.argsort(places)], turn)[..., places]
        return (x @ self.w) * self.s


class BOFT(Method):
    """s * (W behind `factors` rotations of x by blocks), all the identity and s = 1 at first (arXiv:2311.06243).

    No weight decay: R is an angle, and any rotation keeps the lengths that decay would limit.
    """

    demo = False
    decayed = ""

    block: Count = 4  # the size of a block
    factors: Annotated[int, Bounds(1, 32)] = 1  # of the butterfly
    where: str = "linear"

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """R = 0 and s = 1 of every target; InputError for a matrix whose inputs the butterfly does not divide."""
        m, b = self.factors, self.block
        if m > 1 and b % 2:
            raise InputError(f"boft: block={b} has no halves to exchange; take an even one, or factors=1")
        for t in targets(self.where, params, 2, "boft"):
            if t.shape[0] % (b * 2 ** (m - 1)):
                wanted = f"a multiple of block * 2^(factors-1) = {b * 2 ** (m - 1)}"
                raise InputError(f"boft: {t.path} has {t.shape[0]} inputs, wanted {wanted}; change block or where")

        def one(key: Array, D: int, F: int) -> dict[str, Array]:
            return {"r": jnp.zeros((m, D // b, b, b)), "s": jnp.ones(F)}

        return each_matrix(key, params, self.where, one, "boft")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap(params, trainable, BOFTWeight, s=1.0)
