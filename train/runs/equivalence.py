"""Whether two models compute the same: logits on a few rows of text, compared by their divergence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...model import forward
from ...peft import Subset
from ..progress import console
from .load import LoadedRun

# Mean KL (nats a token) up to which two models pass for one, by the dtype that the weights were rounded to.
BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 2e-2}


def probe_ids(got: LoadedRun, rows: int = 4, T: int = 64) -> np.ndarray:
    """Ids [rows, T] to compare models on: held-out text of the base if it has any, else random ones."""
    T = min(T, got.config.context)
    held = [row["ids"][:T] for domain in got.held_out.values() for row in domain.rows]
    if held and len(held[0]) == T:
        return np.stack([held[i * len(held) // rows] for i in range(rows)])
    return np.random.default_rng(0).integers(0, got.tokenizer.vocab_size, (rows, T))


def run_logits(got: LoadedRun, ids: np.ndarray) -> np.ndarray:
    """What base + adapter computes for ids, fp32."""
    model, bound, context = got.bound
    return np.asarray(jax.jit(lambda b: forward(model, b, jnp.asarray(ids), context=context)[0])(bound), np.float32)


def base_logits(got: LoadedRun, ids: np.ndarray) -> tuple[np.ndarray | None, float]:
    """(what the base alone computes for ids, the largest KL that is rounding there); (None, 0) where nothing is tuned.

    Rounding: a hundredth of what passes for the same model in the dtype that it is computed in.
    """
    if got.run.phase == "pretrain":
        return None, 0.0
    return run_logits(dataclasses.replace(got, method=Subset("all"), trainable={}), ids), BOUNDS[got.config.dtype] / 100


def compare_logits(
    before: np.ndarray, after: np.ndarray, bound: float, what: str, base: np.ndarray | None = None, noise: float = 0.0
) -> dict[str, float]:
    """{largest difference of logits, mean and largest KL(before || after) in nats a token}; says them.

    base: the logits without the adapter. With it also `kept`, the share of the adapter's effect that is left:
    1 - KL(before || after) / KL(before || base); an adapter whose effect is no larger than `noise` has no share.

    Raises InputError above `bound`, and for a share below one half.
    """
    V = min(before.shape[-1], after.shape[-1])  # a vocabulary may have been padded
    kl = _divergence(before[..., :V], after[..., :V])
    found = {"max_difference": float(np.abs(before[..., :V] - after[..., :V]).max()), "kl_mean": float(kl.mean()),
             "kl_max": float(kl.max())}  # fmt: skip
    text = (f"{what}: logits differ by at most {found['max_difference']:.2e}, KL {found['kl_mean']:.2e} nats a token "
            f"(largest {found['kl_max']:.2e}) on {before.shape[0]} x {before.shape[1]} tokens")  # fmt: skip
    if not found["kl_mean"] <= bound:  # NaN fails too
        raise InputError(f"{text}, above --bound {bound:g}; nothing was written. A wider --dtype rounds less")
    effect = 0.0 if base is None else float(_divergence(before[..., :V], base[..., :V]).mean())
    if effect > noise:
        found["kept"] = 1 - found["kl_mean"] / effect
        text += f"; {found['kept']:.1%} of the adapter's effect (KL {effect:.2e} to the base alone) is kept"
        if found["kept"] < 0.5:
            raise InputError(f"{text}, less than half; nothing was written. --dtype float32 rounds least")
    console.print(f"{text}: below {bound:g}", soft_wrap=True)
    return found


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of two arrays of logits [..., V], nats [...]."""
    a, b = (_log_softmax(x.astype(np.float64)) for x in (p, q))
    return np.maximum((np.exp(a) * (a - b)).sum(-1), 0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def main_dtype(params: Any) -> str:
    """The dtype most of the bytes have."""
    return max(jax.tree.leaves(params), key=lambda x: x.nbytes).dtype.name
