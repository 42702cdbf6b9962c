"""What a run reads: its corpus or task, its tokenizer, and its base, all checked before anything is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
from ..data.embedded import code, prose
from ..data.mixture import Corpus, HeldOut, pretrain_rows
from ..data.sources import Document, documents, five_domains, is_held_out
from ..data.tasks import Task, file_task, tasks
from ..data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .config import Data, close


def domain_documents(data: Data) -> dict[str, Any]:
    """{domain: iterable of documents} of a run's domains. `five:web` reads below --data.root."""
    if not data.domains:
        raise InputError("no domains to pretrain on: give --data.domains NAME SOURCE WEIGHT, or take another recipe")
    five = five_domains(Path(data.root)) if any(s.startswith("five:") for _, s, _ in data.domains) and data.root else {}
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
            found[name] = _Again(lambda source=source: documents(source))
    return found


class _Again:
    """An iterable that reads its source anew each time, so that no domain's text need stay in memory."""

    def __init__(self, read: Any):
        self.read = read

    def __iter__(self) -> Iterator[Document]:
        return iter(self.read())


def corpus_and_tokenizer(data: Data, seed: int, work: Path) -> tuple[Corpus, Tokenizer]:
    """A pretraining run's rows and tokenizer; without --data.tokenizer one is trained on the training documents."""
    domains = domain_documents(data)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        texts = (d.text for docs in domains.values() for d in docs if not is_held_out(d.id, data.held_out))
        tokenizer = train_tokenizer(texts, work / "tokenizer.model", data.vocab)
    weights = {name: weight for name, _, weight in data.domains}
    return pretrain_rows(domains, weights, tokenizer, data.T, seed, data.held_out, data.cache or None), tokenizer


def task_of(data: Data, seed: int) -> Task:
    """The task of a fine-tuning run: a known name below --data.root, or a file of examples."""
    if not data.task:
        raise InputError("nothing to tune on: give --data FILE.jsonl, or --data.task with one of " + ", ".join(tasks))
    if data.task in tasks:
        if not data.root and not data.task.startswith("embedded"):
            raise InputError(f"task {data.task!r} is read from files: say where they are with --data.root FOLDER")
        return tasks[data.task](Path(data.root or "."))
    if not Path(data.task).suffix and not Path(data.task).exists():
        raise InputError(f"no task and no file {data.task!r}{close(data.task, tasks)}; tasks: {', '.join(tasks)}")
    return file_task(Path(data.task), data.held_out, seed)


def save_held_out(path: Path, held_out: dict[str, HeldOut]) -> None:
    """Keep the held-out rows beside a base, so that any later phase can measure what it forgot."""
    arrays: dict[str, Any] = {}
    for name, domain in held_out.items():
        arrays |= {f"{name}/{key}": np.stack([row[key] for row in domain.rows]) for key in domain.rows[0]}
        arrays[f"{name}/of"] = np.array([domain.n_bytes, domain.zlib_bits_per_byte])
    np.savez_compressed(path, **arrays)


def load_held_out(path: Path) -> dict[str, HeldOut]:
    """The held-out rows of a base; {} where none were kept."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    found = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in arrays):
        fields = {
            k.rpartition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{name}/") and not k.endswith("/of")
        }
        rows = [{k: v[i] for k, v in fields.items()} for i in range(len(fields["ids"]))]
        n_bytes, zlib = arrays[f"{name}/of"]
        found[name] = HeldOut(rows, int(n_bytes), float(zlib))
    return found


def check_lengths(data: Data, context: int) -> None:
    """Rows must fit the base."""
    if context < data.T:
        raise InputError(f"--data.T {data.T} is longer than the model's context of {context}; shorten the rows")
