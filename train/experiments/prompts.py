"""Prompts with worked examples, as a chat or as plain text, and which training examples are the nearest to a row."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...data.sft import render_prompts
from ...model import Transformer, forward
from ...model.sharding import fetch
from ..choices import chat_tails

Row = dict[str, Any]


def asked(row: Row) -> str:
    """The words of a row's prompt."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a question, with worked examples before it, is put to a model: in turns of a `chat`, or as `plain` lines."""

    kind: str
    tokenizer: Any
    longest: int  # tokens of a prompt; the examples that stand first are left out until it fits

    def prompts(self, rows: Sequence[Row], shots: Sequence[Sequence[Row]]) -> list[list[int]]:
        """The ids of each row's prompt. InputError for a row that is too long without any example."""
        left = [list(few) for few in shots]
        ids = self._rendered(rows, left)
        while long := [i for i, prompt in enumerate(ids) if len(prompt) > self.longest]:
            for i in long:
                if not left[i]:
                    raise InputError(f"a prompt of {len(ids[i])} tokens, without an example, and its answer do not fit "
                                     f"into the base's {self.longest}: {asked(rows[i])[:60]!r}")  # fmt: skip
                left[i].pop(0)
            for i, prompt in zip(long, self._rendered([rows[i] for i in long], [left[i] for i in long]), strict=True):
                ids[i] = prompt
        return ids

    def _rendered(self, rows: Sequence[Row], shots: Sequence[Sequence[Row]]) -> list[list[int]]:
        if self.kind == "chat":
            chats = [[turn for shot in few for turn in _turns(shot, True)] + _turns(row, False)
                     for row, few in zip(rows, shots, strict=True)]  # fmt: skip
            return render_prompts([("a prompt", turns) for turns in chats], self.tokenizer)
        texts = [self.text(row, few) for row, few in zip(rows, shots, strict=True)]
        return [self.tokenizer.prompt(text) for text in texts]

    def text(self, row: Row, shots: Sequence[Row]) -> str:
        """The plain form: question and answer, each a line, and a line between."""
        return "".join(f"{asked(shot)}\n{shot['completion']}\n\n" for shot in shots) + f"{asked(row)}\n"

    def tails(self, row: Row, answers: Sequence[str]) -> list[list[int]]:
        """The ids of answers behind a row's prompt, and of what ends them."""
        if self.kind == "chat":
            return chat_tails(self.tokenizer, row, answers)
        prompt = self.tokenizer.prompt(self.text(row, []))
        whole = [self.tokenizer.prompt(f"{self.text(row, [])}{answer}\n") for answer in answers]
        if any(ids[: len(prompt)] != prompt for ids in whole):
            raise InputError("this tokenizer joins the end of a line to what follows, so that answers cannot be scored")
        return [ids[len(prompt) :] for ids in whole]

    def cut(self, text: str) -> str:
        """The answer in what was written."""
        return (text if self.kind == "chat" else text.lstrip("\n").split("\n")[0]).strip()


def _turns(row: Row, answered: bool) -> list[dict[str, str]]:
    prompt = row["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return turns + ([{"role": "assistant", "content": row["completion"]}] if answered else [])


def by_words(train: Sequence[Row], rows: Sequence[Row], k: int) -> np.ndarray:
    """The k training examples nearest to each row by BM25 over words [rows, k], the nearest last."""
    import bm25s

    split = partial(bm25s.tokenize, stopwords=[], show_progress=False)
    index = bm25s.BM25()
    index.index(split([asked(row) for row in train]), show_progress=False)
    found, _ = index.retrieve(split([asked(row) for row in rows]), k=k, show_progress=False)
    return np.asarray(found)[:, ::-1]


def by_states(model: Transformer, params: Any, tokenizer: Any, train: Sequence[Row], rows: Sequence[Row],
              k: int) -> np.ndarray:  # fmt: skip
    """The k training examples nearest to each row by the cosine of mean states of the base [rows, k], the nearest
    last. The mean of all is taken off first: states of a language model all point one way (arXiv:1909.00512)."""
    texts = [tokenizer.encode(asked(row))[: model.config.context] or [tokenizer.eos] for row in [*train, *rows]]
    T = -(-max(map(len, texts)) // 32) * 32
    order, size, found = sorted(range(len(texts)), key=lambda i: len(texts[i])), 64, np.zeros((len(texts), 0))
    for at in range(0, len(order), size):
        which = order[at : at + size]
        ids, lengths = np.zeros((size, T), np.int32), np.ones(size, np.int32)
        for j, i in enumerate(which):
            ids[j, : len(texts[i])], lengths[j] = texts[i], len(texts[i])
        short = -(-int(lengths.max()) // 32) * 32
        means = fetch(_means(model, params, ids[:, :short], lengths))[: len(which)]
        found = np.zeros((len(texts), means.shape[1]), np.float32) if not found.shape[1] else found
        found[which] = means
    found -= found[: len(train)].mean(axis=0)
    found /= np.linalg.norm(found, axis=1, keepdims=True) + 1e-9
    return np.argsort(found[len(train) :] @ found[: len(train)].T, axis=1, kind="stable")[:, -k:]


@partial(jax.jit, static_argnames="model")
def _means(model: Transformer, params: Any, ids_BT: Any, lengths_B: Any) -> Any:
    """The mean state behind the final norm of each text [B, D]."""
    real_BT = jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    x_BTD, _ = forward(model, params, ids_BT, positions_BT, real_BT.astype(jnp.int32), method="hidden")
    return (x_BTD.astype(jnp.float32) * real_BT[..., None]).sum(axis=1) / lengths_B[:, None]


def by_lot(train: Sequence[Row], rows: Sequence[Row], k: int) -> np.ndarray:
    """The same k training examples for every row, drawn by lot [rows, k]."""
    return np.tile(np.random.default_rng(0).permutation(len(train))[:k], (len(rows), 1))
