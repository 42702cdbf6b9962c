"""What a run reads: its corpus or task, its tokenizer, and its base, all checked before anything is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
from ..data.bad import STRICT, Bad
from ..data.columns import Columns
from ..data.embedded import code, prose
from ..data.mixture import Corpus, HeldOut, pretrain_rows
from ..data.pack import empty_row
from ..data.sft import Sft, sft_rows
from ..data.sources import Document, documents, five_domains, is_held_out
from ..data.tasks import Task, file_task, tasks
from ..data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .config import Data, close
from .progress import console


def domain_documents(data: Data, bad: Bad = STRICT) -> dict[str, Any]:
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
                raise InputError(f"domain {name!r}: five_domains has no {key!r}{close(key, five)}")
            found[name] = _Again(five[key])
        elif source in ("embedded:code", "embedded:prose"):
            found[name] = _Again(code if source.endswith("code") else prose)
        else:
            found[name] = _Again(lambda source=source: documents(source, bad=bad))
    return found


class _Again:
    """An iterable that reads its source anew each time, so that no domain's text need stay in memory."""

    def __init__(self, read: Any):
        self.read = read

    def __iter__(self) -> Iterator[Document]:
        return iter(self.read())


def corpus_and_tokenizer(data: Data, seed: int, work: Path) -> tuple[Corpus, Tokenizer]:
    """A pretraining run's rows and tokenizer; without --data.tokenizer one is trained on the training documents."""
    bad = Bad(data.bad, data.bad_cap)
    domains = domain_documents(data, bad)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        first = domain_documents(data, Bad(data.bad, data.bad_cap))  # what is left out is counted when it is read again
        texts = (d.text for docs in first.values() for d in docs if not is_held_out(d.id, data.held_out))
        tokenizer = train_tokenizer(texts, work / "tokenizer.model", data.vocab)
    weights = {name: weight for name, _, weight in data.domains}
    corpus = pretrain_rows(domains, weights, tokenizer, data.T, seed, data.held_out, data.cache or None)
    _say(bad, sum(corpus.dropped.values()))
    return corpus, tokenizer


def tuning_rows(data: Data, seed: int, tokenizer: Tokenizer, V: int) -> tuple[Task, Sft]:
    """The task of a fine-tuning run and its packed rows; V is the vocabulary of the base."""
    if tokenizer.vocab_size > V:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the base has {V} rows: an id >= {V} has none; "
            "give the tokenizer that the base was trained with"
        )
    bad = Bad(data.bad, data.bad_cap)
    task = task_of(data, bad)
    pairs = list(task.pairs())
    if data.examples > len(pairs):
        raise InputError(f"--data.examples {data.examples:,}: {task.name} has {len(pairs):,} for training")
    if data.examples:
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[: data.examples]]
    sft = sft_rows(pairs, tokenizer, data.T, seed, data.pack, bad)
    _say(bad, task.dropped)
    return task, sft


def validation_rows(task: Task, data: Data, tokenizer: Tokenizer) -> list[Any]:
    """The task's validation rows, packed; those that no row of T holds are left out, and counted."""
    if not task.valid:
        return []
    bad = Bad("skip", 1.0)
    try:
        found = sft_rows(task.pairs("valid"), tokenizer, data.T, 0, data.pack, bad)
    except InputError as error:
        console.print(f"no validation loss of {task.name}: {error}", soft_wrap=True)
        return []
    if left := len(task.valid) - found.examples:
        console.print(f"left out of the validation loss: {left:,} that do not fit into T={data.T}", soft_wrap=True)
    return found.rows


def _say(bad: Bad, dropped: int) -> None:
    for line in bad.settle():
        console.print(line, soft_wrap=True)
    if dropped:
        console.print(f"left out of training: {dropped:,} that are held out too", soft_wrap=True)


def check_tokenizer(tokenizer: Tokenizer, digest: str, where: Path) -> None:
    """InputError if a run's tokenizer is not the one that it was saved with: an id may mean another text now."""
    if digest and tokenizer.digest != digest:
        raise InputError(
            f"{where}: {tokenizer.file} is not the tokenizer of this run (sha256 {tokenizer.digest[:12]}, saved with "
            f"{digest[:12]}); put the old file back, it lies in the run's base too"
        )


def task_of(data: Data, bad: Bad | None = None) -> Task:
    """The task of a fine-tuning run: a known name below --data.root, or a file of examples, which is cut into parts in
    the same way whatever the run's seed: no seed trains on what another is judged by."""
    if not data.task:
        raise InputError("nothing to tune on: give --data FILE.jsonl, or --data.task with one of " + ", ".join(tasks))
    if data.task in tasks:
        if not data.root and not data.task.startswith("embedded"):
            raise InputError(f"task {data.task!r} is read from files: say where they are with --data.root FOLDER")
        if given := data.columns or data.ignore:
            raise InputError(f"--data.columns and --data.ignore are of a file; the rows of {data.task!r} are known, "
                             f"drop {' '.join(given)}")  # fmt: skip
        return tasks[data.task](Path(data.root or "."))
    if not Path(data.task).suffix and not Path(data.task).exists():
        raise InputError(f"no task and no file {data.task!r}{close(data.task, tasks)}; tasks: {', '.join(tasks)}")
    columns = Columns(data.columns, data.ignore)
    return file_task(Path(data.task), data.held_out, 0, bad or Bad(data.bad, data.bad_cap), columns)


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


def check_lengths(data: Data, context: int) -> None:
    """Rows must fit the base."""
    if context < data.T:
        raise InputError(f"--data.T {data.T} is longer than the model's context of {context}; shorten the rows")
