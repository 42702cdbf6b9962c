"""SHiRA: a few entries of the matrix itself (arXiv:2406.13175)."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...bounds import Drawn, Size
from ...model import Weight
from ..base import Method
from ..hf_spec import IDENTITY, WHOLE, Entry, FixedTensors, HFSpec, Key
from ..random_projections import draw_layers, matrix_shape, recomputed
from ..targets import FixedArrays, Target, wrap_weights


class SHiRAWeight(Weight):
    """x @ (w with values added at their places). The sum exists only during the product."""

    w: Any  # [D, F] frozen
    values: Array  # [k]
    places: Array  # int32 [2, k]: columns of w, rows of w

    def __rmatmul__(self, x: Array) -> Array:
        @recomputed
        def product(x: Array, w: Any, values: Array, places: Array) -> Array:
            w = w.dense() if isinstance(w, Weight) else w
            return x @ w.astype(jnp.result_type(w, values)).at[places[1], places[0]].add(values)

        return product(x, self.w, self.values, self.places)


def _read_places(method: Any, entries: list[Entry], trainable: Any, params: Any, tensors: Any) -> Any:
    """Return SHiRA with the places of its file. Raises InputError if they are missing or outside of the matrix."""
    rows: dict[str, list[Any]] = {}
    for entry in entries:
        name = entry.name.replace("shira_weight", "shira_indices")
        at, wanted = tensors.pop(name, None), (2, trainable[entry.key]["values"].shape[-1])
        if at is None or at.shape != wanted:
            raise InputError(f"{name} {'is missing' if at is None else list(at.shape)}, wanted {list(wanted)}")
        D, F = matrix_shape(params, entry.key)
        if not np.issubdtype(at.dtype, np.integer) or (at < 0).any() or (at >= np.array([[F], [D]])).any():
            raise InputError(f"{name}: places in a matrix [{F}, {D}] are wanted; is it of another base?")
        rows.setdefault(entry.key, []).append(at.T)
    stacked = {entry.key for entry in entries if entry.layer is not None}
    arrays = {key: np.stack(x) if key in stacked else x[0] for key, x in rows.items()}
    return dataclasses.replace(method, given=FixedArrays(**arrays))


def _write_places(method: Any, entries: list[Entry], trainable: Any, shapes: Any) -> dict[str, Any]:
    at = places(method, shapes, trainable)
    layer = lambda entry: at[entry.key] if entry.layer is None else at[entry.key][entry.layer]  # noqa: E731
    names = {entry.name.replace("shira_weight", "shira_indices"): entry for entry in entries}
    return {name: np.asarray(layer(entry), np.int32) for name, entry in names.items()}


class SHiRA(Method):
    """W + S, S with rank (D + F) entries at random places, 0 at first (arXiv:2406.13175).

    The values [rank (D + F)] train. HF PEFT: SHIRA.
    """

    demo = False
    axes: ClassVar = {"values": "k"}

    rank: Size = 32
    where: str = "linear"
    seed: Drawn = None  # of the places; None: the run's seed, or 0 outside a run
    given: Any = None  # FixedArrays of the places [L, k, 2] or [k, 2] of each target, (row, column) of W [out, in]

    hf = HFSpec(
        "SHIRA",
        keys={"r": Key(32, "rank"), "random_seed": Key(None, kind=WHOLE), "mask_type": "random"},
        tensors=IDENTITY.tensors(values="shira_weight"),
        fixed=FixedTensors(_read_places, _write_places, integers=("shira_indices",)),
        conv1d=False,
    )

    def arrays(self, key: Array, target: Target) -> dict[str, Array]:
        D, F = target.shape
        return {"values": jnp.zeros(min(self.rank * (D + F), D * F))}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        at = places(self, params, trainable)
        return wrap_weights(params, {key: t | {"places": at[key]} for key, t in trainable.items()}, SHiRAWeight)


def places(method: SHiRA, params: Any, trainable: Any) -> dict[str, Array]:
    """Return {key: int32 [2, k] or [L, 2, k]}, rows and columns of W [out, in]: HF PEFT's shira_indices."""
    if method.given is not None:
        if missing := [key for key in trainable if key not in method.given]:
            raise InputError(
                f"shira: the given places have none of {missing[0]}, which the adapter trains; give them too"
            )
        return {key: jnp.swapaxes(jnp.asarray(method.given[key], jnp.int32), -1, -2) for key in trainable}

    seed, at = jax.random.key(method.seed or 0, impl="threefry2x32"), {}
    for key, arrays in trainable.items():
        draw = partial(stratified_places, k=arrays["values"].shape[-1])
        at[key] = draw_layers(seed, params, key, arrays["values"], "places", draw)
    return at


def stratified_places(key: Array, D: int, F: int, k: int) -> Array:
    """Draw k places of W [F, D], row by row: one in each of k runs of equal length, hence distinct and sorted."""
    length, rest = divmod(D * F, k)
    j = jnp.arange(k, dtype=jnp.uint32)
    at = j * length + jnp.minimum(j, rest) + jax.random.randint(key, (k,), 0, length + (j < rest), jnp.uint32)
    return jnp.stack([at // D, at % D]).astype(jnp.int32)
