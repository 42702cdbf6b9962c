"""Attention: the mask from positions and segments, and one function over several kernels."""

import jax
import jax.numpy as jnp
from jax import Array

from .. import InputError
from .backend import backend
from .sharding import KEEP, constrain, context_shards

LONG_ROW = 2048 * 2048  # queries x keys; from this size on, the scores of few queries exist at once
PART_QUERIES = 256
PAD, VIRTUAL = 0, -1  # segment 0 is padding, segments 1, 2, ... are documents, segment -1 is seen by every query


def attention_mask(
    positions_BT: Array, segments_BT: Array, positions_BS: Array, segments_BS: Array, window: int = 0
) -> Array:  # fmt: skip
    """Mask [B, T, S]: a query sees the keys of its segment up to its own position, and all earlier virtual keys.

    With a window it sees only the last `window` positions of its segment, its own included, and virtual keys.

    Real positions come after virtual ones, so the position alone orders a document, whatever the packing or the slot
    in a cache. Padding sees padding, so no row of the mask is empty and no softmax is 0/0.
    """
    same, virtual = segments_BT[:, :, None] == segments_BS[:, None, :], segments_BS[:, None, :] == VIRTUAL
    distance = positions_BT[:, :, None] - positions_BS[:, None, :]
    if window:
        same &= distance < window
    return (same | virtual) & (distance >= 0)


def causal_mask(T: int, S: int) -> Array:
    """Mask [1, T, S] of a row that is one document; query 0 is at key S - T."""
    return (jnp.arange(T)[:, None] + S - T >= jnp.arange(S))[None]


def attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, kernel: str = "auto",
    kv_offset: int | None = 0, scale: float = 0.0, logit_softcap: float = 0.0,
) -> Array:  # fmt: skip
    """softmax(scale q k^T) v over grouped heads (arXiv:2305.13245) -> [B, T, N, H]; no mask means causal, T = S.

    kernel: `reference`, `xla`, `cudnn` (flash attention on NVIDIA GPUs: causal, half precision), or `auto`: cuDNN
    where it applies, otherwise `xla`.
    kv_offset: offset of the first query in the key sequence: query t sees no key after t + kv_offset. None: unknown, as
    with a cache.
    scale: 0 means H^-1/2.
    logit_softcap: scores become cap tanh(score / cap) before the mask (arXiv:2408.00118); 0: off.
    """
    H = q_BTNH.shape[-1]
    scale = scale or H**-0.5
    if kernel == "auto":
        half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        plain = mask_BTS is None and not logit_softcap and context_shards(q_BTNH.shape[1]) == 1
        kernel = "cudnn" if plain and half and H % 8 == 0 and H <= 128 and backend() == "gpu" else "xla"
    if kernel == "cudnn":
        if logit_softcap:
            raise InputError("attention: cuDNN has no soft cap of scores; take --attention auto")
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, is_causal=mask is None, implementation="cudnn"
        )
    mask_BTS = causal_mask(q_BTNH.shape[1], k_BSKH.shape[1]) if mask_BTS is None else mask_BTS
    if kernel == "reference":
        return reference_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, logit_softcap)
    return blocked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, logit_softcap, kv_offset)


def soft_cap(x: Array, cap: float) -> Array:
    """cap tanh(x / cap), or x if cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def reference_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, scale: float, cap: float
) -> Array:  # fmt: skip
    """Attention by its definition; the other kernels are tested against it."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -1e30), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def blocked_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, scale: float, cap: float, kv_offset: int | None
) -> Array:  # fmt: skip
    """Attention in blocks of queries, each over the keys that it can see, normalised after the product with v.

    Measured 3 times faster than the definition on a CPU (T = 256); half the FLOPs and memory for long rows anywhere.
    If T is split over Z shards, each shard computes its own queries over all keys, which are gathered.
    """
    B, T, N, H = q_BTNH.shape
    (S, K), Z = k_BSKH.shape[1:3], context_shards(T)
    q_BKZGTH = (q_BTNH * scale).reshape(B, Z, T // Z, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    k_BSKH, v_BSKH = (constrain(x, KEEP, None, KEEP, KEEP) if Z > 1 else x for x in (k_BSKH, v_BSKH))
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    mask_BZTS = mask_BTS.reshape(-1, Z, T // Z, S)
    C = T // Z if kv_offset is None or Z > 1 else _block_length(T)
    block_attention = _attend_in_parts if T * S >= LONG_ROW else _attend_block
    blocks = []
    for t in range(0, T // Z, C):
        end = S if kv_offset is None or Z > 1 else min(t + C + kv_offset, S)
        block = q_BKZGTH[..., t : t + C, :], k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        blocks.append(block_attention(*block, mask_BZTS[:, :, t : t + C, :end], cap))
    y_BKZGTH = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=4)
    return y_BKZGTH.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


def _block_length(T: int) -> int:
    """Queries per block: a divisor of T that makes at most 8 blocks of at least 96 queries."""
    return next((C for C in range(max(96, T // 8), T) if T % C == 0), T)


def _attend_in_parts(q_BKZGCH: Array, k_BKSH: Array, v_BKSH: Array, mask_BZCS: Array, cap: float) -> Array:
    """`_attend_block` in parts, of which one is in memory at a time; the backward pass recomputes them."""
    C = q_BKZGCH.shape[4]
    width = next(n for n in range(min(C, PART_QUERIES), 0, -1) if C % n == 0)
    q = jnp.moveaxis(q_BKZGCH.reshape(*q_BKZGCH.shape[:4], C // width, width, -1), 4, 0)
    mask = jnp.moveaxis(mask_BZCS.reshape(*mask_BZCS.shape[:2], C // width, width, -1), 2, 0)
    part = jax.checkpoint(lambda q_mask: _attend_block(q_mask[0], k_BKSH, v_BKSH, q_mask[1], cap))
    return jnp.moveaxis(jax.lax.map(part, (q, mask)), 0, 4).reshape(q_BKZGCH.shape)


def _attend_block(q_BKZGCH: Array, k_BKSH: Array, v_BKSH: Array, mask_BZCS: Array, cap: float) -> Array:
    """softmax(q k^T) v with the axes Z, G and C of the queries flattened to one axis X."""
    B, K, Z, G, C, H = q_BKZGCH.shape
    S = k_BKSH.shape[2]
    mask_B1XS = jnp.broadcast_to(mask_BZCS[:, None, :, None], (B, 1, Z, G, C, S)).reshape(B, 1, -1, S)
    q_BKXH = q_BKZGCH.reshape(B, K, -1, H)
    scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_B1XS, soft_cap(scores, cap), -1e30)
    # The softmax does not depend on the shift, so the shift needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    product = jnp.einsum("BKXS,BKSH->BKXH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return (product / total).astype(v_BKSH.dtype).reshape(q_BKZGCH.shape)
