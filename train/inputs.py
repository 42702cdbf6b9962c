"""What a run reads: its corpus or task, its tokenizer, and its base, all checked before anything is written."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
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
from ..data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from ..model import Config
from .caches import cache_folder
from .config import Data, did_you_mean
from .evaluate import answerable
from .progress import console

FEW = 30  # rows: of fewer, each is more than 3 % of a score


def domain_documents(data: Data, bad: RowErrors = RAISE) -> dict[str, Any]:
    """{domain: iterable of documents} of a run's domains. `five:web` reads below --data.root."""
    if not data.domains:
        raise InputError("no domains to pretrain on: give --data.domains NAME SOURCE WEIGHT, or take another recipe")
    wanted = data.root and any(source.startswith("five:") for _, source, _ in data.domains)
    five = five_domains(Path(data.root), bad) if wanted else {}
    found: dict[str, Any] = {}
    for name, source, _ in data.domains:
        if source.startswith("five:"):
            if not data.root:
                raise InputError(f"domain {name!r} is read from five_domains: say where it is with --data.root FOLDER")
            key = source[5:]
            if key not in five:
                raise InputError(f"domain {name!r}: five_domains has no {key!r}{did_you_mean(key, five)}")
            found[name] = Reiterable(five[key])
        elif source in ("embedded:code", "embedded:prose"):
            found[name] = Reiterable(code if source.endswith("code") else prose)
        else:
            found[name] = Reiterable(lambda source=source: documents(source, errors=bad))
    return found


class Reiterable:
    """An iterable that reads its source anew each time, so that no domain's text need stay in memory."""

    def __init__(self, read: Any):
        self.read = read

    def __iter__(self) -> Iterator[Document]:
        return iter(self.read())


def corpus_and_tokenizer(data: Data, seed: int, work: Path) -> tuple[Corpus, Tokenizer]:
    """A pretraining run's rows and tokenizer; without --data.tokenizer one is trained on the training documents."""
    bad = RowErrors(data.bad, data.bad_cap)
    domains = domain_documents(data, bad)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        first = domain_documents(
            data, RowErrors(data.bad, data.bad_cap)
        )  # what is left out is counted when it is read again
        texts = (d.text for docs in first.values() for d in docs if not is_held_out(d.id, data.held_out))
        tokenizer = train_tokenizer(texts, work / "tokenizer.model", data.vocab)
    weights = {name: weight for name, _, weight in data.domains}
    cache = cache_folder("data", data.cache)
    corpus = pretrain_rows(domains, weights, tokenizer, data.T, seed, data.held_out, cache)
    say(bad, sum(corpus.dropped.values()))
    return corpus, tokenizer


def tuning_rows(
    data: Data, seed: int, tokenizer: Tokenizer, V: int, config: Config | None = None, virtual: int = 0
) -> tuple[Task, Sft]:
    """The task of a fine-tuning run and its packed rows; V is the vocabulary of the base.

    config, virtual: the base and the number of virtual tokens, for a run that is scored: see `judged`.
    InputError: a row that is bad, or does not fit, wherever it is; unless --data.bad says otherwise.
    """
    check_rows(tokenizer, V)
    bad = RowErrors(data.bad, data.bad_cap)
    task = task_of(data, bad)
    pairs = training_pairs(task, data, seed)
    bad.rows = max(bad.rows, len(pairs) + len(task.valid) + len(task.test))  # tasks that no reader has counted
    task = judged(task, tokenizer, config, virtual, bad) if config else task
    sft = sft_rows(pairs, tokenizer, data.T, seed, data.pack, bad)
    if task.valid:
        valid = sft_rows(task.pairs("valid"), tokenizer, data.T, 0, data.pack, bad)
        sft, kept = dataclasses.replace(sft, valid=valid.rows), set(valid.kept)
        task = dataclasses.replace(task, valid=[row for where, row in task.pairs("valid") if where in kept])
    if data.valid or data.test:  # so that a run goes on with no others
        judges = [[row["prompt"], row["completion"], row["chat"].tools, dict(row["chat"].variables)]
                  for row in task.valid + task.test]  # fmt: skip
        digest = hashlib.sha256(json.dumps([sft.digest, judges]).encode()).hexdigest()
        sft = dataclasses.replace(sft, digest=digest)
    say(bad, task.dropped)
    return task, sft


def training_pairs(task: Task, data: Data, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of what a run trains on: all of the task's training rows, or --data.examples of them, drawn by its
    seed; fewer are part of more."""
    pairs = list(task.pairs())
    if data.examples > len(pairs):
        raise InputError(f"--data.examples {data.examples:,}: {task.name} has {len(pairs):,} for training")
    if data.examples:
        pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[: data.examples]]
    return pairs


def trained_on(data: Data, seed: int) -> list[dict[str, Any]] | None:
    """The training rows of a run, [] for one that has none; None where they cannot be read."""
    try:
        return (
            [row for _, row in training_pairs(task_of(data, RowErrors(data.bad, 1.0)), data, seed)] if data.task else []
        )
    except InputError:
        return None


def judged(task: Task, tokenizer: Tokenizer, config: Config, virtual: int, bad: RowErrors) -> Task:
    """The task, with those of the rows that judge it which are `answerable`. InputError if there were some and none is
    left."""
    rows = task.test or task.valid
    kept = answerable(rows, tokenizer, config, virtual, bad) if rows else []
    if rows and not kept:
        bad.check_cap()
        raise InputError(f"{task.name}: none of the {len(rows)} rows that judge can be used; {bad.messages[0]}")
    return dataclasses.replace(task, test=kept) if task.test else dataclasses.replace(task, valid=kept)


def say_parts(task: Task) -> None:
    """Say how many rows train, choose and judge, and what so few of them cannot tell."""
    train, valid, test = (len(rows) for rows in (task.train, task.valid, task.test))
    said = f"{train + valid + test:,} rows: {train:,} train, {valid:,} choose (validation), {test:,} judge (test)"
    judges, part = test or valid, "test" if test else "validation"
    if not judges:
        said += "; nothing chooses a checkpoint or judges the result: give --data.valid FILE, --data.test FILE"
    elif judges < FEW:
        said += f"; few: one {part} row is {1 / judges:.1%} of the score, give --data.test FILE with more"
    console.print(f"{task.name}: {said}", soft_wrap=True)


def say(bad: RowErrors, dropped: int = 0) -> None:
    """Say what was left out. InputError if it is more than the cap."""
    for line in bad.summary():
        console.print(line, soft_wrap=True)
    if dropped:
        console.print(f"left out of training: {dropped:,} that are held out too", soft_wrap=True)


def check_rows(tokenizer: Tokenizer, V: int, where: str = "") -> None:
    """InputError if a tokenizer has ids that a table of V rows does not hold: those would be read as other rows."""
    if tokenizer.vocab_size > V:
        raise InputError(
            f"{where}the tokenizer has {tokenizer.vocab_size} tokens, but the base has {V} rows: an id >= {V} has none"
            "; give the tokenizer that the base was trained with, or a base with as many rows (graftax import --resize)"
        )


def check_tokenizer(tokenizer: Tokenizer, digest: str, where: Path) -> None:
    """InputError if a run's tokenizer is not the one that it was saved with: an id may mean another text now."""
    if digest and tokenizer.digest != digest:
        raise InputError(
            f"{where}: {tokenizer.file} is not the tokenizer of this run (sha256 {tokenizer.digest[:12]}, saved with "
            f"{digest[:12]}); put the old file back, it lies in the run's base too"
        )


def check_file(name: str) -> str:
    """The name of a file of examples. InputError for what is neither that nor a task."""
    if re.fullmatch(r"(?!hub:)[\w:-]+", name) and not os.path.exists(name):
        raise InputError(f"no task and no file {name!r}{did_you_mean(name, tasks)}; tasks: {', '.join(tasks)}")
    return name


def task_of(data: Data, bad: RowErrors | None = None) -> Task:
    """The task of a fine-tuning run: a known name below --data.root, or a file of examples, which is cut into parts in
    the same way whatever the run's seed: no seed trains on what another is judged by."""
    if not data.task:
        raise InputError("nothing to tune on: give --data FILE.jsonl, or --data.task with one of " + ", ".join(tasks))
    if data.task in tasks:
        if data.valid or data.test:
            flag = "--data.valid" if data.valid else "--data.test"
            raise InputError(f"{flag}: task {data.task!r} has rows of its own to choose and to judge by; drop the flag")
        if not data.root and not data.task.startswith("embedded"):
            raise InputError(f"task {data.task!r} is read from files: say where they are with --data.root FOLDER")
        if given := data.columns or data.ignore:
            raise InputError(f"--data.columns and --data.ignore are of a file; the rows of {data.task!r} are known, "
                             f"drop {' '.join(given)}")  # fmt: skip
        return tasks[data.task](Path(data.root or "."))
    bad, columns = bad or RowErrors(data.bad, data.bad_cap), Columns(data.columns, data.ignore)
    return file_task(check_file(data.task), data.held_out, 0, bad, data.valid, data.test, columns)


def save_held_out(path: Path, held_out: dict[str, HeldOut]) -> None:
    """Keep the held-out rows beside a base, so that any later phase can measure what it forgot."""
    arrays: dict[str, Any] = {}
    for name, domain in held_out.items():
        if not domain.rows:  # nothing was held out
            continue
        arrays |= {f"{name}/{key}": np.stack([row[key] for row in domain.rows]) for key in domain.rows[0]}
        arrays[f"{name}/of"] = np.array([domain.n_bytes, domain.zlib_bits_per_byte])
    np.savez_compressed(path, **arrays)


def load_held_out(path: Path) -> dict[str, HeldOut]:
    """The held-out rows of a base; {} where none were kept. InputError for a damaged file, or one with objects."""
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
        hint = "copy it from where the base was made, or delete it: then what is forgotten is not measured"
        raise InputError(f"{path}: not the held-out rows of a base ({reason}); {hint}") from None


def _held_out(name: str, arrays: dict[str, Any]) -> HeldOut:
    fields = {key: arrays[f"{name}/{key}"] for key in empty_row(2)}
    n, T = fields["ids"].shape
    for key, wanted in empty_row(T).items():
        if fields[key].shape != (n, *np.shape(wanted)) or fields[key].dtype != wanted.dtype:
            raise ValueError(f"{name}/{key} is {fields[key].dtype}{list(fields[key].shape)}")
    n_bytes, zlib = arrays[f"{name}/of"]
    return HeldOut([{k: v[i] for k, v in fields.items()} for i in range(n)], int(n_bytes), float(zlib))


def check_lengths(data: Data, context: int, virtual: int = 0) -> None:
    """Rows must fit the base, `virtual` positions of which are taken."""
    if context - virtual < data.T:
        taken = f" ({virtual} of it are virtual tokens)" if virtual else ""
        raise InputError(f"--data.T {data.T} is longer than the model's context of {context}{taken}; shorten the rows")
