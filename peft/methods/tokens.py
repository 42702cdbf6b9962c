"""Trainable tokens: some rows of the token table train, the others stay (HF PEFT's TRAINABLE_TOKENS)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...model import Weight, static
from ...model.tree import named, replace
from ..base import Method
from .prompt import in_vocabulary


class TokensTable(Weight):
    """The token table with its rows `ids` replaced, in the lookup and in a tied output projection alike."""

    w: Any  # [V, D] frozen
    rows: Array  # [len(ids), D]
    ids: tuple[int, ...] = static(default=())

    def __getitem__(self, ids: Array) -> Array:
        order = np.argsort(self.ids)
        ordered = jnp.array(np.array(self.ids, np.int32)[order])
        at = jnp.minimum(jnp.searchsorted(ordered, ids), len(self.ids) - 1)
        return jnp.where((ordered[at] == ids)[..., None], self.rows[jnp.array(order)[at]], self.w[ids])

    @property
    def T(self) -> Any:
        return TokensHead(self.w.T, self.rows, self.ids)

    @property
    def tied(self) -> bool:
        """Whether the transpose has the rows that the lookup gives, so that one table does both."""
        return getattr(self.w, "tied", not isinstance(self.w, Weight))


class TokensHead(Weight):
    """x @ w with the columns `ids` from the rows that replace them."""

    w: Any  # [D, V] frozen
    rows: Array  # [len(ids), D]
    ids: tuple[int, ...] = static(default=())

    def __rmatmul__(self, x: Array) -> Array:
        return (x @ self.w).at[..., jnp.array(self.ids)].set(x @ self.rows.T)


class Tokens(Method):
    """table[ids] = rows, which start as the base's; a tied output projection has them too (HF PEFT)."""

    demo = False

    ids: tuple[int, ...] = (0, 1)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        ids = in_vocabulary("tokens", self.ids, table.shape[0])
        if len(set(ids)) < len(ids):
            raise InputError(f"tokens: an id is twice among {ids}; give each once")
        return {"embed/table": {"rows": jnp.array(table)[jnp.array(ids)].astype(jnp.float32)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        return replace(params, {"embed/table": TokensTable(table, **trainable["embed/table"], ids=self.ids)})
