"""C3A: circular convolutions of the input's blocks (arXiv:2407.19342)."""

import math
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from ...bounds import Bounds, Count
from ...model import Weight
from ..base import Method
from ..random_projections import dft_basis, recomputed
from ..targets import Target, each_layer, group_by_value, layer_keys, targets, wrap_weights


class C3AWeight(Weight):
    """x @ w + (kernel correlated with x around blocks of b) / D, by their Fourier transforms."""

    w: Any  # [D, F] frozen
    kernel: Array  # [F / b, D / b, b]

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + recomputed(correlate)(x, self.kernel)


def correlate(x: Array, kernel: Array) -> Array:
    """y[m, p] = sum over n, q of kernel[m, n, (q - p) mod b] x[n, q] / D for x [..., D] in blocks of b."""
    (M, N, b), lead = kernel.shape, x.shape[:-1]
    half = jnp.arange(b // 2 + 1)  # the other frequencies are their conjugates
    cos, sin = (wave.astype(x.dtype) for wave in dft_basis(b, half))
    blocks, kernel = x.reshape(*lead, N, b), kernel / x.shape[-1]
    x_re, x_im, k_re, k_im = blocks @ cos, blocks @ sin, kernel @ cos, kernel @ sin
    times = partial(jnp.einsum, "...nk,mnk->...mk")
    once = jnp.where((half == 0) | (2 * half == b), 1 / b, 2 / b).astype(x.dtype)
    re, im = times(x_re, k_re) + times(x_im, k_im), times(x_im, k_re) - times(x_re, k_im)
    return ((re * once) @ cos.T + (im * once) @ sin.T).reshape(*lead, M * b)


class C3A(Method):
    """W + block circulant matrices / D, with kernels as xavier's at first: no identity (arXiv:2407.19342)."""

    demo = False
    identity = False
    lr_multiplier = 100.0

    block: Count = 256  # or the largest common divisor of D and F below
    where: str = "linear"
    blocks: Annotated[tuple[tuple[str, int], ...], Bounds(1)] = ()  # rules -> block, for some matrices or layers

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, t: Target, block: int) -> dict[str, Array]:
            D, F = t.shape
            b, most = divisor(D, F, block), (6 / (D + F)) ** 0.5
            return {"kernel": jax.random.uniform(key, (F // b, D // b, b), minval=-most, maxval=most)}

        found = group_by_value(self.blocks, self.block, targets(self.where, params, 2, "c3a"), params, "block rule")
        return {t.key: each_layer(t, partial(one, t=t, block=b), layer_keys(key, t)) for t, b in found}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        by_block: dict[int, dict[str, Any]] = {}  # layers of one stack may differ: then each block has its own weight
        for key, arrays in trainable.items():
            by_block.setdefault(arrays["kernel"].shape[-1], {})[key] = arrays
        for part in by_block.values():
            params = wrap_weights(params, part, C3AWeight)
        return params


def divisor(D: int, F: int, most: int) -> int:
    """The largest common divisor of D and F that is not above `most`."""
    both = math.gcd(D, F)
    return next(b for b in range(min(most, both), 0, -1) if both % b == 0)
