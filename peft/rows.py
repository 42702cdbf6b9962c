"""Many adapters in one batch: each row has its own, over one copy of the base."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from ..model import Context, Transformer, forward, token_losses
from ..model import generate as model_generate
from ..model.generate import STATIC, decode
from .base import Method


def stack_rows(trainables: Sequence[Any], which_B: Any) -> Any:
    """Return the trainable tree of each row, stacked [B, ...]: row b has trainables[which_B[b]].

    Raises InputError for trees of different shapes, and for an index out of range.
    """
    which = np.asarray(which_B)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trainables]
    if other := next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0):
        raise InputError(f"adapter {other} is of other shapes than adapter 0; bring them to one method, the same "
                         "targets and one rank (peft.merging.rerank)")  # fmt: skip
    if which.size and not 0 <= which.min() <= which.max() < len(trainables):
        raise InputError(f"which: {which.min()} to {which.max()}, and there are {len(trainables)} adapters, from 0 on")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[which], *trainables)


def map_rows(fn: Callable[..., Any], params: Any, method: Method, stacked: Any, *rows: Any) -> Any:
    """Return fn(bound, context, *row) of every row, with the row's tree of `stacked` (see `stack_rows`).

    The base's products are of all rows at once, those of the adapters a batch of small ones.
    """

    def of_row(trainable: Any, *row: Any) -> Any:
        return fn(method.bind(params, trainable), method.context(trainable), *(x[None] for x in row))

    return jax.tree.map(lambda x: x[:, 0], jax.vmap(of_row)(stacked, *rows))


def apply(
    model: Transformer, params: Any, method: Method, trainables: Sequence[Any], which_B: Any, ids_BT: Array
) -> Array:
    """Return logits_BTV, with row b as `peft.apply` computes it from trainables[which_B[b]]."""

    def logits(bound: Any, context: Context, ids: Array) -> Array:
        return forward(model, bound, ids, context=context)[0]

    return map_rows(logits, params, method, stack_rows(trainables, which_B), ids_BT)


def losses(
    model: Transformer, params: Any, method: Method, trainables: Sequence[Any], which_B: Any, batch: dict[str, Array]
) -> Array:
    """Return the loss of each target [B, T], nats, of rows as a loader yields them, packed or not."""
    names = sorted(k for k in batch if batch[k].ndim == 2)

    def row_losses(bound: Any, context: Context, *row: Array) -> Array:
        return token_losses(model, bound, dict(zip(names, row, strict=True)), context)

    return map_rows(row_losses, params, method, stack_rows(trainables, which_B), *(batch[name] for name in names))


def generate(
    model: Transformer, params: Any, method: Method, trainables: Sequence[Any], which_B: Any,
    prompts: Sequence[Sequence[int]], new: int, **kw: Any,
) -> list[list[int]]:  # fmt: skip
    """Return `model.generate` of prompts with an adapter each, in one batch; greedy text is that of each alone."""
    stacked, context = stack_rows(trainables, which_B), method.context(trainables[0])
    if len(np.asarray(which_B)) != len(prompts):
        raise InputError(f"which: {len(np.asarray(which_B))} numbers for {len(prompts)} prompts; one each is wanted")
    decode_fn = partial(_decode, method, params)
    return model_generate(model, stacked, prompts, new, context=context, decode_fn=decode_fn, **kw)


@partial(jax.jit, static_argnames=("method", *STATIC))
def _decode(
    method: Method, params: Any, model: Transformer, stacked: Any, past: Any, ids_BT: Array, lengths_B: Array,
    key: Array, allowed_V: Any, new: int, stop: tuple[int, ...], sampling: Any, tokens: int,
) -> Array:  # fmt: skip
    """Run `decode` with an adapter and a key for each row; the past is that of the row's own adapter."""
    if len(ids_BT) != len(jax.tree.leaves(stacked)[0]):
        raise InputError("a base with longrope takes prompts across its first length one by one; give adapters singly")

    def decode_row(bound: Any, context: Context, ids: Array, length: Array, key: Array) -> Array:
        return decode(model, bound, context.past, ids, length, key[0], allowed_V, new, stop, sampling, tokens)

    return map_rows(decode_row, params, method, stacked, ids_BT, lengths_B, jax.random.split(key, len(ids_BT)))
