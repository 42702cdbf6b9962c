"""VeRA: two trained vectors a matrix, around random projections that all matrices share (arXiv:2310.11454)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from ...bounds import Drawn, Real, Size
from ...model import Weight, static
from ..base import Method
from ..hf_spec import IDENTITY, HFSpec, Key, SharedProjections
from ..random_projections import hash_uniform, recomputed, widest
from ..targets import Target, wrap_weights


class VeRAWeight(Weight):
    """x @ w + ((x @ A) * d) @ B * b. A and B are drawn inside the product, and again in its backward pass."""

    w: Any  # [D, F] frozen
    d: Array  # [R]
    b: Array  # [F]
    method: Any = static()
    fan: int = static()  # the largest D of all targets

    def __rmatmul__(self, x: Array) -> Array:
        @recomputed
        def update(x: Array, d: Array, b: Array) -> Array:
            A, B = (p.astype(x.dtype) for p in projections(self.method, x.shape[-1], b.shape[0], self.fan))
            return ((x @ A.T) * d) @ (B.T * b)

        return x @ self.w + update(x, self.d, self.b)


def _draw_as_hf(rng: Any, method: Any, D: int, F: int) -> tuple[Any, Any]:
    """Draw (vera_A [R, D], vera_B [F, R]) of the largest matrix as HF PEFT does."""
    R = method.rank
    bound = lambda fan: 3**0.5 * (2**0.5 / fan**0.5)  # noqa: E731
    return rng.uniform((R, D), -bound(D), bound(D)), rng.uniform((F, R), -bound(R), bound(R))


class VeRA(Method):
    """W + A diag(d) B diag(b), A [D, R] and B [R, F] random, d = `d_initial` and b = 0 at first (arXiv:2310.11454).

    d [R] and b [F] train. A and B are corners of two arrays uniform in +-(6 / fan)^1/2. HF PEFT: VERA.
    """

    demo = False
    lr_multiplier = 50.0
    axes: ClassVar = {"d": "R", "b": "F"}

    rank: Size = 256
    d_initial: Real = 0.1
    where: str = "linear"
    seed: Drawn = None  # of A and B; None: the run's seed, or 0 outside a run
    given: Any = None  # FixedArrays with HF's vera_A as `a` and vera_B as `b`, in place of those of the seed

    hf = HFSpec(
        "VERA",
        keys={
            **{"r": Key(256, "rank"), "d_initial": Key(0.1, "d_initial"), "projection_prng_key": Key(0, "seed")},
            "save_projection": True,
        },
        neutral=("vera_dropout",),
        tensors=IDENTITY.tensors(b="vera_lambda_b", d="vera_lambda_d"),
        shared=SharedProjections(("vera_A", "vera_B"), lambda m, D, F: projections(m, D, F), _draw_as_hf),
        write=lambda m: {"save_projection": SharedProjections.stored(m)},
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        return {"d": jnp.full(self.rank, self.d_initial), "b": jnp.zeros(target.shape[1])}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        fan = widest(params, trainable)[0]
        return wrap_weights(params, trainable, lambda w, **t: VeRAWeight(w, **t, method=self, fan=fan))


def projections(method: VeRA, D: int, F: int, fan: int = 0) -> tuple[Array, Array]:
    """Return HF PEFT's (vera_A [R, D], vera_B [F, R]), of a matrix or of the largest: Kaiming uniform."""
    if method.given is not None:
        return jnp.asarray(method.given["a"])[:, :D], jnp.asarray(method.given["b"])[:F]
    seed, R = method.seed or 0, method.rank
    a, b = hash_uniform(seed, "a", (D, R)).T, hash_uniform(seed, "b", (F, R))
    return (6 / (fan or D)) ** 0.5 * a, (6 / R) ** 0.5 * b
