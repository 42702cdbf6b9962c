"""Attention: who sees whom from positions and segments, and one function over several kernels."""

import jax
import jax.numpy as jnp
from jax import Array

from .. import InputError

PAD, VIRTUAL = 0, -1  # segment 0 is padding, segments 1, 2, ... are documents, segment -1 is seen by every query


def visible(positions_BT: Array, segments_BT: Array, positions_BS: Array, segments_BS: Array,
            window: int = 0) -> Array:  # fmt: skip
    """Mask [B, T, S]: a query sees keys of its own segment at its own or an earlier position, and virtual keys.

    With a window it sees the last `window` positions only, its own included, and virtual keys.

    Real positions start behind the virtual ones, so a position alone orders a document, whatever the packing or
    the place in a cache. Padding sees padding: no row of the mask is empty, so no softmax is 0/0.
    """
    same, virtual = segments_BT[:, :, None] == segments_BS[:, None, :], segments_BS[:, None, :] == VIRTUAL
    ago = positions_BT[:, :, None] - positions_BS[:, None, :]
    if window:
        same &= ago < window
    return (same | virtual) & (ago >= 0)


def attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, kernel: str = "auto",
           ahead: int | None = 0, scale: float = 0.0, cap: float = 0.0) -> Array:  # fmt: skip
    """softmax(scale q k^T) v over grouped heads (arXiv:2305.13245) -> [B, T, N, H]; no mask means causal, T = S.

    scale: 0 is H^-1/2. cap: scores become cap tanh(score / cap) before the mask (arXiv:2408.00118); 0 is off.
    ahead: how many keys stand before the first query's own, when query t sees no key behind t + ahead; None if that
    is not known (a cache). kernel: `reference`, `xla`, `cudnn` (flash attention on NVIDIA GPUs: causal, half
    precision), or `auto`: cuDNN where it is right, else `xla`.
    """
    H = q_BTNH.shape[-1]
    scale = scale or H**-0.5
    if kernel == "auto":
        half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        fits = mask_BTS is None and not cap and half and H % 8 == 0 and H <= 128
        kernel = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    if kernel == "cudnn":
        if cap:
            raise InputError("attention: cuDNN has no capped scores; take --attention auto")
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, is_causal=mask is None, implementation="cudnn"
        )
    return (reference if kernel == "reference" else blocked)(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, cap, ahead)


def causal(T: int, S: int) -> Array:
    """Mask [1, T, S] of a row that is one document."""
    return (jnp.arange(T)[:, None] + S - T >= jnp.arange(S))[None]


def capped(scores: Array, cap: float) -> Array:
    """cap tanh(scores / cap), or the scores if cap is 0."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def reference(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, scale: float, cap: float,
              ahead: int | None = 0) -> Array:  # fmt: skip
    """The definition, which the other kernels are tested against."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = capped(scores * scale, cap)
    mask_BTS = causal(T, S) if mask_BTS is None else mask_BTS
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -1e30), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def blocked(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, scale: float, cap: float,
            ahead: int | None = 0) -> Array:  # fmt: skip
    """The same in blocks of queries, each over the keys it can see, divided by the softmax's sum after the product.

    Measured 3 times faster than the definition on a CPU (T 256); half the FLOPs and memory for long rows anywhere.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    mask_BTS = causal(T, S) if mask_BTS is None else mask_BTS
    C = T if ahead is None else _block(T)
    out = []
    for t in range(0, T, C):
        end = S if ahead is None else min(t + C + ahead, S)
        q_BKXH = q_BKGTH[:, :, :, t : t + C].reshape(B, K, -1, H)
        seen = jnp.broadcast_to(mask_BTS[:, None, None, t : t + C, :end], (B, 1, N // K, C, end)).reshape(B, 1, -1, end)
        out.append(_softmax_product(q_BKXH, k_BKSH[:, :, :end], v_BKSH[:, :, :end], seen, cap).reshape(B, K, -1, C, H))
    out_BKGTH = out[0] if len(out) == 1 else jnp.concatenate(out, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _softmax_product(q_BKXH: Array, k_BKSH: Array, v_BKSH: Array, seen_BKXS: Array, cap: float) -> Array:
    scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BKXS, capped(scores, cap), -1e30)
    # The softmax does not change with the shift, so the shift needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    product = jnp.einsum("BKXS,BKSH->BKXH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return (product / total).astype(v_BKSH.dtype)


def _block(T: int) -> int:
    """Queries a block: a divisor of T that makes at most 8 blocks of 96 or more."""
    return next((C for C in range(max(96, T // 8), T) if T % C == 0), T)
