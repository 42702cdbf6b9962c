"""Which training examples stand before a question: drawn by lot, the nearest by words, or by the base's own states."""

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
from .prompts import asked

Row = dict[str, Any]


def token_flops(config: Any, parameters: int, T: float) -> float:
    """FLOPs of reading one token behind T / 2 others: 2 a matrix's parameter, and attention's two products."""
    matrices = parameters - (0 if config.tied else config.V * config.D)
    return 2.0 * matrices + 4.0 * config.L * config.N * config.H * T / 2


def text_bytes(train: Sequence[Row]) -> int:
    """Of the examples as text."""
    return sum(len((asked(row) + row["completion"]).encode()) for row in train)


class RandomExamples:
    """The same for every question, drawn once. The others are like it: `nearest`, and what they cost."""

    label, bytes, made_flops, made_seconds, flops = "examples by lot", 0, 0.0, 0.0, 0.0  # to keep; once; of a question

    def __init__(self, train: Sequence[Row]):
        self.train = train

    def nearest(self, rows: Sequence[Row], k: int) -> np.ndarray:
        """The k training examples that stand before each row [rows, k], the nearest last."""
        return np.tile(np.random.default_rng(0).permutation(len(self.train))[:k], (len(rows), 1))


class BM25Examples(RandomExamples):
    """BM25 over words, by the library bm25s (Robertson and Zaragoza 2009)."""

    label = "nearest examples by BM25"

    def __init__(self, train: Sequence[Row]):
        import bm25s

        super().__init__(train)
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it says when it builds an index
        began = time.perf_counter()
        self.bytes = text_bytes(train)
        self.split = partial(bm25s.tokenize, stopwords=[], token_pattern=r"(?u)\w+", show_progress=False)
        words, self.index = self.split([asked(row) for row in train]), bm25s.BM25()
        self.empty = not words.vocab  # type: ignore[union-attr]  # no word anywhere: then none is nearer than another
        if not self.empty:
            self.index.index(words, show_progress=False)
        self.made_seconds = time.perf_counter() - began

    def nearest(self, rows: Sequence[Row], k: int) -> np.ndarray:
        """By the words that a question shares with an example."""
        if self.empty:
            return super().nearest(rows, k)
        found, _ = self.index.retrieve(self.split([asked(row) for row in rows]), k=k, show_progress=False)
        return np.asarray(found)[:, ::-1]


class EmbeddingExamples(RandomExamples):
    """Cosine of mean states of the base. The mean of all is taken off first: states of a language model all point one
    way (arXiv:1909.00512)."""

    label = "nearest examples by the base's states"

    def __init__(self, train: Sequence[Row], model: Transformer, params: Any, tokenizer: Any):
        super().__init__(train)
        self.model, self.params, self.tokenizer = model, params, tokenizer
        size = sum(x.size for x in jax.tree.leaves(params))
        began = time.perf_counter()
        found, tokens = self._states(train)
        self.mean = found.mean(axis=0)
        self.kept = self._unit(found)
        self.made_seconds = time.perf_counter() - began
        self.flops = tokens / len(train) * token_flops(model.config, size, tokens / len(train))
        self.made_flops = self.flops * len(train)
        self.bytes = text_bytes(train) + self.kept.nbytes

    def nearest(self, rows: Sequence[Row], k: int) -> np.ndarray:
        """By what the base makes of a question."""
        near = self._unit(self._states(rows)[0]) @ self.kept.T
        return np.argsort(near, axis=1, kind="stable")[:, -k:]

    def _unit(self, x: np.ndarray) -> np.ndarray:
        x = x - self.mean
        return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9)

    def _states(self, rows: Sequence[Row], size: int = 64) -> tuple[np.ndarray, int]:
        """(the mean state of each row's question [rows, D], tokens read)."""
        texts = [self.tokenizer.encode(asked(row))[: self.model.config.context] or [self.tokenizer.eos] for row in rows]
        found = np.zeros((len(texts), self.model.config.D), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), size):
            which = order[at : at + size]
            lengths = np.array([len(texts[i]) for i in which] + [1] * (size - len(which)), np.int32)
            ids = np.zeros((size, -(-int(lengths.max()) // 32) * 32), np.int32)
            for j, i in enumerate(which):
                ids[j, : len(texts[i])] = texts[i]
            found[which] = to_host(_means(self.model, self.params, ids, lengths))[: len(which)]
        return found, sum(map(len, texts))


@partial(jax.jit, static_argnames="model")
def _means(model: Transformer, params: Any, ids_BT: Any, lengths_B: Any) -> Any:
    """The mean state behind the final norm of each text [B, D]."""
    real_BT = jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    x_BTD, _ = forward(model, params, ids_BT, positions_BT, real_BT.astype(jnp.int32), method="hidden")
    return (x_BTD.astype(jnp.float32) * real_BT[..., None]).sum(axis=1) / lengths_B[:, None]
