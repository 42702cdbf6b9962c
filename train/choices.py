"""The losses of many continuations of a prompt, which is read once for all of them.

A row holds the prompt as a segment that every query sees, and after it the continuations, each a segment of its own
that starts at the position where the prompt ends: no continuation sees another, and each has the loss it has alone.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError
from ..data.columns import chat_of
from ..data.loader import batches
from ..data.pack import empty_row
from ..data.sft import encode_examples, render_prompts
from ..model import Context, Transformer, check_prompt_lengths, token_scores
from ..model.attention import VIRTUAL
from ..model.sharding import to_host
from .setup import BATCH_DTYPES

WIDTH = 1024  # positions of a row, unless one continuation needs more

Ids = Sequence[int]


@partial(jax.jit, static_argnames=("model", "tokens", "n", "chunk"))
def _scores(model: Transformer, bound: Any, past: Any, batch: Any, tokens: int, n: int, chunk: int = 8192) -> Any:
    """Return (loss, whether every token is the most likely one) of each segment of each row [B, n]."""
    nll_BT, best_BT = token_scores(model, bound, batch, Context(tokens, past), chunk)
    target_BT, segment_BT = batch["weights"] > 0, jnp.maximum(batch["segments"], 0)
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=n + 1))
    misses = (target_BT & ~best_BT).astype(jnp.int32)
    return sums(nll_BT * target_BT, segment_BT)[:, 1:], sums(misses, segment_BT)[:, 1:] == 0


def continuation_losses(
    model: Transformer,
    bound: Any,
    context: Context,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    batch: int = 4,
    where: Sequence[str] = (),
) -> np.ndarray:
    """Return -log p(continuation | prompt) [prompts, continuations] in nats.

    Raises InputError for an empty prompt or continuation, and for a prompt (named by `where`) that exceeds the context
    with the longest continuation.
    """
    if not all(prompts) or not all(continuations):
        raise InputError("a prompt or a continuation is empty: each needs one token or more")
    longest = max(map(len, continuations))
    check_prompt_lengths(model.config, prompts, longest - 1, context.length, where)  # the last token is not read
    groups, room = _plan(model, prompts, continuations)
    n, prefix = max(map(len, groups)), max(map(len, prompts)) - 1
    T = -(-(prefix + room) // 32) * 32
    rows = [_row(prompt, [continuations[i] for i in group], T) for prompt in prompts for group in groups]
    losses = _segment_scores(model, bound, context, rows, n, batch)[0].reshape(len(prompts), len(groups), n)
    return np.concatenate([losses[:, g, : len(group)] for g, group in enumerate(groups)], axis=1)


def pair_scores(
    model: Transformer, bound: Any, context: Context, pairs: Sequence[tuple[Ids, Ids]], batch: int = 8, T: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (-log p(continuation | prompt) in nats, whether greedy decoding writes it) of each pair [pairs].

    T: positions of a row; 0: as many as the longest pair needs. Raises InputError for a pair that exceeds the context.
    """
    for i, (prompt, continuation) in enumerate(pairs, 1):
        check_prompt_lengths(model.config, [prompt], len(continuation) - 1, context.length, [f"pair {i}"])
    T = T or -(-max(len(prompt) - 1 + len(continuation) for prompt, continuation in pairs) // 32) * 32
    rows = [_row(prompt, [continuation], T) for prompt, continuation in pairs]
    losses, greedy = _segment_scores(model, bound, context, rows, 1, batch)
    return losses[:, 0], greedy[:, 0]


def prompt_reads(model: Transformer, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> int:
    """Return how many times `continuation_losses` reads each prompt."""
    return len(_plan(model, prompts, continuations)[0])


def answer_continuations(tokenizer: Any, row: dict[str, Any], answers: Sequence[str]) -> list[list[int]]:
    """Return the ids of each answer, with what ends it, after a row's rendered prompt.

    Raises InputError for a chat template that writes the prompt of an answered row in another way.
    """
    dialogue = chat_of(row, "a row with choices")  # its reply may be more than text
    chats = [("a choice", dialogue if text == row.get("completion") else dialogue.answered(text)) for text in answers]
    prompt, continuations = render_prompts(chats[:1], tokenizer)[0], []
    for ids, weights in encode_examples(chats, tokenizer):
        if list(ids[: len(prompt)]) != list(prompt):
            raise InputError(
                "choices: the tokenizer's chat template writes a reply in another way than it begins one; answer by "
                "generation"
            )
        continuations.append(list(ids[len(prompt) : int(np.flatnonzero(weights)[-1]) + 1]))
    return continuations


def _segment_scores(model: Any, bound: Any, context: Context, rows: Sequence[Any], n: int, batch: int) -> Any:
    """Return `_scores` of all rows [rows, n]."""
    scores = []
    for arrays in batches(rows, batch):
        arrays = {name: arrays[name] for name in BATCH_DTYPES}
        scores.append(jax.tree.map(to_host, _scores(model, bound, context.past, arrays, context.tokens, n)))
    return [np.concatenate(parts)[: len(rows)] for parts in zip(*scores, strict=True)]


def _plan(model: Transformer, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> tuple[list[list[int]], int]:
    """Return (the continuations that share a row, the positions that they have there)."""
    # A window would hide the prompt's beginning from what is far behind it; learned positions end with the context.
    shared = not any(model.config.windows) and model.config.rope is not None
    prefix, longest = max(map(len, prompts)) - 1, max(map(len, continuations))
    room = max(min(sum(map(len, continuations)), WIDTH - prefix), longest) if shared else longest
    return list(_groups(continuations, room, len(continuations) if shared else 1)), room


def _groups(continuations: Sequence[Ids], room: int, most: int) -> Iterator[list[int]]:
    """Yield groups of at most `most` continuations, in order, that fit into `room` positions together."""
    group, used = [], 0
    for i, continuation in enumerate(continuations):
        if group and (used + len(continuation) > room or len(group) == most):
            yield group
            group, used = [], 0
        group, used = [*group, i], used + len(continuation)
    yield group


def _row(prompt: Ids, continuations: Sequence[Ids], T: int) -> dict[str, np.ndarray]:
    """Return a row with the prompt without its last token, then each continuation with that token before it: inputs
    are one token behind their targets."""
    row, start, prefix = empty_row(T), len(prompt) - 1, len(prompt) - 1
    row["ids"][:prefix], row["positions"][:prefix] = prompt[:prefix], np.arange(prefix)
    row["segments"][:prefix] = VIRTUAL if len(continuations) > 1 else 1
    for segment, continuation in enumerate(continuations, 1):
        end = start + len(continuation)
        row["ids"][start:end], row["targets"][start:end] = [prompt[-1], *continuation[:-1]], continuation
        row["segments"][start:end], row["weights"][start:end] = segment, 1.0
        row["positions"][start:end] = np.arange(prefix, prefix + len(continuation))
        start = end
    return row
