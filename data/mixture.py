"""Mixture of domains: one infinite, seeded, weighted stream of packed rows, and the rows held out of it by domain."""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from .. import InputError
from .documents import Document, is_held_out
from .fields import did_you_mean
from .pack import Row, Windows, tokenize
from .tokenizers import Tokenizer

DOMAIN_STRIDE = 1 << 40  # `row` = index of the domain * DOMAIN_STRIDE + index of the row in the domain
_HELD_OUT_OFFSET = 1 << 39  # added to the index of a held-out row


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of one domain. They cover whole documents: bits per byte = summed nats / ln 2 / n_bytes."""

    rows: list[Row]
    n_bytes: int  # of UTF-8
    zlib_bits_per_byte: float  # of the texts as one stream at level 9: the baseline that a model has to beat


@dataclass(frozen=True)
class Corpus:
    """Rows for pretraining. Equal digests mean equal streams of rows. Counts are by domain, for one epoch."""

    train: grain.MapDataset  # infinite
    held_out: dict[str, HeldOut]
    tokens: dict[str, int]  # training tokens, bos and eos included
    rows: dict[str, int]  # training rows
    dropped: dict[str, int]  # training documents with the text of a held-out one
    digest: str


def pretrain_rows(
    domains: Mapping[str, Iterable[Document]],
    weights: Mapping[str, float],
    tokenizer: Tokenizer,
    T: int,
    seed: int,
    fraction: float,
    cache_dir: Path | str | None = None,
) -> Corpus:
    """Tokenise each domain, hold out `fraction` of its documents by id, pack, shuffle by epoch, and mix by `weights`.

    A document whose text is held out in any domain is dropped from the training side of every domain. All text is in
    memory until it is tokenised. Raises InputError for weights that do not fit the domains, and for an empty side of
    the split.
    """
    weights = _normalized(weights, list(domains))
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: expected an integer in [0, 2**32)")
    docs_of = {name: list(docs) for name, docs in domains.items()}
    held_out_texts = {d.text for docs in docs_of.values() for d in docs if is_held_out(d.id, fraction)}
    train: dict[str, Windows] = {}
    held_out: dict[str, HeldOut] = {}
    dropped, digests = {}, {}
    for index, name in enumerate(weights):
        docs = docs_of.pop(name)
        is_train, is_held = _split(name, docs, held_out_texts, fraction)
        tokens = tokenize(docs, tokenizer, cache_dir)
        order = np.random.default_rng(domain_seed(seed, name)).permutation(np.flatnonzero(is_train))
        first_row = index * DOMAIN_STRIDE
        train[name] = Windows(tokens, order, T, first_row)
        windows = Windows(tokens, np.flatnonzero(is_held), T, first_row + _HELD_OUT_OFFSET)
        held_out[name] = _held_out(windows, [docs[k].text for k in np.flatnonzero(is_held)])
        dropped[name] = int((~is_train & ~is_held).sum())
        digests[name] = hashlib.sha256("\0".join([tokens.digest, *(d.id for d in docs)]).encode()).hexdigest()
    streams = [
        grain.MapDataset.source(windows).shuffle(seed=domain_seed(seed, name)).repeat()
        for name, windows in train.items()
    ]
    parts = {name: [weights[name], digests[name]] for name in train}
    return Corpus(
        train=grain.MapDataset.mix(streams, list(weights.values())),
        held_out=held_out,
        tokens={name: windows.total for name, windows in train.items()},
        rows={name: len(windows) for name, windows in train.items()},
        dropped=dropped,
        digest=hashlib.sha256(json.dumps([parts, T, seed, fraction, tokenizer.digest]).encode()).hexdigest(),
    )


def domain_seed(seed: int, name: str) -> int:
    """Return the seed of a domain; it depends on no other domain, so adding one does not reshuffle the others."""
    return zlib.crc32(f"{seed}/{name}".encode())


def _normalized(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the weights in the order of `names`, scaled to sum to 1.

    Raises InputError for a domain without a weight, an unknown domain and a weight that is not positive.
    """
    if not names:
        raise InputError("mixture: no domains; expected at least one")
    for name in weights:
        if name not in names:
            raise InputError(f"mixture: a weight for {name!r}, which is no domain{did_you_mean(name, names)}")
    for name in names:
        weight = weights.get(name)
        if weight is None:
            raise InputError(f"mixture: domain {name!r} has no weight; give one, or leave the domain out")
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise InputError(f"mixture: weight {weight!r} of domain {name!r}; expected a positive number")
    total = sum(weights.values())
    return {name: weights[name] / total for name in names}


def _split(
    name: str, docs: Sequence[Document], held_out_texts: set[str], fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks [documents] of the training documents and of the held-out ones; copies of the latter are in none."""
    is_held = np.array([is_held_out(document.id, fraction) for document in docs], bool)
    is_train = ~is_held & ~np.array([document.text in held_out_texts for document in docs], bool)
    if fraction and not is_held.any():
        raise InputError(f"domain {name!r}: none of its {len(docs)} documents is in the held-out {fraction}; raise it")
    if not is_train.any():
        raise InputError(f"domain {name!r}: no training documents are left of {len(docs)}; give more, or hold out less")
    return is_train, is_held


def _held_out(windows: Windows, texts: list[str]) -> HeldOut:
    n_bytes, n_compressed, compressor = 0, 0, zlib.compressobj(9)
    for text in texts:
        n_bytes += len(text.encode())
        n_compressed += len(compressor.compress(text.encode()))
    n_compressed += len(compressor.flush())
    rows = [windows[i] for i in range(len(windows))]
    return HeldOut(rows, n_bytes, 8 * n_compressed / n_bytes if n_bytes else math.nan)
