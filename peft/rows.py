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
from ..model import generate as generate_alike
from ..model.generate import STATIC, decode
from .base import Method


def chosen(trainables: Sequence[Any], which_B: Any) -> Any:
    """The trainable tree of each row, stacked [B, ...]: row b has trainables[which_B[b]].

    Raises InputError for trees of other shapes (another rank: `peft.arithmetic.rerank`) and for numbers of none.
    """
    which = np.asarray(which_B)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trainables]
    if odd := next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0):
        raise InputError(f"adapter {odd} is of other shapes than adapter 0; bring them to one method, the same targets "
                         "and one rank (peft.arithmetic.rerank)")  # fmt: skip
    if which.size and not 0 <= which.min() <= which.max() < len(trainables):
        raise InputError(f"which: {which.min()} to {which.max()}, and there are {len(trainables)} adapters, from 0 on")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[which], *trainables)


def each_row(fn: Callable[..., Any], params: Any, method: Method, mine: Any, *rows: Any) -> Any:
    """fn(bound, context, *row) of every row, `mine` as `chosen` gives it: the base's products are of all rows at once,
    those of the adapters a batch of small ones."""

    def one(trainable: Any, *row: Any) -> Any:
        return fn(method.bind(params, trainable), method.context(trainable), *(x[None] for x in row))

    return jax.tree.map(lambda x: x[:, 0], jax.vmap(one)(mine, *rows))


def apply(
    model: Transformer, params: Any, method: Method, trainables: Sequence[Any], which_B: Any, ids_BT: Array
) -> Array:
    """logits_BTV, row b by trainables[which_B[b]]: what `peft.apply` gives for it alone."""
    logits = lambda bound, context, ids: forward(model, bound, ids, context=context)[0]  # noqa: E731
    return each_row(logits, params, method, chosen(trainables, which_B), ids_BT)


def losses(
    model: Transformer, params: Any, method: Method, trainables: Sequence[Any], which_B: Any, batch: dict[str, Array]
) -> Array:
    """The loss of each target [B, T], nats; rows as a loader gives them, packed or not."""
    names = sorted(k for k in batch if batch[k].ndim == 2)

    def one(bound: Any, context: Context, *row: Array) -> Array:
        return token_losses(model, bound, dict(zip(names, row, strict=True)), context)

    return each_row(one, params, method, chosen(trainables, which_B), *(batch[name] for name in names))


def generate(
    model: Transformer, params: Any, method: Method, trainables: Sequence[Any], which_B: Any,
    prompts: Sequence[Sequence[int]], new: int, **kw: Any,
) -> list[list[int]]:  # fmt: skip
    """`model.generate` of prompts with an adapter each, in one batch: greedy text is that of each alone."""
    mine, context = chosen(trainables, which_B), method.context(trainables[0])
    if len(np.asarray(which_B)) != len(prompts):
        raise InputError(f"which: {len(np.asarray(which_B))} numbers for {len(prompts)} prompts; one each is wanted")
    decode_fn = partial(_decode, method, params)
    return generate_alike(model, mine, prompts, new, context=context, decode_fn=decode_fn, **kw)


@partial(jax.jit, static_argnames=("method", *STATIC))
def _decode(
    method: Method, params: Any, model: Transformer, mine: Any, past: Any, ids_BT: Array, lengths_B: Array,
    key: Array, allowed_V: Any, new: int, stop: tuple[int, ...], sampling: Any, tokens: int,
) -> Array:  # fmt: skip
    """`decode` of rows that have an adapter each, and a key each; the past is that of the row's own adapter."""
    if len(ids_BT) != len(jax.tree.leaves(mine)[0]):
        raise InputError("a base with longrope takes prompts across its first length one by one; give adapters singly")

    def one(bound: Any, context: Context, ids: Array, length: Array, key: Array) -> Array:
        return decode(model, bound, context.past, ids, length, key[0], allowed_V, new, stop, sampling, tokens)

    return each_row(one, params, method, mine, ids_BT, lengths_B, jax.random.split(key, len(ids_BT)))
