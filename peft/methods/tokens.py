"""Parts of the token table: some rows of it (Tokens), or one of its two uses in a tied base (Head, Lookup)."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...model import Weight, static
from ...model.tree import named, replace
from ...model.weight import stack
from ..base import Method
from .prompt import check_ids


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
        """True if the transpose has the rows of the lookup, so that one table does both."""
        return getattr(self.w, "tied", not isinstance(self.w, Weight))


class TokensHead(Weight):
    """x @ w with the columns `ids` computed from the rows that replace them."""

    w: Any  # [D, V] frozen
    rows: Array  # [len(ids), D]
    ids: tuple[int, ...] = static(default=())

    def __rmatmul__(self, x: Array) -> Array:
        return (x @ self.w).at[..., jnp.array(self.ids)].set(x @ self.rows.T)


class Tokens(Method):
    """table[ids] = rows, which start as the base's; a tied output projection has them too (HF PEFT).

    rows [len(ids), D]. HF PEFT: TRAINABLE_TOKENS.
    """

    demo = False
    axes: ClassVar = {"rows": "nF"}

    ids: tuple[int, ...] = (0, 1)

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        ids = check_ids("tokens", self.ids, table.shape[0])
        if len(set(ids)) < len(ids):
            raise InputError(f"tokens: an id is twice among {ids}; give each once")
        return {"embed/table": {"rows": jnp.array(table)[jnp.array(ids)].astype(jnp.float32)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        return replace(params, {"embed/table": TokensTable(table, **trainable["embed/table"], ids=self.ids)})


class OwnHead(Weight):
    """The token table for lookups, and another matrix as its transpose, the output projection."""

    linear = False
    projects = True

    w: Any  # [V, D] frozen
    head: Array  # [D, V]

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids]

    @property
    def T(self) -> Any:
        return self.head


class Head(Method):
    """logits = x H with H = table.T at first, the table itself frozen: of a tied base (HF PEFT's modules_to_save).

    H [D, V]. `init` raises InputError for a base with a head of its own. HF PEFT: modules_to_save=["lm_head"].
    """

    lr_multiplier = 1.0
    demo = False
    axes: ClassVar = {"head": "FD"}

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if "head/matrix" in named(params):
            raise InputError("head: this base has a head of its own; take --method subset --method.where head/matrix")
        return {"embed/table": {"head": jnp.array(named(params)["embed/table"], jnp.float32, copy=True).T}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        if any(isinstance(w, Weight) and w.projects for w in stack(table)):
            raise InputError("chain: head replaces the output projection, which an earlier method has taken; put head "
                             "first, or let only one of them have it")  # fmt: skip
        return replace(params, {"embed/table": OwnHead(table, **trainable["embed/table"])})


class OwnTable(Weight):
    """Another table for lookups; the output projection keeps the transpose of the base's table."""

    linear = False

    w: Any  # [V, D] frozen
    table: Array  # [V, D]

    def __getitem__(self, ids: Array) -> Array:
        return self.table[ids]

    @property
    def T(self) -> Any:
        return self.w.T


class Lookup(Method):
    """x = table[ids], a tied output projection stays as it was (HF PEFT's modules_to_save of embed_tokens).

    table [V, D], at first the base's. `init` raises InputError for a base with a head of its own. HF PEFT:
    modules_to_save=["embed_tokens"].
    """

    lr_multiplier = 1.0
    demo = False
    axes: ClassVar = {"table": "DF"}

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if "head/matrix" in named(params):
            raise InputError("lookup: this base has a head of its own; take --method subset --method.where embed/table")
        return {"embed/table": {"table": jnp.array(named(params)["embed/table"], jnp.float32, copy=True)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        if not all(w.projects for w in stack(table)[:-1]):
            raise InputError("chain: lookup replaces the table that an earlier method has taken; put lookup first, or "
                             "let only one of them have it")  # fmt: skip
        return replace(params, {"embed/table": OwnTable(table, **trainable["embed/table"])})
