"""FourierFT: a few coefficients of the update's Fourier transform (arXiv:2405.03003)."""

from functools import lru_cache
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from jax import Array

from ...bounds import Bounds, Count, Drawn, Real
from ...model import Weight, static
from ..base import Method
from ..hf_spec import IDENTITY, WHOLE, HFSpec, Key, by_suffix
from ..random_projections import dft_basis, recomputed
from ..targets import Target, init_targets, targets_by_rule, wrap_weights


class FourierFTWeight(Weight):
    """x @ w + scale x @ Re(ifft2(S)), where S has the spectrum at n places and is 0 elsewhere."""

    w: Any  # [D, F] frozen
    spectrum: Array  # [n]
    scale: float = static()
    seed: int = static()

    def __rmatmul__(self, x: Array) -> Array:
        y = x @ self.w
        D, F = x.shape[-1], y.shape[-1]
        row, column = np.divmod(places(self.seed, D * F, self.spectrum.shape[0]), D)  # of W [out, in]

        @recomputed
        def update(x: Array, s: Array) -> Array:
            def wave(a: Array, b: Array) -> Array:
                a, b = (a * (self.scale / (D * F))).astype(x.dtype) * s, b.astype(x.dtype).T
                return x @ a @ b if 2 * len(s) < min(D, F) else x @ (a @ b)  # the cheaper order

            (cos_in, sin_in), (cos_out, sin_out) = dft_basis(D, column), dft_basis(F, row)
            return wave(cos_in, cos_out) - wave(sin_in, sin_out)

        return y + update(x, self.spectrum)


class FourierFT(Method):
    """W + scale Re(ifft2(S)), S with n entries that are not 0, normal at first: no identity (arXiv:2405.03003).

    The entries [n] have std 1, or less on small matrices. HF PEFT: FOURIERFT.
    """

    demo = False
    identity = False
    lr_multiplier = 50.0
    axes: ClassVar = {"spectrum": "n"}

    n: Count = 1000  # at most the entries of the matrix
    scale: Real = 150.0
    where: str = "linear"
    seed: Drawn = None  # of the places, which matrices of one shape share; None: the run's seed, or 0 outside a run
    ns: Annotated[tuple[tuple[str, int], ...], Bounds(1)] = ()  # rules -> n, for some matrices or layers

    hf = HFSpec(
        "FOURIERFT",
        keys={
            "n_frequency": Key(1000, "n", exceptions="n_frequency_pattern", rules="ns", find=by_suffix),
            "scaling": Key(150.0, "scale"),
            "random_loc_seed": Key(777, "seed", WHOLE),
        },
        tensors=IDENTITY.tensors(spectrum="fourierft_spectrum"),
        default_targets={"gpt2": ("mlp.c_proj",)},
        own_bias="fourier_only",
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def spectrum(key: Array, target: Target, n: int) -> dict[str, Array]:
            D, F = target.shape
            n = min(n, D * F)
            std = min(1.0, D * F / (2 * self.scale * (n * D) ** 0.5))  # on sides below 400 the update would drown w
            return {"spectrum": std * jax.random.normal(key, (n,))}

        picked = targets_by_rule(self.where, params, self.name, self.ns, self.n, "n rule")
        return init_targets(key, picked, spectrum)

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        settings = {"scale": self.scale, "seed": self.seed or 0}
        return wrap_weights(params, trainable, lambda w, **t: FourierFTWeight(w, **t, **settings))


@lru_cache
def places(seed: int, size: int, n: int) -> np.ndarray:
    """Return the first n of torch's randperm(size) after manual_seed(seed): places row by row in W [out, in]."""
    draws, moved, first = np.random.RandomState(seed).randint(0, 2**32, n, np.uint32), {}, np.empty(n, np.int64)
    for i in range(n):  # Fisher-Yates shuffle: entry i is final after step i
        j = i + int(draws[i]) % (size - i)
        first[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return first
