"""The losses of many continuations of a prompt, which is read once for all of them.

A row holds the prompt as a segment that every query sees, and behind it the continuations, a segment each, all from the
position at which the prompt ends: none sees another, and each has the loss that it has alone.
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

WIDTH = 1024  # positions of a row, if one continuation does not need more


@partial(jax.jit, static_argnames=("model", "tokens", "n", "chunk"))
def _scores(model: Transformer, bound: Any, past: Any, batch: Any, tokens: int, n: int, chunk: int = 8192) -> Any:
    """(loss, whether each token is the likeliest) of each segment of each row [B, n]."""
    nll_BT, best_BT = token_scores(model, bound, batch, Context(tokens, past), chunk)
    due_BT, at_BT = batch["weights"] > 0, jnp.maximum(batch["segments"], 0)
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=n + 1))
    return sums(nll_BT * due_BT, at_BT)[:, 1:], sums((due_BT & ~best_BT).astype(jnp.int32), at_BT)[:, 1:] == 0


def continuation_losses(
    model: Transformer, bound: Any, context: Context, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]],
    batch: int = 4, where: Sequence[str] = (),
) -> np.ndarray:  # fmt: skip
    """-log p(tail | prompt) [prompts, tails] in nats. InputError, which names the prompt by `where`, for an empty
    prompt or tail, and for one that, with the longest tail, exceeds the context."""
    if not all(prompts) or not all(tails):
        raise InputError("a prompt or a continuation is empty: each wants one token or more")
    check_prompt_lengths(
        model.config, prompts, max(map(len, tails)) - 1, context.length, where
    )  # the last token is not read
    groups, room = _plan(model, prompts, tails)
    n, lead = max(map(len, groups)), max(map(len, prompts)) - 1
    T = -(-(lead + room) // 32) * 32
    rows = [_row(prompt, [tails[i] for i in group], T) for prompt in prompts for group in groups]
    sums = _of_segments(model, bound, context, rows, n, batch)[0].reshape(len(prompts), len(groups), n)
    return np.concatenate([sums[:, g, : len(group)] for g, group in enumerate(groups)], axis=1)


def pair_scores(
    model: Transformer, bound: Any, context: Context, pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int = 8, T: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(-log p(tail | prompt) in nats, whether the tail is what greedy decoding writes) of each (prompt, tail) [pairs].

    T: positions of a row; 0: as many as the longest pair needs. InputError for a pair that exceeds the context.
    """
    for i, (prompt, tail) in enumerate(pairs, 1):
        check_prompt_lengths(model.config, [prompt], len(tail) - 1, context.length, [f"pair {i}"])
    T = T or -(-max(len(prompt) - 1 + len(tail) for prompt, tail in pairs) // 32) * 32
    rows = [_row(prompt, [tail], T) for prompt, tail in pairs]
    losses, greedy = _of_segments(model, bound, context, rows, 1, batch)
    return losses[:, 0], greedy[:, 0]


def _of_segments(model: Any, bound: Any, context: Context, rows: Sequence[Any], n: int, batch: int) -> Any:
    """`_scores` of all rows [rows, n]."""
    found = []
    for b in batches(rows, batch):
        b = {k: b[k] for k in ("ids", "targets", "weights", "segments", "positions")}
        found.append(jax.tree.map(to_host, _scores(model, bound, context.past, b, context.tokens, n)))
    return [np.concatenate(some)[: len(rows)] for some in zip(*found, strict=True)]


def _plan(model: Transformer, prompts: Sequence[Any], tails: Sequence[Any]) -> tuple[list[list[int]], int]:
    """(which tails share a row, positions that they have there)."""
    # A window would hide a prompt's beginning from what stands far behind it; learned positions end with the context.
    together = not any(model.config.windows) and model.config.rope is not None
    lead, longest = max(map(len, prompts)) - 1, max(map(len, tails))
    room = max(min(sum(map(len, tails)), WIDTH - lead), longest) if together else longest
    return list(_groups(tails, room, len(tails) if together else 1)), room


def readings(model: Transformer, prompts: Sequence[Any], tails: Sequence[Any]) -> int:
    """How often `continuation_losses` reads each prompt."""
    return len(_plan(model, prompts, tails)[0])


def _groups(tails: Sequence[Sequence[int]], room: int, most: int) -> Iterator[list[int]]:
    """Tails, in order, of which a row has room for all of a group."""
    group, taken = [], 0
    for i, tail in enumerate(tails):
        if group and (taken + len(tail) > room or len(group) == most):
            yield group
            group, taken = [], 0
        group, taken = [*group, i], taken + len(tail)
    yield group


def _row(prompt: Sequence[int], tails: Sequence[Sequence[int]], T: int) -> dict[str, np.ndarray]:
    """The prompt but its last token, then each tail behind that token: what is read is one token behind what is due."""
    row, at, p = empty_row(T), len(prompt) - 1, len(prompt) - 1
    row["ids"][:p], row["positions"][:p] = prompt[:p], np.arange(p)
    row["segments"][:p] = VIRTUAL if len(tails) > 1 else 1
    for k, tail in enumerate(tails):
        end = at + len(tail)
        row["ids"][at:end], row["targets"][at:end] = [prompt[-1], *tail[:-1]], tail
        row["segments"][at:end], row["weights"][at:end] = k + 1, 1.0
        row["positions"][at:end] = np.arange(p, p + len(tail))
        at = end
    return row


def chat_tails(tokenizer: Any, row: dict[str, Any], answers: Sequence[str]) -> list[list[int]]:
    """The ids of answers, and of what ends them, behind a row's rendered prompt. InputError for a template that does
    not go on as it began."""
    own = chat_of(row, "a row with choices")  # its reply may be more than text
    chats = [("a choice", own if text == row.get("completion") else own.answered(text)) for text in answers]
    prompt, tails = render_prompts(chats[:1], tokenizer)[0], []
    for ids, weights in encode_examples(chats, tokenizer):
        if list(ids[: len(prompt)]) != list(prompt):
            raise InputError("choices: the tokenizer's chat template writes a reply in another way than it begins one; "
                             "answer by generation")  # fmt: skip
        tails.append(list(ids[len(prompt) : int(np.flatnonzero(weights)[-1]) + 1]))
    return tails
