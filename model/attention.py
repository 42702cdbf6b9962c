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


def attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None, kernel: str = "auto") -> Array:
    """softmax(q k^T / sqrt(H)) v over grouped heads (arXiv:2305.13245) -> [B, T, N, H]; no mask means causal, T = S.

    kernel: `xla` (the reference, here), `cudnn` (flash attention on NVIDIA GPUs; causal only, fp16 or bf16), or
    `auto`: cuDNN where it is right, else the reference.
    """
    if kernel == "auto":
        half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        fits = mask_BTS is None and half and q_BTNH.shape[-1] % 8 == 0 and q_BTNH.shape[-1] <= 128
        kernel = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    if kernel == "cudnn":
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=mask is None, implementation="cudnn"
        )
    return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def reference(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None) -> Array:
    """Plain XLA attention with fp32 scores: right everywhere, O(T S) memory."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    mask = jnp.tril(jnp.ones((T, S), bool)) if mask_BTS is None else mask_BTS[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v_BSKH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
