"""What a run reads: its corpus or task, its tokenizer, and its base, all checked before anything is written."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
from ..data.bad import STRICT, Bad
from ..data.embedded import code, prose
from ..data.mixture import Corpus, HeldOut, pretrain_rows
from ..data.pack import empty_row
from ..data.sft import Sft, sft_rows
from ..data.sources import Document, documents, five_domains, is_held_out
from ..data.tasks import Task, file_task, same_prompts, tasks, whole_task
from ..data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .config import Data, Run, close
from .progress import console

FEW = 30  # rows: of fewer, each is more than 3 % of a score


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
    sft = sft_rows(training_pairs(task, data), tokenizer, data.T, seed, data.pack, bad)
    _say(bad, task.dropped)
    return task, sft


def training_pairs(task: Task, data: Data) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of what a run trains on: all of the task's training rows, or --data.examples of them."""
    pairs = list(task.pairs())
    if data.examples > len(pairs):
        raise InputError(f"--data.examples {data.examples:,}: {task.name} has {len(pairs):,} for training")
    if data.examples:
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[: data.examples]]
    return pairs


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


def say_parts(task: Task) -> None:
    """Say how many rows train, choose and judge, and what so few of them cannot tell."""
    train, valid, test = (len(rows) for rows in (task.train, task.valid, task.test))
    say = lambda text: console.print(f"{task.name}: {text}", soft_wrap=True)  # noqa: E731
    say(f"{train + valid + test:,} rows: {train:,} train, {valid:,} choose (validation), {test:,} judge (test)")
    judges = test or valid
    if not judges:
        say("no row chooses a checkpoint or judges the result; give --data.valid FILE and --data.test FILE")
    elif judges < FEW:
        part = "test" if test else "validation"
        say(f"few: one of {judges} {part} rows is {1 / judges:.1%} of a score; give --data.test FILE with more rows")


def _say(bad: Bad, dropped: int = 0) -> None:
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


def eval_task(run: Run, name: str, root: str) -> Task:
    """What `graftax eval` scores: all rows of a file, the test of a named task, or what a run was judged by."""
    data, bad = dataclasses.replace(run.data, root=root or run.data.root), Bad(run.data.bad, run.data.bad_cap)
    file = name or data.test
    if not file or file in tasks:
        task = task_of(dataclasses.replace(data, task=name, valid="", test="") if name else data, bad)
    else:
        trained = _trained_on(data) if run.data.task else []
        task = whole_task(check_file(file), bad, trained or [])
        if trained is None:
            console.print(f"{task.name}: the run's training rows are not here, so it is not known whether these are "
                          "among them", soft_wrap=True)  # fmt: skip
        elif n := same_prompts(task.test, trained):
            console.print(f"{task.name}: {n:,} of {len(task.test):,} rows have a prompt that the run was trained on",
                          soft_wrap=True)  # fmt: skip
    _say(bad)
    return task


def _trained_on(data: Data) -> list[dict[str, Any]] | None:
    """The training rows of a run; None where they cannot be read."""
    try:
        return [row for _, row in training_pairs(task_of(data, Bad(data.bad, 1.0)), data)]
    except InputError:
        return None


def check_file(name: str) -> str:
    """The name of a file of examples. InputError for what is neither that nor a task."""
    if not Path(name).suffix and not Path(name).exists() and not name.startswith("hub:"):
        raise InputError(f"no task and no file {name!r}{close(name, tasks)}; tasks: {', '.join(tasks)}")
    return name


def task_of(data: Data, bad: Bad | None = None) -> Task:
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
        return tasks[data.task](Path(data.root or "."))
    bad = bad or Bad(data.bad, data.bad_cap)
    return file_task(check_file(data.task), data.held_out, 0, bad, data.valid, data.test)


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
