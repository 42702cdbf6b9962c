"""Generation with a key/value cache: prefill once, then one token a step, for prompts of different lengths."""

import dataclasses
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
from .layers import check_prompt_lengths
from .sharding import to_host
from .transformer import Context, Transformer, forward


@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    """How the next token is drawn: greedy at temperature 0, else from the top_k tokens that make up mass top_p."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: Annotated[float, Bounds(0, 1, "(]")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < 1e-5:
            raise InputError(f"--temperature {self.temperature}: wanted 0 (greedy), or 1e-5 or more")


def sample(key: Array, logits_BV: Array, how: Sampling, allowed_V: Any = None) -> Array:
    """The next token ids [B], of those that `allowed_V` (bool, None: all) allows."""
    if allowed_V is not None:
        logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    if how.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / how.temperature
    ranked = jnp.sort(logits_BV, axis=-1, descending=True)
    if 0 < how.top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(logits_BV < ranked[:, how.top_k - 1 : how.top_k], -jnp.inf, logits_BV)
        ranked = jnp.sort(logits_BV, axis=-1, descending=True)
    if how.top_p < 1:
        mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
        kept = jnp.sum(mass < how.top_p, axis=-1, keepdims=True)  # the index of the last token inside the nucleus
        logits_BV = jnp.where(logits_BV < jnp.take_along_axis(ranked, kept, axis=-1), -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def empty_cache(config: Config, B: int, S: int) -> dict[str, Any]:
    """A cache of S positions for B rows; its slots are padding until they are written."""
    kv = jnp.zeros((B, S, config.K, config.H), config.dtype)
    layer = {"attn": {"k": kv, "v": kv}}
    layers: Any = {str(i): layer for i in range(config.L)}
    if config.scan:
        layers = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.L, *x.shape)), layer)
    slots = jnp.full((B, S), PAD, jnp.int32)
    # An unused slot has the position behind all others and the segment of padding: no real query sees it.
    return {"positions": slots + S, "segments": slots, "index": jnp.int32(0), "layers": layers}


def decode(model: Transformer, params: Any, past: Any, ids_BT: Array, lengths_B: Array, key: Array, allowed_V: Any,
           new: int, stop: tuple[int, ...], how: Sampling, tokens: int) -> Array:  # fmt: skip
    """ids [B, new] behind prompts that are padded to T: one prefill, then a token of each row a step."""
    B, T = ids_BT.shape
    context = Context(tokens, past)
    cache = empty_cache(model.config, B, tokens + T + new)
    segments = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    positions = jnp.minimum(jnp.arange(T), lengths_B[:, None] - 1)  # padding is at no place beyond the prompt
    x_BTD, cache = forward(model, params, ids_BT, positions, segments, context=context, cache=cache, method="hidden")
    last_BD = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    logits = model.apply({"params": params}, last_BD, method="logits")

    def step(state: Any) -> Any:
        i, logits, cache, done, out = state
        token = jnp.where(done, stop[0] if stop else 0, sample(jax.random.fold_in(key, i), logits, how, allowed_V))
        out = out.at[:, i].set(token)
        done = done | jnp.isin(token, jnp.array(stop or (-1,)))
        at = (lengths_B + i)[:, None]
        logits, cache = forward(
            model, params, token[:, None], at, jnp.ones_like(at), context=context, cache=cache, start=False
        )
        return i + 1, logits[:, 0], cache, done, out

    start = (jnp.int32(0), logits, cache, jnp.zeros(B, bool), jnp.full((B, new), stop[0] if stop else 0, jnp.int32))
    return jax.lax.while_loop(lambda s: (s[0] < new) & ~s[3].all(), step, start)[-1]


STATIC = ("model", "new", "stop", "how", "tokens")
_decode = partial(jax.jit, static_argnames=STATIC)(decode)


def generate(
    model: Transformer, params: Any, prompts: Sequence[Sequence[int]], new: int, *, stop: Sequence[int] = (),
    how: Sampling | None = None, key: Array | None = None, allowed_V: Any = None, context: Context | None = None,
    pad_to: int = 32, by: Callable[..., Array] = _decode,
) -> list[list[int]]:  # fmt: skip
    """Up to `new` token ids behind each prompt, cut before the first stop token. `params` may be bound, or whatever
    `by`, which stands for `decode`, takes for them.

    Prompts are padded on the right to a multiple of `pad_to`, so that few shapes compile. allowed_V: the ids that may
    be written (bool, None: all); a table may have rows that no token has (`Tokenizer.has_token`).
    Raises InputError for an empty prompt, an id without a row, and a prompt that, with its answer, exceeds the context.
    """
    context = context or Context()
    if not prompts or not all(prompts):
        raise InputError("a prompt is empty: generation needs at least one token (a tokenizer's bos will do)")
    if (largest := max(map(max, prompts))) >= model.config.V:
        raise InputError(f"a prompt holds the token id {largest}, but the model has {model.config.V} rows: its "
                         "tokenizer is not the one that the model was trained with")  # fmt: skip
    if new < 1:
        raise InputError(f"{new} new tokens: wanted 1 or more")
    key, how, P = jax.random.key(0) if key is None else key, how or Sampling(), context.length
    check_prompt_lengths(model.config, prompts, new, P)

    def run(prompts: Sequence[Sequence[int]], new: int, key: Array) -> list[list[int]]:
        longest = max(map(len, prompts))
        T = max(min(-(-longest // pad_to) * pad_to, model.config.context), longest)
        ids = np.zeros((len(prompts), T), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(p) for p in prompts], np.int32)
        out = by(model, params, context.past, ids, lengths, key, allowed_V, new, tuple(stop), how, context.tokens)
        return [_cut(row, stop) for row in to_host(out).tolist()]

    edge = _turning_point(model.config) - P
    if all(len(p) > edge or len(p) + new <= edge for p in prompts):
        return run(prompts, new, key)
    out = []
    for i, prompt in enumerate(prompts):
        key, first = jax.random.fold_in(key, i), min(max(edge + 1 - len(prompt), 0), new)
        head = run([prompt], first, key)[0] if first else []
        more = len(head) == first and new > first
        out.append(head + (run([[*prompt, *head]], new - first, jax.random.fold_in(key, 1))[0] if more else []))
    return out


def _turning_point(config: Config) -> int:
    """The length beyond which longrope turns all positions otherwise, so that what is cached is void; 0 if none.

    transformers computes such a row anew for Phi-3 and goes on with the old cache in other families; so do we.
    """
    rope = config.rope
    return rope.original if rope and rope.kind == "longrope" and config.family in ("", "phi3") else 0


def _cut(row: list[int], stop: Sequence[int]) -> list[int]:
    return row[: min((row.index(s) for s in stop if s in row), default=len(row))]
