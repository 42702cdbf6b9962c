"""Generation with a key/value cache: one prefill, then one token per step, for prompts of different lengths."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import InputError
from ..bounds import Bounds, Checked
from .attention import PAD
from .config import Config
from .sharding import to_host
from .transformer import Context, Transformer, forward


@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    """Sampling of the next token: greedy at temperature 0, otherwise from the top_k tokens with total mass top_p."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: Annotated[float, Bounds(0, 1, "(]")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < 1e-5:
            raise InputError(f"--temperature {self.temperature}: wanted 0 (greedy), or 1e-5 or more")


def sample(key: Array, logits_BV: Array, sampling: Sampling, allowed_V: Any = None) -> Array:
    """The next token ids [B], of those that `allowed_V` (bool, None: all) allows."""
    if allowed_V is not None:
        logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, sampling.top_k - 1 : sampling.top_k], -jnp.inf, logits_BV)
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if sampling.top_p < 1:
        mass_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        last_B1 = jnp.sum(mass_BV < sampling.top_p, axis=-1, keepdims=True)  # last index inside the nucleus
        logits_BV = jnp.where(logits_BV < jnp.take_along_axis(sorted_BV, last_B1, axis=-1), -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def max_text_length(config: Config, virtual: int = 0) -> int:
    """Positions that a text may take: the context, less the virtual tokens if positions are learned.

    There is no limit if RoPE extends itself as the text grows (dynamic).
    """
    if config.rope is not None and config.rope.kind == "dynamic":
        return sys.maxsize
    return config.context - (virtual if config.learned_positions else 0)


def check_prompt_lengths(
    config: Config, prompts: Sequence[Sequence[int]], new: int, virtual: int = 0, labels: Sequence[str] = ()
) -> None:
    """Raise InputError for the first prompt that, with `new` more tokens, exceeds `max_text_length`."""
    limit = max_text_length(config, virtual)
    for i, prompt in enumerate(prompts):
        if len(prompt) + new > limit:
            label = labels[i] if labels else f"prompt {i + 1}"
            less = f" (less {virtual} virtual tokens)" if limit < config.context else ""
            raise InputError(
                f"{label}: a prompt of {len(prompt)} tokens and {new} after it exceed the model's context of "
                f"{limit}{less}; shorten it, or leave it out"
            )


def empty_cache(config: Config, B: int, S: int) -> dict[str, Any]:
    """A cache of S positions for B rows, whose slots are padding until they are written."""
    kv_BSKH = jnp.zeros((B, S, config.K, config.H), config.dtype)
    layer = {"attn": {"k": kv_BSKH, "v": kv_BSKH}}
    layers: Any = {str(i): layer for i in range(config.L)}
    if config.scan:
        layers = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.L, *x.shape)), layer)
    segments_BS = jnp.full((B, S), PAD, jnp.int32)
    # An unused slot has a position after all others and the segment of padding: no real query sees it.
    return {"positions": segments_BS + S, "segments": segments_BS, "index": jnp.int32(0), "layers": layers}


def decode(
    model: Transformer, params: Any, past: Any, ids_BT: Array, lengths_B: Array, key: Array, allowed_V: Any,
    new: int, stop: tuple[int, ...], sampling: Sampling, tokens: int,
) -> Array:  # fmt: skip
    """Generate ids [B, new] after prompts that are padded to T: one prefill, then one token of each row per step."""
    B, T = ids_BT.shape
    context = Context(tokens, past)
    cache = empty_cache(model.config, B, tokens + T + new)
    segments_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    positions_BT = jnp.minimum(jnp.arange(T), lengths_B[:, None] - 1)  # padding takes no position beyond the prompt
    x_BTD, cache = forward(
        model, params, ids_BT, positions_BT, segments_BT, context=context, cache=cache, method="hidden"
    )
    last_BD = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    logits_BV = model.apply({"params": params}, last_BD, method="logits")

    def step(state: Any) -> Any:
        i, logits_BV, cache, done_B, out = state
        next_B = sample(jax.random.fold_in(key, i), logits_BV, sampling, allowed_V)
        next_B = jnp.where(done_B, stop[0] if stop else 0, next_B)
        out = out.at[:, i].set(next_B)
        done_B = done_B | jnp.isin(next_B, jnp.array(stop or (-1,)))
        positions_B1 = (lengths_B + i)[:, None]
        logits_B1V, cache = forward(
            model, params, next_B[:, None], positions_B1, jnp.ones_like(positions_B1), context=context, cache=cache,
            start=False,
        )  # fmt: skip
        return i + 1, logits_B1V[:, 0], cache, done_B, out

    out = jnp.full((B, new), stop[0] if stop else 0, jnp.int32)
    start = (jnp.int32(0), logits_BV, cache, jnp.zeros(B, bool), out)
    return jax.lax.while_loop(lambda state: (state[0] < new) & ~state[3].all(), step, start)[-1]


STATIC = ("model", "new", "stop", "sampling", "tokens")
_decode = partial(jax.jit, static_argnames=STATIC)(decode)


def generate(
    model: Transformer, params: Any, prompts: Sequence[Sequence[int]], new: int, *, stop: Sequence[int] = (),
    sampling: Sampling | None = None, key: Array | None = None, allowed_V: Any = None, context: Context | None = None,
    pad_to: int = 32, decode_fn: Callable[..., Array] = _decode,
) -> list[list[int]]:  # fmt: skip
    """Generate up to `new` token ids after each prompt, cut before the first stop token.

    params: may be bound; with a `decode_fn`, which replaces `decode`, whatever that takes.
    pad_to: prompts are padded on the right to a multiple of it, so that few shapes are compiled.
    allowed_V: ids that may be generated (bool, None: all); a table may have rows without a token
    (`Tokenizer.has_token`).
    Raises InputError for an empty prompt, an id without a row in the table, and a prompt that, with its answer, exceeds
    the context.
    """
    context = context or Context()
    if not prompts or not all(prompts):
        raise InputError("a prompt is empty: generation needs at least one token, such as the tokenizer's bos")
    if (largest := max(map(max, prompts))) >= model.config.V:
        raise InputError(
            f"a prompt holds the token id {largest}, but the model has {model.config.V} rows: its tokenizer is not the "
            "one that the model was trained with"
        )
    if new < 1:
        raise InputError(f"{new} new tokens: wanted 1 or more")
    key = jax.random.key(0) if key is None else key
    check_prompt_lengths(model.config, prompts, new, context.length)

    def run(prompts: Sequence[Sequence[int]], new: int, key: Array) -> list[list[int]]:
        longest = max(map(len, prompts))
        T = max(min(-(-longest // pad_to) * pad_to, model.config.context), longest)
        ids_BT = np.zeros((len(prompts), T), np.int32)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths_B = np.array([len(p) for p in prompts], np.int32)
        out = decode_fn(model, params, context.past, ids_BT, lengths_B, key, allowed_V, new, tuple(stop),
                        sampling or Sampling(), context.tokens)  # fmt: skip
        return [_cut(row, stop) for row in to_host(out).tolist()]

    limit = _reusable_length(model.config) - context.length
    if all(len(p) > limit or len(p) + new <= limit for p in prompts):
        return run(prompts, new, key)
    out = []  # each row alone, and its cache computed again once it passes the limit
    for i, prompt in enumerate(prompts):
        key, first = jax.random.fold_in(key, i), min(max(limit + 1 - len(prompt), 0), new)
        head = run([prompt], first, key)[0] if first else []
        unfinished = len(head) == first and new > first
        tail = run([[*prompt, *head]], new - first, jax.random.fold_in(key, 1))[0] if unfinished else []
        out.append(head + tail)
    return out


def _reusable_length(config: Config) -> int:
    """The length up to which a cache stays valid; beyond it longrope rotates all positions differently. 0: no limit.

    transformers computes such a row again for Phi-3 and keeps the stale cache in other families; so does this code.
    """
    rope = config.rope
    return rope.original if rope and rope.kind == "longrope" and config.family in ("", "phi3") else 0


def _cut(row: list[int], stop: Sequence[int]) -> list[int]:
    return row[: min((row.index(s) for s in stop if s in row), default=len(row))]
