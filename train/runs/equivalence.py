"""Compare two models by the logits they compute for a few rows of text."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from ... import InputError
from ...model import forward
from ...peft import Subset
from ..progress import console
from .loaded import LoadedRun

# Largest mean KL divergence (nats per token) of two models that count as equal, by the dtype of the rounded weights.
BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 2e-2}


def probe_ids(loaded: LoadedRun, rows: int = 4, T: int = 64) -> np.ndarray:
    """Return ids [rows, T] to compare models on: held-out text of the base if it has some, else random ids."""
    T = min(T, loaded.config.context)
    texts = [row["ids"][:T] for domain in loaded.held_out.values() for row in domain.rows]
    if texts and len(texts[0]) == T:
        return np.stack([texts[i * len(texts) // rows] for i in range(rows)])
    return np.random.default_rng(0).integers(0, loaded.tokenizer.vocab_size, (rows, T))


def run_logits(loaded: LoadedRun, ids: np.ndarray) -> np.ndarray:
    """Return the fp32 logits of base and adapter."""
    model, bound, context = loaded.bound
    return np.asarray(jax.jit(lambda b: forward(model, b, jnp.asarray(ids), context=context)[0])(bound), np.float32)


def base_logits(loaded: LoadedRun, ids: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Return (logits of the base alone, KL up to which a difference from them is rounding); (None, 0) for a base.

    Rounding is a hundredth of the bound for equal models in the dtype of the computation.
    """
    if loaded.run.phase == "pretrain":
        return None, 0.0
    base = dataclasses.replace(loaded, method=Subset("all"), trainable={})
    return run_logits(base, ids), BOUNDS[loaded.config.dtype] / 100


def compare_logits(
    before: np.ndarray, after: np.ndarray, bound: float, title: str, base: np.ndarray | None = None, noise: float = 0.0
) -> dict[str, float]:
    """Print and return {max_difference, kl_mean, kl_max}: KL(before || after) in nats per token.

    base: logits without the adapter. With it also `kept`, the share of the adapter's effect that remains,
    1 - KL(before || after) / KL(before || base), unless that effect is no larger than `noise`.

    Raises InputError for a mean KL above `bound`, and for less than half of the effect.
    """
    V = min(before.shape[-1], after.shape[-1])  # a vocabulary may have been padded
    before, after = before[..., :V], after[..., :V]
    kl = _kl_divergence(before, after)
    result = {"max_difference": float(np.abs(before - after).max())}
    result |= {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}
    text = (
        f"{title}: logits differ by at most {result['max_difference']:.2e}, KL {result['kl_mean']:.2e} nats per token "
        f"(largest {result['kl_max']:.2e}) on {before.shape[0]} x {before.shape[1]} tokens"
    )
    if not result["kl_mean"] <= bound:  # NaN fails too
        raise InputError(f"{text}, above --bound {bound:g}; nothing was written. A wider --dtype rounds less")
    effect = 0.0 if base is None else float(_kl_divergence(before, base[..., :V]).mean())
    if effect > noise:
        result["kept"] = 1 - result["kl_mean"] / effect
        text += f"; {result['kept']:.1%} of the adapter's effect (KL {effect:.2e} to the base alone) is kept"
        if result["kept"] < 0.5:
            raise InputError(f"{text}, less than half; nothing was written. --dtype float32 rounds least")
    console.print(f"{text}: below {bound:g}", soft_wrap=True)
    return result


def _kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p || q) of two arrays of logits [..., V], in nats [...]."""
    log_p, log_q = (log_softmax(x.astype(np.float64), axis=-1) for x in (p, q))
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0)


def main_dtype(params: Any) -> str:
    """Return the dtype of the largest array."""
    return max(jax.tree.leaves(params), key=lambda x: x.nbytes).dtype.name
