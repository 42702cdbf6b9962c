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
from ..hf_spec import IDENTITY, HFSpec, Key, by_suffix
from ..random_projections import dft_basis, recomputed
from ..targets import Target, init_targets, targets_by_rule, wrap_weights


class C3AWeight(Weight):
    """x @ w + (the kernel correlated with x around blocks of b) / D, by Fourier transforms of both."""

    w: Any  # [D, F] frozen
    kernel: Array  # [F / b, D / b, b]

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w + recomputed(correlate)(x, self.kernel)


class C3A(Method):
    """W + block circulant matrices / D, with kernels as xavier's at first: no identity (arXiv:2407.19342).

    The kernel [F / b, D / b, b] is uniform in +-(6 / (D + F))^1/2. HF PEFT: C3A.
    """

    demo = False
    identity = False
    lr_multiplier = 100.0

    block: Count = 256  # b, or the largest common divisor of D and F below it
    where: str = "linear"
    blocks: Annotated[tuple[tuple[str, int], ...], Bounds(1)] = ()  # rules -> block, for some matrices or layers

    hf = HFSpec(
        "C3A",
        keys={"block_size": Key(256, "block", exceptions="block_size_pattern", rules="blocks", find=by_suffix)},
        neutral=("init_c3a_weights",),
        tensors=IDENTITY.tensors(kernel="c3a_kernel"),
        default_targets={"gpt2": ("mlp.c_proj",)},
        conv1d=False,
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def kernel(key: Array, target: Target, block: int) -> dict[str, Array]:
            D, F = target.shape
            common, limit = math.gcd(D, F), (6 / (D + F)) ** 0.5
            b = next(b for b in range(min(block, common), 0, -1) if common % b == 0)
            return {"kernel": jax.random.uniform(key, (F // b, D // b, b), minval=-limit, maxval=limit)}

        picked = targets_by_rule(self.where, params, self.name, self.blocks, self.block, "block rule")
        return init_targets(key, picked, kernel)

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        by_block: dict[int, dict[str, Any]] = {}  # layers of one stack may differ: then each block has its own weight
        for key, arrays in trainable.items():
            by_block.setdefault(arrays["kernel"].shape[-1], {})[key] = arrays
        for part in by_block.values():
            params = wrap_weights(params, part, C3AWeight)
        return params


def correlate(x: Array, kernel: Array) -> Array:
    """Return y[m, p] = sum over n, q of kernel[m, n, (q - p) mod b] x[n, q] / D, for x [..., D] in blocks of b."""
    (M, N, b), lead = kernel.shape, x.shape[:-1]
    half = jnp.arange(b // 2 + 1)  # the other frequencies are their conjugates
    cos, sin = (wave.astype(x.dtype) for wave in dft_basis(b, half))
    blocks, kernel = x.reshape(*lead, N, b), kernel / x.shape[-1]
    x_re, x_im, k_re, k_im = blocks @ cos, blocks @ sin, kernel @ cos, kernel @ sin
    times = partial(jnp.einsum, "...nk,mnk->...mk")
    weight = jnp.where((half == 0) | (2 * half == b), 1 / b, 2 / b).astype(x.dtype)
    re, im = times(x_re, k_re) + times(x_im, k_im), times(x_im, k_re) - times(x_re, k_im)
    return ((re * weight) @ cos.T + (im * weight) @ sin.T).reshape(*lead, M * b)
