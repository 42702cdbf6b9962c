"""Prompt tuning: P learned token embeddings before the text (arXiv:2104.08691)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..model import Context, Weight
from ..model.tree import named, replace
from .base import Method


class PromptTable(Weight):
    """The token table with P rows more: ids V..V+P-1 are the prompt. The output projection keeps its V columns."""

    linear = False

    w: Any  # [V, D] frozen
    prompt: Array  # [P, D]

    def __getitem__(self, ids: Array) -> Array:
        V = self.w.shape[0]
        rows = self.prompt[jnp.maximum(ids - V, 0)]
        return jnp.where((ids < V)[..., None], self.w[jnp.minimum(ids, V - 1)], rows)

    @property
    def T(self) -> Any:
        return self.w.T


class Prompt(Method):
    """[prompt; embed(ids)] with P = tokens rows that start as rows of the vocabulary (arXiv:2104.08691)."""

    identity = False
    rate = 100.0

    tokens: int = 20

    def init(self, key: Array, params: Any) -> dict[str, Any]:
        table = named(params)["embed/table"]
        rows = jax.random.choice(key, table.shape[0], (self.tokens,), replace=False)
        return {"embed/table": {"prompt": jnp.array(table)[rows].astype(jnp.float32)}}

    def bind(self, params: Any, trainable: Any) -> dict[str, Any]:
        return replace(params, {"embed/table": PromptTable(named(params)["embed/table"], **trainable["embed/table"])})

    def context(self, trainable: Any) -> Context:
        return Context(tokens=self.tokens)
