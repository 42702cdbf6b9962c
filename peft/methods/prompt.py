"""Prompt tuning: P learned token embeddings before the text (arXiv:2104.08691)."""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from ... import InputError
from ...bounds import Bounds, Size
from ...model import Context, Weight
from ...model.tree import named, replace
from ..base import Method
from .encoder import encode, encoder


class PromptTable(Weight):
    """The token table with P rows more: ids V..V+P-1 are the prompt. The output projection keeps its V columns."""

    linear = False

    w: Any  # [V, D] frozen
    prompt: Array  # [P, D]

    def __getitem__(self, ids: Array) -> Array:
        V = jax.tree.leaves(self.w)[0].shape[0]  # of a weight too
        rows = self.prompt[jnp.maximum(ids - V, 0)]
        return jnp.where((ids < V)[..., None], self.w[jnp.minimum(ids, V - 1)], rows)

    @property
    def T(self) -> Any:
        return self.w.T


class Prompt(Method):
    """[prompt; embed(ids)] with P = tokens rows that start as rows of the vocabulary (arXiv:2104.08691).

    No weight decay: a row is a hidden state, and a norm follows, so that 0 is no simpler a prompt (the paper has 1e-5).
    """

    identity = False
    lr_multiplier = 100.0
    decay_rule = ""

    tokens: Size = 20
    init_from: Literal["vocab", "random", "ids"] = "vocab"  # drawn rows of the table, N(0, 1), or those of `ids`
    ids: tuple[int, ...] = ()  # if given, where the rows start; repeated or cut to `tokens`
    text: str = ""  # which a run's tokenizer makes `ids` of

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        V, D = table.shape
        if self.init_from == "ids" or self.ids or self.text:
            ids = in_vocabulary("prompt", self.ids, V)
            picked = jnp.array([ids[i % len(ids)] for i in range(self.tokens)])
        elif self.init_from == "random":
            return {"embed/table": {"prompt": jax.random.normal(key, (self.tokens, D))}}
        else:
            picked = jax.random.choice(key, V, (self.tokens,), replace=False)
        return {"embed/table": {"prompt": jnp.array(table)[picked].astype(jnp.float32)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], **trainable["embed/table"])})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)


def in_vocabulary(what: str, ids: tuple[int, ...], V: int) -> tuple[int, ...]:
    """The ids, if there are any and embed/table has a row for each; else InputError."""
    if not ids:
        raise InputError(f"{what}: no ids; give ids= (a run makes those of a text by its tokenizer)")
    if wrong := [i for i in ids if not 0 <= i < V]:
        raise InputError(f"{what}: id {wrong[0]} is no row of embed/table; wanted ids from 0 to {V - 1}")
    return ids


class PTuning(Method):
    """[mlp(prompt); embed(ids)], prompt N(0, 1), mlp D -> hidden -> hidden -> D with ReLU (arXiv:2103.10385).

    Weight decay shrinks the matrices of the mlp, not the prompt, which is a state.
    """

    identity = False
    lr_multiplier = 10.0
    decay_rule = r".*/w\d"
    demo = False

    tokens: Size = 20
    hidden: Annotated[int, Bounds(0, 65_536)] = 0  # 0: D

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        D = named(params)["embed/table"].shape[1]
        h = self.hidden or D
        return {"embed/table": encoder(key, self.tokens, D, h, h, D)}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        rows = encode(trainable["embed/table"], jax.nn.relu)
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], rows)})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)
