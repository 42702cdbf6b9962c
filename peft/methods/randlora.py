"""RandLoRA: a full-rank update, random products summed with trained weights (arXiv:2502.00987)."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...bounds import Drawn, Real, Size
from ...model import Weight, static
from ..base import Method
from ..hf_spec import IDENTITY, HFSpec, Key, SharedProjections
from ..random_projections import hash_uniform, recomputed, widest
from ..targets import Target, wrap_weights


class RandLoRAWeight(Weight):
    """x @ w + scale x @ a.T @ b.T if D <= F, else scale x @ b @ a; b is random, a is weighted by lam and gamma."""

    w: Any  # [D, F] frozen
    lam: Array  # [R, n]
    gamma: Array  # [n, min(D, F)]
    method: Any = static()
    least: int = static()  # min(D, F) of the largest D and F of all targets

    def __rmatmul__(self, x: Array) -> Array:
        y = x @ self.w
        D, F = x.shape[-1], y.shape[-1]

        @recomputed
        def update(x: Array, lam: Array, gamma: Array) -> Array:
            a, b = (p.astype(x.dtype) for p in projections(self.method, D, F, self.least))
            # Rows of a are ordered by rank first, columns of b by rank last, as in HF PEFT.
            a, b = (lam[:, :, None] * a * gamma).reshape(-1, min(D, F)), b.reshape(max(D, F), -1)
            return x @ a.T @ b.T if D <= F else x @ b @ a

        return y + self.method.alpha / self.method.rank * update(x, self.lam, self.gamma)


def _draw_as_hf(rng: Any, method: Any, D: int, F: int) -> tuple[Any, Any]:
    """Draw (randlora_A [R, 1, min(D, F)], randlora_B [max(D, F), n, R]) of the largest matrix as HF PEFT does."""
    R, low, high = method.rank, min(D, F), max(D, F)
    n = -(-low // R)
    if method.sparse:
        odds = 3 if method.sparse == "sparse" else low**0.5

        def draw(shape: tuple[int, ...]) -> Any:
            x = rng.uniform(shape, 0, 1)
            x = (x > 1 - 1 / (2 * odds)).astype(np.float32) - (x < 1 / (2 * odds))
            return x / x.std(ddof=1)

        return draw((R, 1, low)), draw((high, n, R))

    def kaiming(shape: tuple[int, ...], fan: int) -> Any:
        bound = 3**0.5 * ((1 / 3) ** 0.5 / fan**0.5)
        return rng.uniform_bf16(shape, -bound, bound)

    def unit(x: Any) -> Any:
        return rng.bf16(x / rng.bf16(x.std(ddof=1, dtype=np.float64)))

    a = kaiming((R, 1, low), low)
    return unit(a), unit(np.concatenate([kaiming((high, 1, R), R) for _ in range(n)], 1))


class RandLoRA(Method):
    """W + (alpha / rank) sum_j B_j diag(lam_j) A diag(gamma_j), A, B_j random, lam = 0 at first (arXiv:2502.00987).

    lam [R, n] and gamma [n, min(D, F)] train, gamma = 1 / max(n, min(D, F)) at first; A and B are of variance 1. No
    weight decay: both are scales of fixed directions. HF PEFT: RANDLORA.
    """

    demo = False
    decay_rule = ""
    axes: ClassVar = {"lam": "Rn", "gamma": "nM"}

    rank: Size = 32  # of each of n = ceil(min(D, F) / rank) products
    alpha: Real = 640.0
    where: str = "linear"
    seed: Drawn = None  # of A and B; None: the run's seed, or 0 outside a run
    sparse: str = ""  # A and B of -1, 0, 1 in ratio 1 : 4 : 1, "sparse", or 1 : 2 min(D, F)^1/2 - 2 : 1, "very_sparse"
    given: Any = None  # FixedArrays with HF's randlora_A as `a` and randlora_B as `b`, in place of those of the seed

    hf = HFSpec(
        "RANDLORA",
        keys={
            **{"r": Key(32, "rank"), "randlora_alpha": Key(640.0, "alpha"), "projection_prng_key": Key(0, "seed")},
            **{"save_projection": True, "sparse": False, "very_sparse": False},
        },
        neutral=("randlora_dropout",),
        tensors=IDENTITY.tensors(lam="randlora_lambda", gamma="randlora_gamma"),
        shared=SharedProjections(
            ("randlora_A", "randlora_B"), lambda m, D, F: projections(m, D, F), _draw_as_hf, copied=True
        ),
        read=lambda c, *_: {"sparse": next((key for key in ("very_sparse", "sparse") if c[key]), "")},
        write=lambda m: {
            "sparse": m.sparse == "sparse",
            "very_sparse": m.sparse == "very_sparse",
            "save_projection": SharedProjections.stored(m),
        },
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        D, F = target.shape
        shape = -(-min(D, F) // self.rank), min(D, F)
        return {"lam": jnp.zeros((self.rank, shape[0])), "gamma": jnp.full(shape, 1 / max(shape))}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        if self.sparse not in ("", "sparse", "very_sparse"):
            raise InputError(f"randlora: sparse is {self.sparse!r}, wanted '', 'sparse' or 'very_sparse'")
        least = min(widest(params, trainable))
        return wrap_weights(params, trainable, lambda w, **t: RandLoRAWeight(w, **t, method=self, least=least))


def projections(method: RandLoRA, D: int, F: int, least: int = 0) -> tuple[Array, Array]:
    """Return HF PEFT's (randlora_A [R, 1, min(D, F)], randlora_B [max(D, F), n, R]), of a matrix or of the largest."""
    low, high, R, seed = min(D, F), max(D, F), method.rank, method.seed or 0
    n = -(-low // R)
    if method.given is not None:
        return jnp.asarray(method.given["a"])[..., :low], jnp.asarray(method.given["b"])[:high, :n]
    a, b = hash_uniform(seed, "a", (low, R)).T[:, None], hash_uniform(seed, "b", (high, n, R))
    if not method.sparse:
        return 3**0.5 * a, 3**0.5 * b
    odds = {"sparse": 3.0, "very_sparse": (least or low) ** 0.5}[method.sparse]
    a, b = (odds**0.5 * jnp.where(jnp.abs(p) > 1 - 1 / odds, jnp.sign(p), 0) for p in (a, b))
    return a, b
