"""What PiSSA and OLoRA share: LoRA that begins as a part of each matrix, which the base then lacks."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...model import Weight
from ...model.tree import cut_key, named, replace
from .lora import LoRA
from ..targets import group, layer_values


class Residual(Weight):
    """x @ w of what is left of a matrix. `freeze` puts it in the base, so that `bind` need not take it apart again."""

    w: Any  # [D, F] frozen

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.w


@partial(jax.jit, static_argnames=("split", "rank", "rest"))
def parts(w: Array, scale: Any, split: Any, rank: int, rest: bool) -> Any:
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


def begin(method: LoRA, split: Any, key: Array, params: Any) -> dict[str, Any]:
    """A and B of LoRA by split(w, scale, rank): what `lessen` takes out of the base."""
    found, flat = LoRA.init(method, key, params), named(params)
    if "embed/table" in found:
        raise InputError(f"{type(method).__name__.lower()}: embed/table is no matrix but a table; narrow where")
    for name, t in found.items():
        path, layers = cut_key(name)
        if isinstance(flat[path], Weight):
            raise InputError(f"{type(method).__name__.lower()}: {path} is {type(flat[path]).__name__}, of which no "
                             "part can be taken out; take lora, or a base that is not quantised")  # fmt: skip
        w = flat[path][slice(*layers)] if layers else flat[path]
        rank = min(t["b"].shape[-2], *w.shape[-2:])
        a, b = parts(w, method.factor(params, name, {"b": t["b"][..., :rank, :]}), split, rank, False)
        found[name] = {"a": a, "b": b}
    return found


def lessen(method: LoRA, split: Any, params: Any, trainable: Any) -> dict[str, Any]:
    """The base without what `begin` makes of it; where that is done it stays."""

    def left(w: Any, path: str, of: dict[Any, Any]) -> Any:
        if isinstance(w, Weight):
            return w if isinstance(w, Residual) else dataclasses.replace(w, w=left(w.w, path, of))  # type: ignore
        for layers, t in of.items():
            name, at = (f"{path}[{layers[0]}:{layers[1]}]", slice(*layers)) if layers else (path, ...)
            w = w.at[at].set(parts(w[at], method.factor(params, name, t), split, t["b"].shape[-2], True))
        return Residual(w)

    flat, found = named(params), group(trainable).items()
    return replace(params, {path: left(flat[path], path, of) for path, of in found if path in flat})
