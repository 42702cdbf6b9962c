"""FourierFT: a few coefficients of the update's Fourier transform (arXiv:2405.03003)."""

from functools import lru_cache, partial
from typing import Annotated, Any

import jax
import numpy as np
from jax import Array

from ...bounds import Bounds, Count, Drawn, Real
from ...model import Weight, static
from ..base import Method
from ..random_projections import dft_basis, recomputed
from ..targets import Target, each_layer, group_by_value, layer_keys, targets, wrap_weights


class FourierFTWeight(Weight):
    """x @ w + scale x @ Re(ifft2(spectrum at its places)): n waves of the input become n waves of the output."""

    w: Any  # [D, F] frozen
    spectrum: Array  # [n]
    scale: float = static()
    seed: int = static()

    def __rmatmul__(self, x: Array) -> Array:
        y = x @ self.w
        D, F = x.shape[-1], y.shape[-1]
        row, column = np.divmod(places(self.seed, D * F, self.spectrum.shape[0]), D)  # of W [out, in]

        def update(x: Array, s: Array) -> Array:
            def wave(a: Array, b: Array) -> Array:
                a, b = (a * (self.scale / (D * F))).astype(x.dtype) * s, b.astype(x.dtype).T
                return x @ a @ b if 2 * len(s) < min(D, F) else x @ (a @ b)  # more waves than a side: no short cut

            (cos_in, sin_in), (cos_out, sin_out) = dft_basis(D, column), dft_basis(F, row)
            return wave(cos_in, cos_out) - wave(sin_in, sin_out)

        return y + recomputed(update)(x, self.spectrum)


class FourierFT(Method):
    """W + scale Re(ifft2(S)), S with n entries that are not 0, normal at first: no identity (arXiv:2405.03003)."""

    demo = False
    identity = False
    lr_multiplier = 50.0

    n: Count = 1000  # at most the entries of the matrix
    scale: Real = 150.0
    where: str = "linear"
    seed: Drawn = None  # of the places, which matrices of one shape share; None: the run's seed, or 0 outside a run
    ns: Annotated[tuple[tuple[str, int], ...], Bounds(1)] = ()  # rules -> n, for some matrices or layers

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        def one(key: Array, t: Target, n: int) -> dict[str, Array]:
            D, F = t.shape
            n = min(n, D * F)
            std = min(1.0, D * F / (2 * self.scale * (n * D) ** 0.5))  # on sides below 400 the update would drown w
            return {"spectrum": std * jax.random.normal(key, (n,))}

        found = group_by_value(self.ns, self.n, targets(self.where, params, 2, "fourierft"), params, "n rule")
        return {t.key: each_layer(t, partial(one, t=t, n=n), layer_keys(key, t)) for t, n in found}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(
            params, trainable, lambda w, **t: FourierFTWeight(w, **t, scale=self.scale, seed=self.seed or 0)
        )


@lru_cache
def places(seed: int, size: int, n: int) -> np.ndarray:
    """The first n entries of torch's randperm(size) by manual_seed(seed): places row by row in W [out, in]."""
    draws, moved, found = np.random.RandomState(seed).randint(0, 2**32, n, np.uint32), {}, np.empty(n, np.int64)
    for i in range(n):  # Fisher and Yates' shuffle: entry i is final after step i
        j = i + int(draws[i]) % (size - i)
        found[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return found
