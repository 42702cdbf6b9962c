"""PiSSA: LoRA that begins as the principal part of each matrix, which the base then lacks (arXiv:2404.02948)."""

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
from ..targets import group_by_path, layer_values
from .lora import LoRA


def principal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """(U, V) (S / scale)^1/2 of the `rank` largest singular values; A has U itself where S is 0, so that it trains."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * jnp.where(root > 0, root, 1), root[:, None] * v[:rank]


class PiSSA(LoRA):
    """W - U S V + s A B with s A B = U S V, the `rank` largest singular values of W, at first (arXiv:2404.02948)."""

    demo = False
    split: ClassVar[Any] = staticmethod(principal)  # (w, scale, rank) -> (a, b) that the base then lacks

    alpha: Real = 8.0
    pad_to_rank = Method.pad_to_rank  # another rank leaves another base

    def factor(self, params: Any, key: str, arrays: dict[str, Array]) -> Any:
        return asked(self, params, key)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        return init_factors(self, self.split, key, params)

    def frozen_params(self, params: Any) -> Any:
        return subtract_init(self, self.split, params, jax.eval_shape(self.init, jax.random.key(0), params))

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return super().bind(subtract_init(self, self.split, params, trainable), trainable)


def orthonormal(w: Array, scale: Any, rank: int) -> tuple[Array, Array]:
    """(R^T, Q^T) of the first `rank` columns of Q, where W^T = Q R."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


class OLoRA(PiSSA):
    """W - s (Q R)^T + s A B, A B = (Q R)^T the first `rank` columns of Q in W^T = Q R, at first (arXiv:2406.01775)."""

    split: ClassVar[Any] = staticmethod(orthonormal)


class Residual(Weight):
    """x @ w of what is left of a matrix. `freeze` puts it in the base, so that `bind` need not take it apart again."""

    w: Any  # [D, F] frozen

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w


@partial(jax.jit, static_argnames=("split", "rank", "rest"))
def split_targets(w: Array, scale: Any, split: Any, rank: int, rest: bool) -> Any:
    """(a, b) of each matrix of w by split(w, scale, rank), or w - scale a b; in fp32, one layer in memory at a time."""

    def one(w: Array, scale: Array) -> Any:
        a, b = split(jax.lax.stop_gradient(w).astype(jnp.float32), scale, rank)
        return (w - scale * (a @ b)).astype(w.dtype) if rest else (a, b)

    scale = jnp.broadcast_to(jnp.ravel(scale), w.shape[0] if w.ndim == 3 else 1)
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda at: one(*at), (w, scale)) if w.ndim == 3 else one(w, scale[0])


def asked(method: LoRA, params: Any, key: str) -> Any:
    """alpha / rank with the rank that was asked for, also where a matrix is narrower and has less."""
    alpha = layer_values(method.alphas, method.alpha, params, key, "alpha rule")
    return alpha / layer_values(method.ranks, method.rank, params, key, "rank rule")


def init_factors(method: LoRA, split: Any, key: Array, params: Any) -> dict[str, Any]:
    """A and B of LoRA by split(w, scale, rank): what `lessen` takes out of the base."""
    found, flat = LoRA.init(method, key, params), named(params)
    if "embed/table" in found:
        raise InputError(f"{type(method).__name__.lower()}: embed/table is no matrix but a table; narrow where")
    for name, t in found.items():
        path, layers = split_layer_index(name)
        if isinstance(flat[path], Weight):
            raise InputError(f"{type(method).__name__.lower()}: {path} is {type(flat[path]).__name__}, of which no "
                             "part can be taken out; take lora, or a base that is not quantised")  # fmt: skip
        w = flat[path][slice(*layers)] if layers else flat[path]
        rank = min(t["b"].shape[-2], *w.shape[-2:])
        a, b = split_targets(w, method.factor(params, name, {"b": t["b"][..., :rank, :]}), split, rank, False)
        found[name] = {"a": a, "b": b}
    return found


def subtract_init(method: LoRA, split: Any, params: Any, trainable: Any) -> dict[str, Any]:
    """The base without what `begin` makes of it; where that is done it stays."""

    def left(w: Any, path: str, of: dict[Any, Any]) -> Any:
        if isinstance(w, Weight):
            return w if isinstance(w, Residual) else dataclasses.replace(w, w=left(w.w, path, of))  # type: ignore
        for layers, t in of.items():
            name, at = (f"{path}[{layers[0]}:{layers[1]}]", slice(*layers)) if layers else (path, ...)
            w = w.at[at].set(split_targets(w[at], method.factor(params, name, t), split, t["b"].shape[-2], True))
        return Residual(w)

    flat, found = named(params), group_by_path(trainable).items()
    return replace(params, {path: left(flat[path], path, of) for path, of in found if path in flat})
