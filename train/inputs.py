"""Training rows and tokenizers: the corpus or task of a run, checked before anything is written."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
from ..bounds import did_you_mean
from ..data.columns import Columns
from ..data.documents import Document, is_held_out
from ..data.errors import RAISE, RowErrors
from ..data.five_domains import five_domains
from ..data.mixture import Corpus, HeldOut, pretrain_rows
from ..data.pack import empty_row
from ..data.python_library import code, prose
from ..data.sft import Sft, sft_rows
from ..data.sources import documents
from ..data.tasks import tasks
from ..data.tasks.base import Task
from ..data.tasks.file_task import file_task
from ..data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from ..model import Config
from .caches import cache_folder
from .config import Data
from .evaluate import answerable_rows
from .progress import console

FEW_ROWS = 30  # with fewer, each row is more than 3 % of a score


class Reiterable:
    """An iterable that reads its source anew each time, so that no domain's text has to stay in memory."""

    def __init__(self, read: Callable[[], Iterator[Document]]):
        self.read = read

    def __iter__(self) -> Iterator[Document]:
        return iter(self.read())


def domain_documents(data: Data, bad: RowErrors = RAISE) -> dict[str, Any]:
    """Return {domain: iterable of documents} of a run's domains. The source `five:web` is read below --data.root."""
    if not data.domains:
        raise InputError("no domains to pretrain on: give --data.domains NAME SOURCE WEIGHT, or use another recipe")
    reads_five = data.root and any(source.startswith("five:") for _, source, _ in data.domains)
    five = five_domains(Path(data.root), bad) if reads_five else {}
    domains: dict[str, Any] = {}
    for name, source, _ in data.domains:
        if source.startswith("five:"):
            if not data.root:
                raise InputError(f"domain {name!r} is read from five_domains: say where it is with --data.root FOLDER")
            key = source[5:]
            if key not in five:
                raise InputError(f"domain {name!r}: five_domains has no {key!r}{did_you_mean(key, five)}")
            domains[name] = Reiterable(five[key])
        elif source in ("embedded:code", "embedded:prose"):
            domains[name] = Reiterable(code if source.endswith("code") else prose)
        else:
            domains[name] = Reiterable(lambda source=source: documents(source, errors=bad))
    return domains


def corpus_and_tokenizer(data: Data, seed: int, work: Path) -> tuple[Corpus, Tokenizer]:
    """Return the rows and the tokenizer of a pretraining run. Without --data.tokenizer, train one on the training
    documents, in the folder `work`."""
    bad = data.row_errors()
    domains = domain_documents(data, bad)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        first_pass = domain_documents(data, data.row_errors())  # bad rows are counted in the second pass
        texts = (d.text for docs in first_pass.values() for d in docs if not is_held_out(d.id, data.held_out))
        tokenizer = train_tokenizer(texts, work / "tokenizer.model", data.vocab)
    weights = {name: weight for name, _, weight in data.domains}
    cache = cache_folder("data", data.cache)
    corpus = pretrain_rows(domains, weights, tokenizer, data.T, seed, data.held_out, cache)
    report_row_errors(bad, sum(corpus.dropped.values()))
    return corpus, tokenizer


def tuning_rows(
    data: Data, seed: int, tokenizer: Tokenizer, V: int, config: Config | None = None, virtual: int = 0
) -> tuple[Task, Sft]:
    """Return the task of a fine-tuning run and its packed rows. V is the vocabulary size of the base.

    config, virtual: the base and its number of virtual tokens, for a run that is scored: see `with_answerable_rows`.
    Raises InputError for a row that is bad or does not fit, unless --data.bad-rows allows it.
    """
    check_vocab(tokenizer, V)
    bad = data.row_errors()
    task = load_task(data, bad)
    pairs = training_pairs(task, data, seed)
    bad.rows = max(bad.rows, len(pairs) + len(task.valid) + len(task.test))  # tasks whose reader does not count
    task = with_answerable_rows(task, tokenizer, config, virtual, bad) if config else task
    sft = sft_rows(pairs, tokenizer, data.T, seed, data.pack, bad)
    if task.valid:
        valid = sft_rows(task.pairs("valid"), tokenizer, data.T, 0, data.pack, bad)
        sft, kept = dataclasses.replace(sft, valid=valid.rows), set(valid.kept)
        task = dataclasses.replace(task, valid=[row for where, row in task.pairs("valid") if where in kept])
    if data.valid or data.test:  # the digest covers these files too, so that a resumed run has the same ones
        rows = task.valid + task.test
        judges = [[r["prompt"], r["completion"], r["chat"].tools, dict(r["chat"].variables)] for r in rows]
        digest = hashlib.sha256(json.dumps([sft.digest, judges]).encode()).hexdigest()
        sft = dataclasses.replace(sft, digest=digest)
    report_row_errors(bad, task.dropped)
    return task, sft


def training_pairs(task: Task, data: Data, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, row) of the training rows: all of the task, or --data.examples of them, drawn by the seed; a
    smaller number is a subset of a larger one."""
    pairs = list(task.pairs())
    if data.examples > len(pairs):
        raise InputError(f"--data.examples {data.examples:,}: {task.name} has {len(pairs):,} for training")
    if data.examples:
        pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[: data.examples]]
    return pairs


def trained_rows(data: Data, seed: int) -> list[dict[str, Any]] | None:
    """Return the training rows of a run, [] for a run without a task, None where they cannot be read."""
    if not data.task:
        return []
    try:
        return [row for _, row in training_pairs(load_task(data, RowErrors(data.bad_rows, 1.0)), data, seed)]
    except InputError:
        return None


def with_answerable_rows(task: Task, tokenizer: Tokenizer, config: Config, virtual: int, bad: RowErrors) -> Task:
    """Return the task with only those scored rows that the model can answer (`answerable_rows`).

    Raises InputError if the task has scored rows and none can be answered.
    """
    rows = task.test or task.valid
    kept = answerable_rows(rows, tokenizer, config, virtual, bad) if rows else []
    if rows and not kept:
        bad.check_cap()
        raise InputError(f"{task.name}: none of the {len(rows)} rows to score can be used; {bad.messages[0]}")
    return dataclasses.replace(task, test=kept) if task.test else dataclasses.replace(task, valid=kept)


def report_split_sizes(task: Task) -> None:
    """Print how many rows train, choose the checkpoint and measure the result, and whether those are too few."""
    train, valid, test = (len(rows) for rows in (task.train, task.valid, task.test))
    sizes = f"{train + valid + test:,} rows: {train:,} train, {valid:,} choose (validation), {test:,} judge (test)"
    scored, part = test or valid, "test" if test else "validation"
    if not scored:
        sizes += "; nothing chooses a checkpoint or judges the result: give --data.valid FILE, --data.test FILE"
    elif scored < FEW_ROWS:
        sizes += f"; few: one {part} row is {1 / scored:.1%} of the score, give --data.test FILE with more"
    console.print(f"{task.name}: {sizes}", soft_wrap=True)


def report_row_errors(bad: RowErrors, dropped: int = 0) -> None:
    """Print which rows were left out or repaired. Raises InputError if they are more than the limit."""
    for line in bad.summary():
        console.print(line, soft_wrap=True)
    if dropped:
        console.print(f"left out of training: {dropped:,} that are held out too", soft_wrap=True)


def check_vocab(tokenizer: Tokenizer, V: int, where: str = "") -> None:
    """Raise InputError if a tokenizer has ids beyond a table of V rows: they would be read as other rows."""
    if tokenizer.vocab_size > V:
        raise InputError(
            f"{where}the tokenizer has {tokenizer.vocab_size} tokens, but the base has {V} rows: an id >= {V} has none"
            "; give the tokenizer that the base was trained with, or a base with as many rows (graftax import --resize)"
        )


def check_tokenizer(tokenizer: Tokenizer, digest: str, where: Path) -> None:
    """Raise InputError if a run's tokenizer is not the one that it was saved with: its ids may mean other text."""
    if digest and tokenizer.digest != digest:
        raise InputError(
            f"{where}: {tokenizer.file} is not the tokenizer of this run (sha256 {tokenizer.digest[:12]}, saved with "
            f"{digest[:12]}); restore the old file, which the run's base has too"
        )


def check_examples_file(name: str) -> str:
    """Return the name of a file of examples. Raises InputError for a name that is neither a file nor a source."""
    if re.fullmatch(r"(?!hub:)[\w:-]+", name) and not os.path.exists(name):
        raise InputError(f"no task and no file {name!r}{did_you_mean(name, tasks)}; tasks: {', '.join(tasks)}")
    return name


def load_task(data: Data, bad: RowErrors | None = None) -> Task:
    """Return the task of a fine-tuning run: a named one below --data.root, or a file of examples.

    A file is split in the same way whatever the run's seed, so that no seed trains on rows that score another.
    """
    if not data.task:
        raise InputError("nothing to tune on: give --data FILE.jsonl, or --data.task with one of " + ", ".join(tasks))
    if data.task not in tasks:
        bad, columns = bad or data.row_errors(), Columns(data.columns, data.ignore)
        return file_task(check_examples_file(data.task), data.held_out, 0, bad, data.valid, data.test, columns)
    if data.valid or data.test:
        flag = "--data.valid" if data.valid else "--data.test"
        raise InputError(f"{flag}: task {data.task!r} has its own validation and test rows; drop the flag")
    if not data.root and not data.task.startswith("embedded"):
        raise InputError(f"task {data.task!r} is read from files: say where they are with --data.root FOLDER")
    if columns := data.columns or data.ignore:
        raise InputError(
            f"--data.columns and --data.ignore apply to a file; the rows of {data.task!r} are known, "
            f"drop {' '.join(columns)}"
        )
    return tasks[data.task](Path(data.root or "."))


def check_row_length(data: Data, context: int, virtual: int = 0) -> None:
    """Raise InputError if rows do not fit the model's context, of which `virtual` positions are taken."""
    if context - virtual < data.T:
        reserved = f" ({virtual} of it are virtual tokens)" if virtual else ""
        raise InputError(f"--data.T {data.T} is longer than the model's context of {context}{reserved}; lower it")


def save_held_out(path: Path, held_out: dict[str, HeldOut]) -> None:
    """Save the held-out rows of a base, so that a later phase can measure what it forgets."""
    arrays: dict[str, Any] = {}
    for name, domain in held_out.items():
        if not domain.rows:
            continue
        arrays |= {f"{name}/{key}": np.stack([row[key] for row in domain.rows]) for key in domain.rows[0]}
        arrays[f"{name}/of"] = np.array([domain.n_bytes, domain.zlib_bits_per_byte])
    np.savez_compressed(path, **arrays)


def load_held_out(path: Path) -> dict[str, HeldOut]:
    """Return the held-out rows of a base; {} if it has none. Raises InputError for a damaged or pickled file."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {name: _held_out(name, arrays) for name in names}
    except Exception as error:  # whatever numpy, zipfile and zlib raise, the cause is the file
        reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        reason = "damaged, or objects, which are pickles" if "allow_pickle" in reason else reason
        hint = "copy it from the original base, or delete it: then forgetting is not measured"
        raise InputError(f"{path}: not the held-out rows of a base ({reason}); {hint}") from None


def _held_out(name: str, arrays: dict[str, Any]) -> HeldOut:
    fields = {key: arrays[f"{name}/{key}"] for key in empty_row(2)}
    n, T = fields["ids"].shape
    for key, expected in empty_row(T).items():
        if fields[key].shape != (n, *np.shape(expected)) or fields[key].dtype != expected.dtype:
            raise ValueError(f"{name}/{key} is {fields[key].dtype}{list(fields[key].shape)}")
    n_bytes, zlib = arrays[f"{name}/of"]
    return HeldOut([{k: v[i] for k, v in fields.items()} for i in range(n)], int(n_bytes), float(zlib))
