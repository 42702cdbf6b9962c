"""Weight: a registered pytree node that stands where a matrix was and says what `x @ w` means."""

import dataclasses
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

from .backend import backend
from .sharding import context_shards


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure (compared by jit, not traced)."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
class Weight:
    """Base of all weights: annotate the fields, define `__rmatmul__` (a matrix) or `__getitem__` (a table).

    Every array field of a weight under stacked `layers/` has the layer axis first, as the matrix has.
    `linear` says that `x @ w` is linear in x, so that `fold` may replace the weight by the matrix `I @ w`.
    `projects` says of a table that only its transpose, the output projection, is another than that of the table `w`.
    """

    linear: ClassVar[bool] = True
    projects: ClassVar[bool] = False
    __array_ufunc__ = None  # numpy_array @ weight reaches __rmatmul__

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        meta = [f.name for f in fields if f.metadata.get("static")]
        jax.tree_util.register_dataclass(cls, [f.name for f in fields if f.name not in meta], meta)

    def __rmatmul__(self, x: Array) -> Array:
        raise TypeError(f"{type(self).__name__} is not a matrix: it defines no `x @ w`")

    def __getitem__(self, ids: Array) -> Array:
        raise TypeError(f"{type(self).__name__} is not a table: it defines no `w[ids]`")

    @property
    def T(self) -> Any:
        """The transpose, which a tied output projection needs of its table."""
        raise TypeError(f"{type(self).__name__} defines no transpose, so it cannot serve a tied output projection")

    def astype(self, dtype: Any) -> Self:
        """The weight with its floating arrays in `dtype`; a quantised weight, which keeps its scales, overrides it."""
        inner = lambda x: isinstance(x, Weight) and x is not self  # noqa: E731
        cast = lambda x: x.astype(dtype) if inner(x) or jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        return jax.tree.map(cast, self, is_leaf=inner)

    def dense(self) -> Array:
        """The matrix [D, F] this weight multiplies by, `I @ w`; override where there is a cheaper way."""
        rows = getattr(base_weight(self), "shape", jax.tree.leaves(self)[0].shape)[0]
        return jnp.eye(rows) @ self


def weight_chain(w: Any) -> list[Any]:
    """A weight, the one that it holds as `w`, and so on down to what they stand on: an array, or a quantised matrix."""
    found = [w]
    while isinstance(found[-1], Weight) and getattr(found[-1], "w", None) is not None:
        found.append(found[-1].w)  # type: ignore[attr-defined]
    return found


def base_weight(w: Any) -> Any:
    """The array, or the quantised matrix, that a weight stands on."""
    return weight_chain(w)[-1]


def matmul(x: Array, w: Any) -> Array:
    """`x @ w` in x's dtype for x [..., D] and a matrix or weight [D, F] of any: the one place that decides how.

    XLA's CPU backend runs a 2-D product 1.1-1.3 times faster than the same product with batch axes; an accelerator
    does not care, and there flattening could hide a sharded sequence axis.
    """
    if x.ndim <= 2 or backend() != "cpu" or context_shards(x.shape[-2]) > 1:
        return _product(x, w)
    y = _product(x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(x: Array, w: Any) -> Array:
    """x @ w with w cast for this product alone, and again in the backward pass: jax would keep the cast weights of all
    layers for it, a second base in the compute dtype."""
    leaves = jax.tree.leaves(w, is_leaf=lambda leaf: hasattr(leaf, "dtype"))  # a quantised matrix is one
    if all(leaf.dtype == x.dtype or not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        return x @ w
    cast = lambda x, w: x @ w.astype(x.dtype)  # noqa: E731
    return jax.checkpoint(cast, prevent_cse=False)(x, w)
