"""Selection of worked examples for a prompt: random ones, the nearest by BM25, or the nearest by embedding."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...model import Transformer, forward
from ...model.sharding import to_host
from .prompts import question_text

Row = dict[str, Any]
BATCH = 64  # questions that are embedded at a time


def token_flops(config: Any, parameters: int, T: float) -> float:
    """Return the FLOPs of reading one token after T / 2 others: 2 per matrix parameter, and attention's products."""
    matrices = parameters - (0 if config.tied else config.V * config.D)
    return 2.0 * matrices + 4.0 * config.L * config.N * config.H * T / 2


def text_bytes(rows: Sequence[Row]) -> int:
    """Return the size of examples stored as text."""
    return sum(len((question_text(row) + row["completion"]).encode()) for row in rows)


class RandomExamples:
    """The same random examples for every question. Subclasses select the nearest ones.

    Attributes:
        label: what the examples are, in reports.
        bytes: stored for the selection, where all examples are kept.
        prepare_flops, prepare_seconds: spent once.
        query_flops: spent for each question.
    """

    label, bytes, prepare_flops, prepare_seconds, query_flops = "random examples", 0, 0.0, 0.0, 0.0

    def __init__(self, train: Sequence[Row]):
        self.train = train

    def nearest(self, rows: Sequence[Row], k: int) -> np.ndarray:
        """Return the indices of the k training examples for each row [rows, k], the nearest last."""
        return np.tile(np.random.default_rng(0).permutation(len(self.train))[:k], (len(rows), 1))


class BM25Examples(RandomExamples):
    """The nearest by BM25 over words (Robertson and Zaragoza 2009), by the library bm25s."""

    label = "nearest examples by BM25"

    def __init__(self, train: Sequence[Row]):
        import bm25s

        super().__init__(train)
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs each index that it builds
        start = time.perf_counter()
        self.bytes = text_bytes(train)
        self.tokenize = partial(bm25s.tokenize, stopwords=[], token_pattern=r"(?u)\w+", show_progress=False)
        words, self.index = self.tokenize([question_text(row) for row in train]), bm25s.BM25()
        self.empty = not words.vocab  # type: ignore[union-attr]  # no words: all examples are equally near
        if not self.empty:
            self.index.index(words, show_progress=False)
        self.prepare_seconds = time.perf_counter() - start

    def nearest(self, rows: Sequence[Row], k: int) -> np.ndarray:
        """Return the examples that share the rarest words with each question."""
        if self.empty:
            return super().nearest(rows, k)
        queries = self.tokenize([question_text(row) for row in rows])
        indices, _ = self.index.retrieve(queries, k=k, show_progress=False)
        return np.asarray(indices)[:, ::-1]


class EmbeddingExamples(RandomExamples):
    """The nearest by cosine similarity of mean hidden states of the base.

    The mean over all examples is subtracted first: hidden states share a large common direction (arXiv:1909.00512).
    """

    label = "nearest examples by embedding"

    def __init__(self, train: Sequence[Row], model: Transformer, params: Any, tokenizer: Any):
        super().__init__(train)
        self.model, self.params, self.tokenizer = model, params, tokenizer
        start = time.perf_counter()
        states, tokens = self._embed(train)
        self.mean = states.mean(axis=0)
        self.embeddings = self._normalize(states)
        self.prepare_seconds = time.perf_counter() - start
        parameters, T = sum(x.size for x in jax.tree.leaves(params)), tokens / len(train)
        self.query_flops = T * token_flops(model.config, parameters, T)
        self.prepare_flops = self.query_flops * len(train)
        self.bytes = text_bytes(train) + self.embeddings.nbytes

    def nearest(self, rows: Sequence[Row], k: int) -> np.ndarray:
        """Return the examples whose questions have the most similar embeddings."""
        similarity = self._normalize(self._embed(rows)[0]) @ self.embeddings.T
        return np.argsort(similarity, axis=1, kind="stable")[:, -k:]

    def _normalize(self, x: np.ndarray) -> np.ndarray:
        x = x - self.mean
        return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9)

    def _embed(self, rows: Sequence[Row]) -> tuple[np.ndarray, int]:
        """Return (mean hidden state of each row's question [rows, D], number of tokens)."""
        context, tokenizer = self.model.config.context, self.tokenizer
        texts = [tokenizer.encode(question_text(row))[:context] or [tokenizer.eos] for row in rows]
        states = np.zeros((len(texts), self.model.config.D), np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(by_length), BATCH):
            indices = by_length[at : at + BATCH]
            lengths = np.array([len(texts[i]) for i in indices] + [1] * (BATCH - len(indices)), np.int32)
            ids = np.zeros((BATCH, -(-int(lengths.max()) // 32) * 32), np.int32)
            for j, i in enumerate(indices):
                ids[j, : len(texts[i])] = texts[i]
            states[indices] = to_host(_mean_states(self.model, self.params, ids, lengths))[: len(indices)]
        return states, sum(map(len, texts))


@partial(jax.jit, static_argnames="model")
def _mean_states(model: Transformer, params: Any, ids_BT: Any, lengths_B: Any) -> Any:
    """Return the mean hidden state after the final norm of each text [B, D]."""
    real_BT = jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    x_BTD, _ = forward(model, params, ids_BT, positions_BT, real_BT.astype(jnp.int32), method="hidden")
    return (x_BTD.astype(jnp.float32) * real_BT[..., None]).sum(axis=1) / lengths_B[:, None]
