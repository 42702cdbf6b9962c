"""OFT, a rotation of every block of the input (arXiv:2306.07280), and BOFT, a butterfly of such (arXiv:2311.06243)."""

from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...bounds import Bounds, Count
from ...model import Weight, static
from ..base import Method
from ..hf_spec import COLUMN, IDENTITY, WHOLE, HFSpec, Key
from ..targets import Target, wrap_weights


def cayley(q: Array) -> Array:
    """Return the orthogonal (I - Q) (I + Q)^-1 of skew-symmetric blocks [..., b, b], in fp32 as the solver needs."""
    eye = jnp.eye(q.shape[-1])
    return jnp.linalg.solve(eye + q, eye - q)  # the two commute


def neumann(q: Array, terms: int) -> Array:
    """Return I + 2Q + ... + 2Q^(terms-2) + Q^(terms-1), which approximates (I + Q) (I - Q)^-1 (arXiv:2506.19847).

    As in HF PEFT, 2 terms are I + 2Q, and 3 are as 4.
    """
    factors = [1, 2][:terms] if terms < 3 else [1, *[2] * (max(terms, 4) - 2), 1]
    eye = jnp.broadcast_to(jnp.eye(q.shape[-1]), q.shape)
    r = factors.pop() * eye
    while factors:
        r = jnp.matmul(r, q, precision="highest") + factors.pop() * eye
    return r


def rotate_blocks(x: Array, r: Array) -> Array:
    """Return x [..., n b] with each block [b] times its matrix of r [n, b, b], or times that of r [1, b, b]."""
    blocks, r = x.reshape(*x.shape[:-1], -1, r.shape[-1]), r.astype(x.dtype)
    return (blocks @ r[0] if len(r) == 1 else jnp.einsum("...nb,nbc->...nc", blocks, r)).reshape(x.shape)


class OFTWeight(Weight):
    """rotate_blocks(x) @ w, by skew-symmetric blocks Q with `r` above the diagonal; r = 0 is no rotation."""

    w: Any  # [D, F] frozen
    r: Array  # [D / b, b(b-1)/2], or [1, b(b-1)/2] for all blocks
    terms: int = static(default=5)
    eps: float = static(default=0.0)

    def __rmatmul__(self, x: Array) -> Array:
        v = self.r.astype(jnp.float32)
        if self.eps:  # the gradient is that at the projected value
            norm, limit = jnp.sqrt(2 * jnp.square(v).sum(1, keepdims=True)), self.eps / len(v) ** 0.5
            v = v - jax.lax.stop_gradient(v) + jax.lax.stop_gradient(v * (limit / jnp.maximum(norm, limit)))
        b = round((1 + (1 + 8 * v.shape[1]) ** 0.5) / 2)
        upper = jnp.zeros((len(v), b, b)).at[:, *jnp.triu_indices(b, 1)].set(v)
        q = upper - upper.swapaxes(1, 2)
        return rotate_blocks(x, neumann(q, self.terms) if self.terms else cayley(q)) @ self.w


class OFT(Method):
    """W behind a blockwise rotation of x, by I + 2Q + 2Q^2 + ... of skew blocks Q = 0 at first (arXiv:2306.07280).

    r [D / b, b (b - 1) / 2]: the entries of Q above the diagonal. No weight decay: Q is an angle, and a rotation keeps
    the lengths that decay would limit. HF PEFT: OFT.
    """

    demo = False
    decay_rule = ""

    block: int = 32  # the size b of a block, or
    blocks: int = 0  # how many; of the two the other is 0
    terms: Annotated[int, Bounds(0, 100)] = 5  # of the Neumann series; 0: Cayley's exact (I - Q) (I + Q)^-1
    share: bool = False  # one rotation for all blocks of a matrix
    coft: bool = False  # keep each Q within eps / sqrt(blocks) of 0
    eps: float = 6e-5
    where: str = "linear"

    hf = HFSpec(
        "OFT",
        keys={
            **{"r": Key(0, "blocks"), "oft_block_size": Key(32, "block", WHOLE), "block_share": Key(False, "share")},
            **{"coft": Key(False, "coft"), "eps": Key(6e-5, "eps")},
            **{"use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        },
        neutral=("module_dropout",),
        tensors=IDENTITY.tensors(r="oft_R.weight"),
        conv1d=False,
        read=lambda c, *_: {"terms": c["num_cayley_neumann_terms"] if c["use_cayley_neumann"] else 0},
        write=lambda m: {"use_cayley_neumann": m.terms > 0, "num_cayley_neumann_terms": m.terms or 5},
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        if (self.block > 0) == (self.blocks > 0):
            raise InputError(f"oft: block={self.block}, blocks={self.blocks}; give one of the two, and 0 for the other")
        D = target.shape[0]
        n = nearest_divisor(D, self.blocks) if self.blocks else D // nearest_divisor(D, self.block)
        b = D // n
        return {"r": jnp.zeros((1 if self.share else n, b * (b - 1) // 2))}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        eps = self.eps if self.coft else 0.0
        return wrap_weights(params, trainable, lambda w, **t: OFTWeight(w, **t, terms=self.terms, eps=eps))


def nearest_divisor(n: int, b: int) -> int:
    """Return the divisor of n nearest to b, the lower of two."""
    b = min(b, n)
    return next(d for k in range(b) for d in (b - k, b + k) if n % d == 0)


class BOFTWeight(Weight):
    """((x G_m ... G_1) @ w) * s, each G a blockwise rotation of what a butterfly gathers; r = 0 is no rotation."""

    w: Any  # [D, F] frozen
    r: Array  # [m, D / b, b, b]
    s: Array  # [F]

    def __rmatmul__(self, x: Array) -> Array:
        r = self.r.astype(jnp.float32)
        m, _, b, _ = r.shape
        for i in reversed(range(m)):
            rotation = cayley((r[i] - r[i].swapaxes(1, 2)) / 2)
            if m == 1:
                x = rotate_blocks(x, rotation)
                continue
            places = butterfly(x.shape[-1], b * 2**i, b // 2)
            x = rotate_blocks(x[..., np.argsort(places)], rotation)[..., places]
        return (x @ self.w) * self.s


def _boft_block(c: Any, values: Any, module: Any, *_: Any) -> dict[str, int]:
    """Return the size of a block; HF PEFT also takes how many blocks a matrix has."""
    if c["boft_block_size"]:
        return {}
    if not c["boft_block_num"]:
        raise InputError("boft_block_size and boft_block_num are 0; one of the two is wanted")
    return {"block": module.shape[0] // c["boft_block_num"]}


def _boft_blocks(method: Any, arrays: Any, *_: Any) -> dict[str, int]:
    """Return how many blocks a matrix has, if their sizes differ."""
    shapes = [t["r"].shape for t in arrays.values()]
    return {"boft_block_size": 0, "boft_block_num": shapes[0][-3]} if len({s[-1] for s in shapes}) > 1 else {}


def _boft_factors(c: dict[str, Any], tensors: Any) -> dict[str, Any]:
    """Return the config with the number of factors that the file has."""
    factors = {x.shape[0] for name, x in tensors.items() if name.endswith(".boft_R") and x.ndim == 4}
    return c | {"boft_n_butterfly_factor": factors.pop()} if len(factors) == 1 else c


class BOFT(Method):
    """s * (W behind `factors` rotations of x by blocks), all the identity and s = 1 at first (arXiv:2311.06243).

    r [factors, D / b, b, b] with Q = (r - r^T) / 2, and s [F]. No weight decay, as for OFT. HF PEFT: BOFT.
    """

    demo = False
    decay_rule = ""
    axes: ClassVar = {"s": "F"}

    block: Count = 4  # the size b of a block
    factors: Annotated[int, Bounds(1, 32)] = 1  # of the butterfly
    where: str = "linear"

    hf = HFSpec(
        "BOFT",
        keys={
            "boft_block_size": Key(4, "block", WHOLE),
            "boft_block_num": 0,
            "boft_n_butterfly_factor": Key(1, "factors"),
        },
        neutral=("boft_dropout",),
        tensors=IDENTITY.tensors(r="boft_R") | COLUMN.tensors(s="boft_s"),
        conv1d=False,
        read=_boft_block,
        write_modules=_boft_blocks,
        stored_config=_boft_factors,
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        (D, F), m, b = target.shape, self.factors, self.block
        if m > 1 and b % 2:
            raise InputError(f"boft: block={b} has no halves to exchange; take an even one, or factors=1")
        if D % (unit := b * 2 ** (m - 1)):
            raise InputError(f"boft: {target.path} has {D} inputs, wanted a multiple of block * 2^(factors-1) = {unit}"
                             "; change block or where")  # fmt: skip
        return {"r": jnp.zeros((m, D // b, b, b)), "s": jnp.ones(F)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return wrap_weights(params, trainable, BOFTWeight, s=1.0)


def butterfly(D: int, run: int, half: int) -> np.ndarray:
    """Return a permutation of D places: of the pieces of length `half` in each run first the even, then the odd."""
    pieces = np.arange(D).reshape(D // run, run // half, half)
    return np.concatenate([pieces[:, ::2], pieces[:, 1::2]], axis=1).ravel()
