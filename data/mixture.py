"""Domains -> one infinite, seeded, weighted stream of packed rows, and the documents held out of it, by domain."""

import difflib
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
from .pack import Row, Windows, tokenize
from .sources import Document, is_held_out
from .tokenizers import Tokenizer

DOMAIN_STRIDE = 1 << 40  # `row` = domain index * DOMAIN_STRIDE + the row's index in the domain
_HELD_OUT_OFFSET = 1 << 39  # held-out rows are numbered apart from training rows


@dataclass(frozen=True)
class HeldOut:
    """Rows that cover whole documents, so that nats summed over target tokens / ln 2 / n_bytes is bits per byte."""

    rows: list[Row]
    n_bytes: int
    zlib_bits_per_byte: float  # of the same texts in one stream, level 9: the floor a model has to beat


@dataclass(frozen=True)
class Corpus:
    """What pretraining reads. The same `digest` is the same stream of rows."""

    train: grain.MapDataset
    held_out: dict[str, HeldOut]
    tokens: dict[str, int]  # training tokens of one epoch, bos and eos included
    rows: dict[str, int]  # training rows of one epoch
    dropped: dict[str, int]  # training documents that equal a held-out one
    digest: str


@dataclass(frozen=True)
class _Domain:
    windows: Windows
    held_out: HeldOut
    dropped: int
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
    """Tokenise each domain once, hold out `fraction` of its documents by id, pack, shuffle by epoch, mix by `weights`.

    A document held out in one domain is dropped from the training side of every domain. All the text is in memory
    until it is tokenised. InputError for weights that do not fit the domains, or an empty side of the split.
    """
    weights = check_weights(weights, list(domains))
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: an integer in [0, 2**32) is wanted")
    texts = {name: list(docs) for name, docs in domains.items()}
    banned = {d.text for docs in texts.values() for d in docs if is_held_out(d.id, fraction)}
    made = {}
    for index, name in enumerate(list(texts)):
        made[name] = _domain(name, index, texts.pop(name), banned, tokenizer, T, seed, fraction, cache_dir)
    streams = [
        grain.MapDataset.source(made[name].windows).shuffle(seed=domain_seed(seed, name)).repeat() for name in made
    ]
    parts = {name: [weights[name], domain.digest] for name, domain in made.items()}
    identity = json.dumps([parts, T, seed, fraction, tokenizer.digest])
    return Corpus(
        train=grain.MapDataset.mix(streams, [weights[name] for name in made]),
        held_out={name: domain.held_out for name, domain in made.items()},
        tokens={name: domain.windows.total for name, domain in made.items()},
        rows={name: len(domain.windows) for name, domain in made.items()},
        dropped={name: domain.dropped for name, domain in made.items()},
        digest=hashlib.sha256(identity.encode()).hexdigest(),
    )


def domain_seed(seed: int, name: str) -> int:
    """A seed of its own for each domain, so that adding one does not reshuffle the others."""
    return zlib.crc32(f"{seed}/{name}".encode())


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Weights in the order of `names`, summing to 1. InputError: a name without weight, unknown, or not positive."""
    if not names:
        raise InputError("mixture: no domains; at least one is wanted")
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"mixture: a weight for {name!r}, which is no domain of {list(names)}{hint}")
    for name in names:
        weight = weights.get(name)
        if weight is None:
            raise InputError(f"mixture: domain {name!r} has no weight; give one, or leave the domain out")
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise InputError(f"mixture: weight {weight!r} of domain {name!r}; a positive number is wanted")
    total = sum(weights.values())
    return {name: weights[name] / total for name in names}


def _domain(
    name: str,
    index: int,
    docs: list[Document],
    banned: set[str],
    tokenizer: Tokenizer,
    T: int,
    seed: int,
    fraction: float,
    cache_dir: Path | str | None,
) -> _Domain:
    held = np.array([is_held_out(document.id, fraction) for document in docs], bool)
    twin = np.array([document.text in banned for document in docs], bool) & ~held
    if fraction and not held.any():
        raise InputError(f"domain {name!r}: none of its {len(docs)} documents is in the held-out {fraction}; raise it")
    if not (~held & ~twin).any():
        raise InputError(f"domain {name!r}: no training documents are left of {len(docs)}; give more, or hold out less")
    tokens = tokenize(docs, tokenizer, cache_dir)
    order = np.random.default_rng(domain_seed(seed, name)).permutation(np.flatnonzero(~held & ~twin))
    first = index * DOMAIN_STRIDE
    quiet = Windows(tokens, np.flatnonzero(held), T, first + _HELD_OUT_OFFSET)
    return _Domain(
        windows=Windows(tokens, order, T, first),
        held_out=_held_out(quiet, [docs[k].text for k in np.flatnonzero(held)]),
        dropped=int(twin.sum()),
        digest=hashlib.sha256("\0".join([tokens.digest, *(document.id for document in docs)]).encode()).hexdigest(),
    )


def _held_out(windows: Windows, texts: list[str]) -> HeldOut:
    n_bytes, n_packed, stream = 0, 0, zlib.compressobj(9)
    for text in texts:
        n_bytes += len(text.encode())
        n_packed += len(stream.compress(text.encode()))
    n_packed += len(stream.flush())
    rows = [windows[i] for i in range(len(windows))]
    return HeldOut(rows, n_bytes, 8 * n_packed / n_bytes if n_bytes else math.nan)
