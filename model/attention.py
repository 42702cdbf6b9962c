"""Attention: who sees whom from positions and segments, and one function over several kernels."""

import jax
import jax.numpy as jnp
from jax import Array

from .. import InputError
from .backend import backend
from .sharding import KEEP, constrain, context_shards

LONG, PART = 2048 * 2048, 256  # queries x keys of a long row; its queries whose scores exist at once
PAD, VIRTUAL = 0, -1  # segment 0 is padding, segments 1, 2, ... are documents, segment -1 is seen by every query


def attention_mask(positions_BT: Array, segments_BT: Array, positions_BS: Array, segments_BS: Array,
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
        fits = (
            mask_BTS is None and not cap and half and H % 8 == 0 and H <= 128 and context_shards(q_BTNH.shape[1]) == 1
        )
        kernel = "cudnn" if fits and backend() == "gpu" else "xla"
    if kernel == "cudnn":
        if cap:
            raise InputError("attention: cuDNN has no capped scores; take --attention auto")
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, is_causal=mask is None, implementation="cudnn"
        )
    return (reference_attention if kernel == "reference" else blocked_attention)(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, cap, ahead)


def causal_mask(T: int, S: int) -> Array:
    """Mask [1, T, S] of a row that is one document."""
    return (jnp.arange(T)[:, None] + S - T >= jnp.arange(S))[None]


def soft_cap(scores: Array, cap: float) -> Array:
    """cap tanh(scores / cap), or the scores if cap is 0."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def reference_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, scale: float, cap: float,
              ahead: int | None = 0) -> Array:  # fmt: skip
    """The definition, which the other kernels are tested against."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    mask_BTS = causal_mask(T, S) if mask_BTS is None else mask_BTS
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -1e30), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def blocked_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, scale: float, cap: float,
            ahead: int | None = 0) -> Array:  # fmt: skip
    """The same in blocks of queries, each over the keys it can see, divided by the softmax's sum after the product.

    Measured 3 times faster than the definition on a CPU (T 256); half the FLOPs and memory for long rows anywhere.
    Where T is split over Z devices each has the blocks of its own stretch, over all keys, which are gathered.
    """
    B, T, N, H = q_BTNH.shape
    (S, K), Z = k_BSKH.shape[1:3], context_shards(T)
    q_BKZGTH = (q_BTNH * scale).reshape(B, Z, T // Z, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    k_BSKH, v_BSKH = (constrain(x, KEEP, None, KEEP, KEEP) if Z > 1 else x for x in (k_BSKH, v_BSKH))
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    mask_BTS = causal_mask(T, S) if mask_BTS is None else mask_BTS
    mask_BZTS = mask_BTS.reshape(-1, Z, T // Z, S)
    C = T // Z if ahead is None or Z > 1 else _block(T)
    product = _by_parts if T * S >= LONG else _product
    out = []
    for t in range(0, T // Z, C):
        end = S if ahead is None or Z > 1 else min(t + C + ahead, S)
        block = q_BKZGTH[..., t : t + C, :], k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        out.append(product(*block, mask_BZTS[:, :, t : t + C, :end], cap))
    out_BKZGTH = out[0] if len(out) == 1 else jnp.concatenate(out, axis=4)
    return out_BKZGTH.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


def _by_parts(q_BKZGCH: Array, k_BKSH: Array, v_BKSH: Array, seen_BZCS: Array, cap: float) -> Array:
    """A block's product in parts, one in memory at a time, made again in the backward pass: for long rows."""
    C = q_BKZGCH.shape[4]
    W = next(w for w in range(min(C, PART), 0, -1) if C % w == 0)
    q = jnp.moveaxis(q_BKZGCH.reshape(*q_BKZGCH.shape[:4], C // W, W, -1), 4, 0)
    seen = jnp.moveaxis(seen_BZCS.reshape(*seen_BZCS.shape[:2], C // W, W, -1), 2, 0)
    part = jax.checkpoint(lambda at: _product(at[0], k_BKSH, v_BKSH, at[1], cap))
    return jnp.moveaxis(jax.lax.map(part, (q, seen)), 0, 4).reshape(q_BKZGCH.shape)


def _product(q_BKZGCH: Array, k_BKSH: Array, v_BKSH: Array, seen_BZCS: Array, cap: float) -> Array:
    B, K, Z, G, C, H = q_BKZGCH.shape
    S = k_BKSH.shape[2]
    seen_B1XS = jnp.broadcast_to(seen_BZCS[:, None, :, None], (B, 1, Z, G, C, S)).reshape(B, 1, -1, S)
    return _softmax_product(q_BKZGCH.reshape(B, K, -1, H), k_BKSH, v_BKSH, seen_B1XS, cap).reshape(q_BKZGCH.shape)


def _softmax_product(q_BKXH: Array, k_BKSH: Array, v_BKSH: Array, seen_BKXS: Array, cap: float) -> Array:
    scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BKXS, soft_cap(scores, cap), -1e30)
    # The softmax does not change with the shift, so the shift needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    product = jnp.einsum("BKXS,BKSH->BKXH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return (product / total).astype(v_BKSH.dtype)


def _block(T: int) -> int:
    """Queries a block: a divisor of T that makes at most 8 blocks of 96 or more."""
    return next((C for C in range(max(96, T // 8), T) if T % C == 0), T)
