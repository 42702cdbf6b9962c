"""SHiRA: a few entries of the matrix itself (arXiv:2406.13175)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Drawn, Size
from ...model import Weight
from ...model.tree import is_stacked, name_and_layers, split_layer_index
from ..base import Method
from ..random_projections import recomputed, sides
from ..targets import Target, each_layer, each_matrix, layer_keys, wrap_weights


class SHiRAWeight(Weight):
    """x @ (w with values added at their places), a matrix that lives for the product alone."""

    w: Any  # [D, F] frozen
    values: Array  # [k]
    places: Array  # int32 [2, k]: columns of w, rows of w

    def __rmatmul__(self, x: Array) -> Array:
        def product(x: Array, w: Any, values: Array, places: Array) -> Array:
            w = w.dense() if isinstance(w, Weight) else w
            return x @ w.astype(jnp.result_type(w, values)).at[places[1], places[0]].add(values)

        return recomputed(product)(x, self.w, self.values, self.places)


class SHiRA(Method):
    """W + S, S with rank (D + F) entries at random places, 0 at first (arXiv:2406.13175)."""

    demo = False

    rank: Size = 32
    where: str = "linear"
    seed: Drawn = None  # of the places; None: the run's seed, or 0 outside a run
    given: Any = None  # a Given of the places [L, k, 2] or [k, 2] of each target, (row, column) of W [out, in]

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        make = lambda key, D, F: {"values": jnp.zeros(min(self.rank * (D + F), D * F))}  # noqa: E731
        return each_matrix(key, params, self.where, make, "shira")

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        found = places(self, params, trainable)
        return wrap_weights(params, {key: t | {"places": found[key]} for key, t in trainable.items()}, SHiRAWeight)


def places(method: SHiRA, params: Any, trainable: Any) -> dict[str, Array]:
    """{target: int32 [2, k], or [L, 2, k]}: rows and columns of W [out, in], HF PEFT's shira_indices."""

    def one(key: str, depth: int, k: int) -> Array:
        (path, _), (name, layers), (D, F) = split_layer_index(key), name_and_layers(key), sides(params, key)
        stacked = is_stacked(path)
        t = Target(key, path, name, layers or (range(depth) if stacked else None), stacked, (D, F))
        keys = layer_keys(jax.random.key(method.seed or 0, impl="threefry2x32"), t, "places")
        return each_layer(t, partial(strata, k=k, D=D, F=F), keys)

    if method.given is None:
        return {key: one(key, len(t["values"]), t["values"].shape[-1]) for key, t in trainable.items()}
    if lost := [key for key in trainable if key not in method.given]:
        raise InputError(f"shira: the given places have none of {lost[0]}, which the adapter trains; give them too")
    return {key: jnp.swapaxes(jnp.asarray(method.given[key], jnp.int32), -1, -2) for key in trainable}


def strata(key: Array, k: int, D: int, F: int) -> Array:
    """k places of W [F, D], row by row: one in each of k runs of equal length, so none twice and nothing to sort."""
    length, rest = divmod(D * F, k)
    j = jnp.arange(k, dtype=jnp.uint32)
    at = j * length + jnp.minimum(j, rest) + jax.random.randint(key, (k,), 0, length + (j < rest), jnp.uint32)
    return jnp.stack([at // D, at % D]).astype(jnp.int32)
