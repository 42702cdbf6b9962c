"""LoRA initialised from W: the initial A B is subtracted from the frozen weight, so that step 0 computes the base.

PiSSA takes A and B from the singular value decomposition of W (arXiv:2404.02948), OLoRA from its QR decomposition
(arXiv:2406.01775).
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Real
from ...model import Weight
from ...model.tree import named, replace, split_layer_index
from ..base import Method
from ..targets import group_by_path, rule_values
from .lora import LoRA


def principal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """Return (U, V) (S / scale)^1/2 of the `rank` largest singular values; A is U where S is 0, so that it trains."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * jnp.where(root > 0, root, 1), root[:, None] * v[:rank]


def orthonormal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """Return (R^T, Q^T) of the first `rank` columns of Q, where W^T = Q R."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


class Residual(Weight):
    """x @ w of what is left of a matrix. `frozen_params` puts it into the base; `bind` then subtracts nothing."""

    w: Any  # [D, F] frozen

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w


class PiSSA(LoRA):
    """W - U S V + s A B with s A B = U S V, the `rank` largest singular values of W, at first (arXiv:2404.02948).

    A [D, R], B [R, F], s = alpha / rank. HF PEFT: LORA with init_lora_weights="pissa".
    """

    demo = False
    split: ClassVar[Any] = staticmethod(principal)  # (w, scale, rank) -> (a, b)

    alpha: Real = 8.0
    pad_to_rank = Method.pad_to_rank  # another rank leaves another base

    hf = LoRA.hf.variant(flags={"init_lora_weights": "pissa"}, base_tables="residual")

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        """Return alpha / rank with the rank of the config, also for a matrix that is narrower and has less."""
        alpha = rule_values(self.alphas, self.alpha, params, key, "alpha rule")
        return alpha / rule_values(self.ranks, self.rank, params, key, "rank rule")

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        """Return the A and B that `subtract_init` removes. Raises InputError for a table or a quantised matrix."""
        trainable, flat = super().init(key, params), named(params)
        if "embed/table" in trainable:
            raise InputError(f"{self.name}: embed/table is no matrix but a table; narrow where")
        for target, arrays in trainable.items():
            path, layers = split_layer_index(target)
            if isinstance(flat[path], Weight):
                raise InputError(f"{self.name}: {path} is {type(flat[path]).__name__}, of which no part can be taken "
                                 "out; take lora, or a base that is not quantised")  # fmt: skip
            w = flat[path][slice(*layers)] if layers else flat[path]
            rank = min(arrays["b"].shape[-2], *w.shape[-2:])
            a, b = split_layers(w, self.factor(params, target, arrays), self.split, rank, False)
            trainable[target] = {"a": a, "b": b}
        return trainable

    def frozen_params(self, params: Any) -> Any:
        return self.subtract_init(params, jax.eval_shape(self.init, jax.random.key(0), params))

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return super().bind(self.subtract_init(params, trainable), trainable)

    def subtract_init(self, params: Any, trainable: Any) -> dict[str, Any]:
        """Return the base with a Residual in place of each matrix; a Residual stays as it is."""

        def residual(w: Any, path: str, parts: dict[Any, Any]) -> Any:
            if isinstance(w, Residual):
                return w
            if isinstance(w, Weight):  # of an earlier method in a chain
                return dataclasses.replace(w, w=residual(w.w, path, parts))  # type: ignore
            for layers, arrays in parts.items():
                key, at = (f"{path}[{layers[0]}:{layers[1]}]", slice(*layers)) if layers else (path, ...)
                rank = arrays["b"].shape[-2]
                w = w.at[at].set(split_layers(w[at], self.factor(params, key, arrays), self.split, rank, True))
            return Residual(w)

        flat, by_path = named(params), group_by_path(trainable)
        return replace(params, {path: residual(flat[path], path, by_path[path]) for path in by_path if path in flat})


class OLoRA(PiSSA):
    """W - s (Q R)^T + s A B, A B = (Q R)^T the first `rank` columns of Q in W^T = Q R, at first (arXiv:2406.01775).

    A [D, R], B [R, F], s = alpha / rank. HF PEFT: LORA with init_lora_weights="olora".
    """

    split: ClassVar[Any] = staticmethod(orthonormal)

    hf = PiSSA.hf.variant(flags={"init_lora_weights": "olora"}, conv1d=False)


@partial(jax.jit, static_argnames=("split", "rank", "rest"))
def split_layers(w: Array, scale: Any, split: Any, rank: int, rest: bool) -> Any:
    """Return (a, b) of each matrix of w by split(w, scale, rank), or with `rest` w - scale a b.

    In fp32, with one layer in memory at a time.
    """

    def of_layer(w: Array, scale: Array) -> Any:
        a, b = split(jax.lax.stop_gradient(w).astype(jnp.float32), scale, rank)
        return (w - scale * (a @ b)).astype(w.dtype) if rest else (a, b)

    scale = jnp.broadcast_to(jnp.ravel(scale), w.shape[0] if w.ndim == 3 else 1)
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda pair: of_layer(*pair), (w, scale)) if w.ndim == 3 else of_layer(w, scale[0])
