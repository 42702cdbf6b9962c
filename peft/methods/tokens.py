"""Parts of the token table: some rows of it (Tokens), or one of its two uses in a tied base (Head, Lookup)."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import InputError
from ...model import Weight, static
from ...model.tree import named, replace
from ...model.weight import weight_chain
from ..base import Method
from ..hf_spec import IDENTITY, IDS, NAMES, PREFIX, TRANSPOSED, Companion, HFSpec, HFTensor, Key, ends_with
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


def _read_tokens(c: Any, values: Any, module: Any, model: Any) -> dict[str, Any]:
    names, table = c["target_modules"] or (), model.table.name
    if not all(ends_with(table, [name]) for name in ([names] if isinstance(names, str) else names)):
        raise InputError(f"target_modules {names}: trainable tokens are rows of {table} here")
    return {"ids": tuple(c["token_indices"])}


def _read_beside(c: Any, picked: Any, model: Any) -> "Tokens | None":
    """Return the rows that train beside a LoRA."""
    ids, table = c.get("trainable_token_indices"), model.table.name
    if ids and any(m.kind == "tied head" for m in picked.targets):
        raise InputError(f"trainable tokens beside {c['peft_type']} of lm_head, which is the token table of this base, "
                         "is not known here; leave lm_head out")  # fmt: skip
    if isinstance(ids, dict) and ids:
        if len(ids) != 1 or not ends_with(table, ids):
            raise InputError(f"trainable_token_indices of {', '.join(ids)}: rows of {table} are, here")
        ids = next(iter(ids.values()))
    return Tokens(ids=tuple(ids)) if ids else None


def _locate_rows(path: str, layer: Any, file: Any) -> list[tuple[str, HFTensor]]:
    owners = [file.model.table.name] + (["lm_head"] if file.model.config.tied and file.alone else [])
    middle = "" if file.alone else "token_adapter."
    return [("rows", HFTensor(f"{PREFIX}{owner}.{middle}trainable_tokens_delta", IDENTITY)) for owner in owners]


class Tokens(Method):
    """table[ids] = rows, which start as the base's; a tied output projection has them too (HF PEFT).

    rows [len(ids), D]. HF PEFT: TRAINABLE_TOKENS.
    """

    demo = False
    axes: ClassVar = {"rows": "nF"}

    ids: tuple[int, ...] = (0, 1)

    hf = HFSpec(
        "TRAINABLE_TOKENS",
        keys={"target_modules": Key(None, kind=NAMES), "token_indices": Key((), "ids", IDS)},
        kinds=(),
        base_tables="omitted",
        read=_read_tokens,
        locate=_locate_rows,
        companion=Companion(
            read=_read_beside,
            write=lambda method, *_: {"trainable_token_indices": list(method.ids)},
            alone=lambda places, model: Tokens.hf,
            last=True,
        ),
    )

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

    hf = HFSpec(
        locate=lambda *_: [("head", HFTensor(f"{PREFIX}lm_head.weight", TRANSPOSED))],
        companion=Companion(
            read=lambda c, picked, model: Head() if any(m.kind == "tied head" for m in picked.saved) else None,
            write=lambda *_: {"modules_to_save": ["lm_head"]},
        ),
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if "head/matrix" in named(params):
            raise InputError("head: this base has a head of its own; take --method subset --method.where head/matrix")
        return {"embed/table": {"head": jnp.array(named(params)["embed/table"], jnp.float32, copy=True).T}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        if any(isinstance(w, Weight) and w.projects for w in weight_chain(table)):
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

    hf = HFSpec(
        locate=lambda path, layer, file: [("table", HFTensor(f"{PREFIX}{file.model.table.name}.weight", IDENTITY))],
        companion=Companion(
            read=lambda c, picked, model: Lookup() if model.config.tied and model.table in picked.saved else None,
            write=lambda method, places, targets, spec, model: {"modules_to_save": [model.table.name]},
        ),
    )

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        if "head/matrix" in named(params):
            raise InputError("lookup: this base has a head of its own; take --method subset --method.where embed/table")
        return {"embed/table": {"table": jnp.array(named(params)["embed/table"], jnp.float32, copy=True)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        if not all(w.projects for w in weight_chain(table)[:-1]):
            raise InputError("chain: lookup replaces the table that an earlier method has taken; put lookup first, or "
                             "let only one of them have it")  # fmt: skip
        return replace(params, {"embed/table": OwnTable(table, **trainable["embed/table"])})
