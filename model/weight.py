"""Weight: a registered pytree node that replaces a matrix and defines `x @ w`."""

import dataclasses
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

from .backend import backend
from .sharding import context_shards


def static(**kwargs: Any) -> Any:
    """A dataclass field that belongs to the structure of the tree: jit compares it and does not trace it."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
class Weight:
    """Base class of all weights: annotate the fields, define `__rmatmul__` (a matrix) or `__getitem__` (a table).

    Under stacked `layers/`, every array field has the layer axis first, like the matrix itself.
    linear: `x @ w` is linear in x, so `fold` may replace the weight by the matrix `I @ w`.
    projects: a table that changes only the tied output projection (its transpose), and looks up rows as `w` does.
    """

    linear: ClassVar[bool] = True
    projects: ClassVar[bool] = False
    __array_ufunc__ = None  # numpy_array @ weight reaches __rmatmul__

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        static_names = [f.name for f in fields if f.metadata.get("static")]
        array_names = [f.name for f in fields if f.name not in static_names]
        jax.tree_util.register_dataclass(cls, array_names, static_names)

    def __rmatmul__(self, x: Array) -> Array:
        raise TypeError(f"{type(self).__name__} is not a matrix: it defines no `x @ w`")

    def __getitem__(self, ids: Array) -> Array:
        raise TypeError(f"{type(self).__name__} is not a table: it defines no `w[ids]`")

    @property
    def T(self) -> Any:
        """The transpose of a table, which a tied output projection multiplies by."""
        raise TypeError(f"{type(self).__name__} defines no transpose, so it cannot serve a tied output projection")

    def astype(self, dtype: Any) -> Self:
        """The weight with its floating-point arrays in `dtype`; weights inside it decide for themselves."""

        def is_inner(x: Any) -> bool:
            return isinstance(x, Weight) and x is not self

        def cast(x: Any) -> Any:
            return x.astype(dtype) if is_inner(x) or jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(cast, self, is_leaf=is_inner)

    def dense(self) -> Array:
        """The matrix [D, F] that a linear weight multiplies by, `I @ w`. Override it where there is a cheaper way."""
        rows = getattr(base_weight(self), "shape", jax.tree.leaves(self)[0].shape)[0]
        return jnp.eye(rows) @ self


def weight_chain(w: Any) -> list[Any]:
    """A weight, the weight it wraps in its field `w`, and so on down to an array or a quantised matrix."""
    chain = [w]
    while isinstance(chain[-1], Weight) and getattr(chain[-1], "w", None) is not None:
        chain.append(chain[-1].w)  # type: ignore[attr-defined]
    return chain


def base_weight(w: Any) -> Any:
    """The array or quantised matrix at the bottom of a chain of weights."""
    return weight_chain(w)[-1]


def matmul(x: Array, w: Any) -> Array:
    """`x @ w` in the dtype of x, for x [..., D] and a matrix or weight [D, F] of any dtype.

    Batch axes are flattened here and nowhere else: XLA's CPU backend runs a 2-D product 1.1-1.3 times faster than the
    same product with batch axes. Accelerators show no difference, and there flattening could hide a sharded T axis.
    """
    if x.ndim <= 2 or backend() != "cpu" or context_shards(x.shape[-2]) > 1:
        return _product(x, w)
    y = _product(x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(x: Array, w: Any) -> Array:
    """x @ w with w cast to the dtype of x.

    The backward pass casts again: otherwise jax would keep the cast weights of all layers, a second copy of the base.
    """
    leaves = jax.tree.leaves(w, is_leaf=lambda leaf: hasattr(leaf, "dtype"))  # a quantised matrix is one leaf
    if all(leaf.dtype == x.dtype or not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        return x @ w
    return jax.checkpoint(lambda x, w: x @ w.astype(x.dtype), prevent_cse=False)(x, w)
