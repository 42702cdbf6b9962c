"""Evaluation: held-out loss and bits per byte of each domain, and scores of a task by generation or by its choices."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data.columns import chat_of
from ..data.errors import RAISE, RowErrors
from ..data.loader import batches
from ..data.sft import encode_examples, render_prompts
from ..model import Config, Context, Sampling, Transformer, check_prompt_lengths, generate, token_losses
from ..model.sharding import to_host
from .choices import chat_tails, continuation_losses


@partial(jax.jit, static_argnames=("model", "tokens", "chunk"))
def _row_losses(model: Transformer, bound: Any, past: Any, batch: Any, tokens: int, chunk: int = 8192) -> Any:
    nll_BT = token_losses(model, bound, batch, Context(tokens, past), chunk)
    return jnp.sum(jnp.where(batch["weights"] > 0, nll_BT * batch["weights"], 0.0), axis=1)


def row_losses(
    model: Transformer, bound: Any, context: Context, rows: Sequence[Any], batch: int, put: Any = None
) -> np.ndarray:
    """The loss of each row, summed over its targets, in nats. One compilation serves all methods that bind alike."""
    found, keys = [], ("ids", "targets", "weights", "segments", "positions")
    for b in batches(rows, batch):
        b = {k: b[k] for k in keys}
        found.append(to_host(_row_losses(model, bound, context.past, put(b) if put else b, context.tokens)))
    return np.concatenate(found)[: len(rows)]


def held_out_losses(
    model: Transformer, bound: Any, context: Context, held_out: Mapping[str, Any], batch: int,
    tokens: int = 0, put: Any = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """{domain: loss (nats a token), perplexity, bits_per_byte, zlib} on at most `tokens` tokens of each (0: all).

    bits per byte = nats / ln 2 / bytes; with fewer than all rows, by the domain's bytes a token.
    """
    result = {}
    for name, domain in held_out.items():
        rows = within(domain.rows, tokens)
        targets = sum(float(r["weights"].sum()) for r in rows)
        loss = float(row_losses(model, bound, context, rows, batch, put).sum()) / max(targets, 1)
        bytes_a_token = domain.n_bytes / sum(float(r["weights"].sum()) for r in domain.rows)
        result[name] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) / bytes_a_token,
            "zlib": domain.zlib_bits_per_byte,
        }
    return result


def mean_loss(losses: Mapping[str, Mapping[str, float]]) -> float:
    """The plain mean over domains of the held-out loss."""
    return sum(d["loss"] for d in losses.values()) / len(losses)


def outputs(
    model: Transformer, bound: Any, context: Context, tokenizer: Any, rows: Sequence[dict[str, Any]],
    new: int, batch: int = 32, how: Sampling | None = None, progress: Callable[[int], None] = lambda n: None,
) -> list[str]:  # fmt: skip
    """What the model answers to each row's prompt, up to `new` tokens."""
    named = chats(rows)
    prompts = render_prompts(named, tokenizer)
    check_prompt_lengths(model.config, prompts, new, context.length, [where for where, _ in named])
    return replies(model, bound, context, tokenizer, prompts, new, batch, how, progress)


def replies(
    model: Transformer, bound: Any, context: Context, tokenizer: Any, prompts: Sequence[Sequence[int]],
    new: int, batch: int = 32, how: Sampling | None = None, progress: Callable[[int], None] = lambda n: None,
) -> list[str]:  # fmt: skip
    """What the model writes behind each prompt of ids. All are padded to one length."""
    check_prompt_lengths(model.config, prompts, new, context.length)
    answers = [""] * len(prompts)
    longest = -(-max(map(len, prompts)) // 32) * 32
    for at in range(0, len(prompts), batch):
        taken = list(range(at, min(at + batch, len(prompts))))
        filled = taken + taken[:1] * (batch - len(taken))  # one batch size compiles once
        ids = generate(model, bound, [prompts[i] for i in filled], new, stop=tokenizer.stops,
                       allowed_V=tokenizer.has_token(model.config.V), sampling=how or Sampling(),
                       context=context, key=jax.random.key(at), pad_to=longest)  # fmt: skip
        for i, out in zip(taken, ids, strict=False):
            answers[i] = tokenizer.decode(out).strip()
        progress(len(taken))
    return answers


def choose(
    model: Transformer, bound: Any, context: Context, tokenizer: Any, rows: Sequence[dict[str, Any]],
    choices: Sequence[str], batch: int = 4,
) -> list[str]:  # fmt: skip
    """The choice with the highest log-probability as the answer to each row's prompt."""
    tails = chat_tails(tokenizer, rows[0], choices)
    named = chats(rows)
    where = [where for where, _ in named]
    losses = continuation_losses(model, bound, context, render_prompts(named, tokenizer), tails, batch, where)
    return [choices[i] for i in losses.argmin(axis=1)]


def evenly(rows: Sequence[Any], n: int = 0) -> list[Any]:
    """At most n of the rows (0: all), evenly out of all of them: they may be sorted by their answers."""
    n = min(n or len(rows), len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def within(rows: Sequence[Any], tokens: int) -> list[Any]:
    """Packed rows of at most `tokens` tokens, one at least, evenly out of all of them (0: all)."""
    return evenly(rows, max(tokens // len(rows[0]["ids"]), 1) if tokens else 0)


def scored(task: Any, tokenizer: Any, rows: int = 0) -> list[dict[str, Any]]:
    """The rows a task is scored on, at most `rows` (0: all): its test, or its validation rows where it has none."""
    return as_written(evenly(task.test or task.valid, rows), tokenizer)


def as_written(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows as they are scored: a reply with calls or thoughts is all that the chat template writes for it."""
    more = [i for i, row in enumerate(rows) if "chat" in row and not row["chat"].replies_in_text]
    texts = [tokenizer.decode(ids).strip() for ids in _last_replies([rows[i] for i in more], tokenizer)]
    written = dict(zip(more, texts, strict=True))
    return [row | {"completion": written[i]} if i in written else row for i, row in enumerate(rows)]


def answerable(
    rows: Sequence[dict[str, Any]], tokenizer: Any, config: Config, virtual: int = 0, bad: RowErrors = RAISE
) -> list[dict[str, Any]]:
    """The rows that `outputs` can answer: the template takes them, and the prompt with the longest answer of all fits
    into the context. `bad` says what becomes of any other; InputError, which names it, if that is an error."""
    named = list(zip(rows, chats(rows), strict=True))
    whole = encode_examples([chat for _, chat in named], tokenizer, bad)
    sized = [(*pair, len(ids)) for pair, (ids, _) in zip(named, whole, strict=True) if ids]
    prompts = render_prompts([chat for _, chat, _ in sized], tokenizer, bad)
    asked = [(row, chat[0], ids, max(n - 1 - len(ids), 1)) for (row, chat, n), ids in zip(sized, prompts, strict=True)]

    def fitting(asked: Iterable[tuple[Any, str, Sequence[int], int]]) -> Iterator[tuple[Any, str, Sequence[int]]]:
        for row, where, ids, new in asked:
            with bad:
                check_prompt_lengths(config, [ids], new, virtual, [where])
                yield row, where, ids

    kept = list(fitting(one for one in asked if one[2]))  # each with its own answer
    if not kept:
        return []
    new = longest_answer([row for row, _, _ in kept], tokenizer)
    return [row for row, _, _ in fitting((*one, new) for one in kept)]


def longest_answer(rows: Sequence[dict[str, Any]], tokenizer: Any) -> int:
    """Tokens of the longest last reply, its end and what the template puts before it included."""
    return max(map(len, _last_replies(rows, tokenizer)))


def _last_replies(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
    """The ids of each row's last reply: what stands behind its prompt, up to the last target."""
    named, found = chats(rows), []
    for (ids, weights), prompt in zip(encode_examples(named, tokenizer), render_prompts(named, tokenizer), strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
        found.append(list(ids[same : int(np.flatnonzero(weights)[-1]) + 1]))
    return found


def chats(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(where, dialogue) of rows, as they are rendered."""
    return [(where := row.get("where", f"row {i}"), chat_of(row, where)) for i, row in enumerate(rows, 1)]
