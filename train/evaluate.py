"""Evaluation: held-out loss and bits per byte of each domain, and a task's scores by generation or by its choices."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ..model.sharding import put_batch, to_host
from .choices import answer_continuations, continuation_losses
from .config import Run
from .setup import BATCH_DTYPES, TrainSetup

Bound = tuple[Transformer, Any, Context]  # model, bound parameters, virtual tokens or past


def evaluate(setup: TrainSetup, score: bool = True) -> dict[str, Any]:
    """Return the losses of a setup and, with `score`, the scores of its task."""
    return evaluate_losses(setup) | (evaluate_scores(setup) if score else {})


def bound_model(setup: TrainSetup) -> Bound:
    """Return (model, bound parameters, context) with the trainable tree as it is now."""
    method, trainable = setup.method, setup.state.trainable
    return setup.model, method.bind(setup.frozen, trainable), method.context(trainable)


def evaluate_losses(setup: TrainSetup) -> dict[str, Any]:
    """Return the held-out loss of the base's domains and the validation loss of the task, as far as there are rows."""
    run, bound, losses = setup.run, bound_model(setup), {}
    if setup.held_out:
        domains = held_out_losses(*bound, setup.held_out, run.data.batch, run.eval_tokens, put_batch(setup.mesh))
        losses = {"held_out_loss": mean_loss(domains), "held_out": domains}
    if setup.valid:
        losses["valid_loss"] = mean_row_loss(bound, setup.valid, run, setup.mesh)
    return losses


def evaluate_scores(setup: TrainSetup) -> dict[str, Any]:
    """Return the scores of the task's test rows with eight samples; {} for a run without rows to score."""
    rows = scored_rows(setup.task, setup.tokenizer, setup.run.eval_rows) if setup.task else []
    if not rows:
        return {}
    answers = generate_answers(*bound_model(setup), setup.tokenizer, rows, longest_reply(rows, setup.tokenizer))
    pairs = list(zip(rows, answers, strict=True))[:8]
    samples = [{"prompt": row["prompt"], "wanted": row["completion"], "got": answer} for row, answer in pairs]
    return {"scores": setup.task.score(rows, answers), "samples": samples}


@partial(jax.jit, static_argnames=("model", "tokens", "chunk"))
def _row_losses(model: Transformer, bound: Any, past: Any, batch: Any, tokens: int, chunk: int = 8192) -> Any:
    nll_BT = token_losses(model, bound, batch, Context(tokens, past), chunk)
    return jnp.sum(jnp.where(batch["weights"] > 0, nll_BT * batch["weights"], 0.0), axis=1)


def row_losses(
    model: Transformer, bound: Any, context: Context, rows: Sequence[Any], batch: int, put: Any = None
) -> np.ndarray:
    """Return the loss of each row, summed over its targets, in nats. Methods that bind alike share a compilation."""
    losses = []
    for arrays in batches(rows, batch):
        arrays = {name: arrays[name] for name in BATCH_DTYPES}
        arrays = put(arrays) if put else arrays
        losses.append(to_host(_row_losses(model, bound, context.past, arrays, context.tokens)))
    return np.concatenate(losses)[: len(rows)]


def _targets(rows: Sequence[Any]) -> float:
    return sum(float(row["weights"].sum()) for row in rows)


def mean_row_loss(bound: Bound, rows: Any, run: Run, mesh: Any) -> float:
    """Return the loss in nats per target token of rows, of at most `eval_tokens` tokens (0: all)."""
    rows = within_tokens(rows, run.eval_tokens)
    loss = row_losses(*bound, rows, run.data.batch, put_batch(mesh)).sum()
    return float(loss / max(_targets(rows), 1.0))


def held_out_losses(
    model: Transformer,
    bound: Any,
    context: Context,
    held_out: Mapping[str, Any],
    batch: int,
    tokens: int = 0,
    put: Any = None,
) -> dict[str, dict[str, float]]:
    """Return {domain: loss (nats per token), perplexity, bits_per_byte, zlib} on at most `tokens` tokens of each
    domain (0: all).

    bits per byte = nats / ln 2 / bytes; on a part of the rows, by the bytes per token of the whole domain.
    """
    result = {}
    for name, domain in held_out.items():
        rows = within_tokens(domain.rows, tokens)
        loss = float(row_losses(model, bound, context, rows, batch, put).sum()) / max(_targets(rows), 1)
        result[name] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) / (domain.n_bytes / _targets(domain.rows)),
            "zlib": domain.zlib_bits_per_byte,
        }
    return result


def mean_loss(losses: Mapping[str, Mapping[str, float]]) -> float:
    """Return the unweighted mean over domains of the held-out loss."""
    return sum(domain["loss"] for domain in losses.values()) / len(losses)


def generate_answers(
    model: Transformer,
    bound: Any,
    context: Context,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    new: int,
    batch: int = 32,
) -> list[str]:
    """Return the model's answer to the prompt of each row, of at most `new` tokens."""
    dialogues = row_chats(rows)
    prompts = render_prompts(dialogues, tokenizer)
    check_prompt_lengths(model.config, prompts, new, context.length, [where for where, _ in dialogues])
    return generate_texts(model, bound, context, tokenizer, prompts, new, batch)


def generate_texts(
    model: Transformer,
    bound: Any,
    context: Context,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new: int,
    batch: int = 32,
) -> list[str]:
    """Return the continuation of each prompt of token ids. All prompts are padded to one length."""
    check_prompt_lengths(model.config, prompts, new, context.length)
    texts = [""] * len(prompts)
    longest = -(-max(map(len, prompts)) // 32) * 32
    for first in range(0, len(prompts), batch):
        indices = list(range(first, min(first + batch, len(prompts))))
        filled = indices + indices[:1] * (batch - len(indices))  # a single batch size compiles once
        ids = generate(
            model,
            bound,
            [prompts[i] for i in filled],
            new,
            stop=tokenizer.stops,
            allowed_V=tokenizer.has_token(model.config.V),
            sampling=Sampling(),
            context=context,
            key=jax.random.key(first),
            pad_to=longest,
        )
        for i, continuation in zip(indices, ids, strict=False):
            texts[i] = tokenizer.decode(continuation).strip()
    return texts


def choose_answers(
    model: Transformer,
    bound: Any,
    context: Context,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    choices: Sequence[str],
    batch: int = 4,
) -> list[str]:
    """Return, for each row, the choice with the highest log-probability as the answer to its prompt."""
    continuations = answer_continuations(tokenizer, rows[0], choices)
    dialogues = row_chats(rows)
    where = [where for where, _ in dialogues]
    prompts = render_prompts(dialogues, tokenizer)
    losses = continuation_losses(model, bound, context, prompts, continuations, batch, where)
    return [choices[i] for i in losses.argmin(axis=1)]


def evenly_spaced(rows: Sequence[Any], n: int = 0) -> list[Any]:
    """Return at most n rows (0: all) at even distances, because rows may be sorted by their answers."""
    n = min(n or len(rows), len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def within_tokens(rows: Sequence[Any], tokens: int) -> list[Any]:
    """Return evenly spaced packed rows of at most `tokens` tokens (0: all), one row at least."""
    return evenly_spaced(rows, max(tokens // len(rows[0]["ids"]), 1) if tokens else 0)


def scored_rows(task: Any, tokenizer: Any, n: int = 0) -> list[dict[str, Any]]:
    """Return at most n rows (0: all) that a task is scored on: of its test, else of its validation rows."""
    return with_rendered_replies(evenly_spaced(task.test or task.valid, n), tokenizer)


def with_rendered_replies(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return rows whose expected completion, if it has tool calls or reasoning, is what the chat template writes."""
    indices = [i for i, row in enumerate(rows) if "chat" in row and not row["chat"].replies_in_text]
    texts = [tokenizer.decode(ids).strip() for ids in _last_replies([rows[i] for i in indices], tokenizer)]
    rendered = dict(zip(indices, texts, strict=True))
    return [row | {"completion": rendered[i]} if i in rendered else row for i, row in enumerate(rows)]


def answerable_rows(
    rows: Sequence[dict[str, Any]], tokenizer: Any, config: Config, virtual: int = 0, bad: RowErrors = RAISE
) -> list[dict[str, Any]]:
    """Return the rows that `generate_answers` can answer: the chat template accepts them, and the prompt with the
    longest reply of all rows fits into the context, of which `virtual` positions are taken.

    `bad` decides about any other row; it raises InputError, which names the row, if that is an error.
    """
    named = list(zip(rows, row_chats(rows), strict=True))
    examples = encode_examples([chat for _, chat in named], tokenizer, bad)
    encoded = [(row, chat, len(ids)) for (row, chat), (ids, _) in zip(named, examples, strict=True) if ids]
    prompts = render_prompts([chat for _, chat, _ in encoded], tokenizer, bad)
    Candidate = tuple[Any, str, Sequence[int]]  # row, where it is, ids of its prompt

    def fitting(candidates: Iterable[tuple[Candidate, int]]) -> Iterator[Candidate]:
        for candidate, new in candidates:
            _, where, ids = candidate
            with bad:
                check_prompt_lengths(config, [ids], new, virtual, [where])
                yield candidate

    own_reply = [
        ((row, chat[0], ids), max(n - 1 - len(ids), 1))
        for (row, chat, n), ids in zip(encoded, prompts, strict=True)
        if ids
    ]
    candidates = list(fitting(own_reply))
    if not candidates:
        return []
    new = longest_reply([row for row, _, _ in candidates], tokenizer)
    return [row for row, _, _ in fitting((candidate, new) for candidate in candidates)]


def longest_reply(rows: Sequence[dict[str, Any]], tokenizer: Any) -> int:
    """Return the tokens of the longest last reply, with its end and what the template writes before it."""
    return max(map(len, _last_replies(rows, tokenizer)))


def _last_replies(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
    """Return the ids of each row's last reply: those after its prompt, up to the last target."""
    dialogues, replies = row_chats(rows), []
    examples, prompts = encode_examples(dialogues, tokenizer), render_prompts(dialogues, tokenizer)
    for (ids, weights), prompt in zip(examples, prompts, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
        replies.append(list(ids[shared : int(np.flatnonzero(weights)[-1]) + 1]))
    return replies


def row_chats(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return (where, dialogue) of each row."""
    return [(where := row.get("where", f"row {i}"), chat_of(row, where)) for i, row in enumerate(rows, 1)]
