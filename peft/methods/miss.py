"""MiSS: one small matrix shared by all shards of the input, and its variant Bat (arXiv:2409.15371)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Size
from ...model import Weight
from ..base import Method
from ..hf_spec import BOOL_OR_NAME, IDENTITY, HFSpec, Key, no_fields
from ..random_projections import recomputed
from ..targets import Target


class MiSSWeight(Weight):
    """x @ w + (the sum of x's shards of width R) @ s: entry (i, j) of w is increased by s[i mod R, j mod M]."""

    w: Any  # [D, F] frozen
    s: Array  # [R, M], M a divisor of F

    def __rmatmul__(self, x: Array) -> Array:
        y, R = x @ self.w, self.s.shape[-2]
        shards = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % R)]).reshape(*x.shape[:-1], -1, R)
        update = shards.sum(-2) @ self.s
        return y + jnp.tile(update, y.shape[-1] // update.shape[-1])


class MiSS(Method):
    """W + S repeated over the input, S [R, F] = 0 at first (arXiv:2409.15371).

    HF PEFT: MISS.
    """

    weight = MiSSWeight
    demo = False
    axes: ClassVar = {"s": "RF"}

    rank: Size = 64
    where: str = "linear"
    mini: int = 0  # columns of S, repeated over the output too; 0: as many as W has

    hf = HFSpec(
        "MISS",
        keys={"r": Key(64, "rank"), "mini_r": 1, "init_weights": Key(True, kind=BOOL_OR_NAME)},
        neutral=("miss_dropout",),
        tensors=IDENTITY.tensors(s="miss_block"),
        conv1d=False,
        read=lambda c, *_: {"mini": c["mini_r"]} if c["init_weights"] == "mini" else {},
        write=lambda m: {"mini_r": m.mini or 1, "init_weights": "mini" if m.mini else True},
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        F = target.shape[1]
        if self.mini and F % self.mini:
            raise InputError(f"miss: {target.path} has {F} outputs, wanted a multiple of mini={self.mini}")
        return {"s": jnp.zeros((self.rank, self.mini or F))}


class BatWeight(Weight):
    """x @ w with each block w_ja of R rows and R columns replaced by w_ja + s_a^T w_ja + s_a^T."""

    w: Any  # [D, F] frozen
    s: Array  # [F / R, R, R]

    def __rmatmul__(self, x: Array) -> Array:
        @recomputed
        def update(x: Array, w: Any, s: Array) -> Array:
            w = w.dense() if isinstance(w, Weight) else w
            blocks = jnp.einsum("api,jpao->jiao", s, w.reshape(-1, s.shape[1], *s.shape[:2]))
            return x @ (blocks + jnp.einsum("aoi->iao", s)).reshape(w.shape)

        return x @ self.w + update(x, self.w, self.s)


class MiSSBat(Method):
    """W + (W + 1) S by blocks of rank x rank, S [F / R, R, R] = 0 at first (arXiv:2409.15371).

    HF PEFT: MISS with init_weights="bat".
    """

    weight = BatWeight
    demo = False

    rank: Size = 8  # a divisor of D and of F
    where: str = "linear"

    hf = MiSS.hf.variant(flags={"init_weights": "bat"}, read=no_fields, write=lambda m: {"mini_r": 1})

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        (D, F), R = target.shape, self.rank
        if D % R or F % R:
            raise InputError(f"missbat: {target.path} is {list(target.shape)}, wanted multiples of rank={R}")
        return {"s": jnp.zeros((F // R, R, R))}
