"""Attention: who sees whom from positions and segments, rotary embedding, and one function over two kernels."""

import jax
import jax.numpy as jnp
from jax import Array

PAD, VIRTUAL = 0, -1  # segment 0 is padding, segments 1, 2, ... are documents, segment -1 is seen by every query


def visible(positions_BT: Array, segments_BT: Array, positions_BS: Array, segments_BS: Array) -> Array:
    """Mask [B, T, S]: a query sees keys of its own segment at its own or an earlier position, and virtual keys.

    Real positions start behind the virtual ones, so a position alone orders a document, whatever the packing or
    the place in a cache. Padding sees padding: no row of the mask is empty, so no softmax is 0/0.
    """
    same = (segments_BT[:, :, None] == segments_BS[:, None, :]) | (segments_BS[:, None, :] == VIRTUAL)
    return same & (positions_BT[:, :, None] >= positions_BS[:, None, :])


def rope_table(positions_BT: Array, H: int, theta: float) -> tuple[Array, Array]:
    """(sin, cos) [B, T, 1, H/2] of position * theta^(-2i/H), fp32 (RoPE, arXiv:2104.09864)."""
    frequency = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTNH: Array, sin_cos: tuple[Array, Array]) -> Array:
    """Rotate the pairs (i, i + H/2) of each head by their angle, in fp32."""
    sin, cos = sin_cos
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, kernel: str = "auto",
           ahead: int | None = 0) -> Array:  # fmt: skip
    """softmax(q k^T / sqrt(H)) v over grouped heads (arXiv:2305.13245) -> [B, T, N, H]; no mask means causal, T = S.

    ahead: how many keys stand before the first query's own, when query t sees no key behind t + ahead; None if that
    is not known (a cache). kernel: `reference`, `xla`, `cudnn` (flash attention on NVIDIA GPUs: causal, half
    precision), or `auto`: cuDNN where it is right, else `xla`.
    """
    if kernel == "auto":
        half, H = q_BTNH.dtype in (jnp.bfloat16, jnp.float16), q_BTNH.shape[-1]
        fits = mask_BTS is None and half and H % 8 == 0 and H <= 128
        kernel = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    if kernel == "cudnn":
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=mask is None, implementation="cudnn"
        )
    return (reference if kernel == "reference" else blocked)(q_BTNH, k_BSKH, v_BSKH, mask_BTS, ahead)


def causal(T: int, S: int) -> Array:
    """Mask [1, T, S] of a row that is one document."""
    return (jnp.arange(T)[:, None] + S - T >= jnp.arange(S))[None]


def reference(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, ahead: int | None = 0) -> Array:
    """The definition, which the other kernels are tested against."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    mask_BTS = causal(T, S) if mask_BTS is None else mask_BTS
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -1e30), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def blocked(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, ahead: int | None = 0) -> Array:
    """The same in blocks of queries, each over the keys it can see, divided by the softmax's sum after the product.

    Measured 3 times faster than the definition on a CPU (T 256); half the FLOPs and memory for long rows anywhere.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    mask_BTS = causal(T, S) if mask_BTS is None else mask_BTS
    C = T if ahead is None else _block(T)
    out = []
    for t in range(0, T, C):
        end = S if ahead is None else min(t + C + ahead, S)
        q_BKXH = q_BKGTH[:, :, :, t : t + C].reshape(B, K, -1, H)
        seen = jnp.broadcast_to(mask_BTS[:, None, None, t : t + C, :end], (B, 1, N // K, C, end)).reshape(B, 1, -1, end)
        out.append(_softmax_product(q_BKXH, k_BKSH[:, :, :end], v_BKSH[:, :, :end], seen).reshape(B, K, -1, C, H))
    out_BKGTH = out[0] if len(out) == 1 else jnp.concatenate(out, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _softmax_product(q_BKXH: Array, k_BKSH: Array, v_BKSH: Array, seen_BKXS: Array) -> Array:
    scores = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BKXS, scores, -1e30)
    # The softmax does not change with the shift, so the shift needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    product = jnp.einsum("BKXS,BKSH->BKXH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return (product / total).astype(v_BKSH.dtype)


def _block(T: int) -> int:
    """Queries a block: a divisor of T that makes at most 8 blocks of 96 or more."""
    return next((C for C in range(max(96, T // 8), T) if T % C == 0), T)
