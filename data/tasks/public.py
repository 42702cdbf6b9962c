"""Three public data sets as tasks, read from a folder laid out as in data/README.md."""

import contextlib
import csv
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ... import InputError
from ..documents import is_held_out
from ..files import read_text
from .base import Task, TaskRow, accuracy, drop_leaks, exact_match

_SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")  # of E2E: name[The Eagle]
_VERBATIM_SLOTS = ("name", "near", "eatType", "food", "area")  # a sentence repeats their values as they are


def clinc150(root: Path | str) -> Task:
    """Utterance -> one of 150 intents, without the out-of-scope rows (Larson et al. 2019, arXiv:1909.02027)."""
    path = Path(root) / "clinc150" / "data_full.json"
    with _format_errors(path):
        data = _parse_json(path, read_text(path))
        train, valid, test = (
            [{"prompt": text, "completion": intent.replace("_", " ")} for text, intent in data[part]]
            for part in ("train", "val", "test")
        )
    valid, n_valid = drop_leaks(valid, test)
    train, n_train = drop_leaks(train, test + valid)
    choices = sorted({row["completion"] for row in train})
    return Task("clinc150", train, valid, test, accuracy, choices, n_train + n_valid)


def snips(root: Path | str) -> Task:
    """Utterance -> `Intent | slot = value | ...`, slots in the order of the utterance (arXiv:1805.10190).

    5 % of the training file's prompts are held out for validation, by hash; the data set's own validation files are the
    test rows.
    """
    folder = Path(root) / "snips"
    with _format_errors(folder):
        paths = sorted(folder.glob("*.json"))
    parts: dict[str, list[TaskRow]] = {"train": [], "validate": []}
    for path in paths:
        part, _, intent = path.stem.removesuffix("_full").partition("_")
        # This one file is latin-1; the other 13 are UTF-8.
        text = path.read_text("latin-1") if path.name == "train_PlayMusic_full.json" else read_text(path)
        with _format_errors(path):
            parts[part] += [_frame(intent, item["data"]) for item in _parse_json(path, text)[intent]]
    if not parts["train"] or not parts["validate"]:
        raise InputError(f"{folder}: no train_*.json or no validate_*.json; expected the layout of data/README.md")
    rows, dropped = drop_leaks(parts["train"], parts["validate"])
    valid = [row for row in rows if is_held_out(row["prompt"], 0.05)]
    train = [row for row in rows if not is_held_out(row["prompt"], 0.05)]
    return Task("snips", train, valid, parts["validate"], score_frames, None, dropped)


def e2e_nlg(root: Path | str) -> Task:
    """Meaning representation -> sentence (Novikova et al. 2017, arXiv:1706.09254).

    Train has a row per reference sentence; valid and test have a row per representation, with all its references in
    `meta`. The three parts share no representation.
    """
    path = Path(root) / "e2e_nlg" / "e2e-dataset.zip"
    with _format_errors(path), zipfile.ZipFile(path) as archive:
        names = ("trainset", "devset", "testset_w_refs")
        pairs, valid, test = (_read_csv(archive.read(f"e2e-dataset/{name}.csv")) for name in names)
    test = _by_meaning(test)
    valid, n_valid = drop_leaks(_by_meaning(valid), test)
    train = [{"prompt": meaning, "completion": text} for meaning, text in pairs]
    train, n_train = drop_leaks(train, test + valid)
    return Task("e2e_nlg", train, valid, test, score_sentences, None, n_train + n_valid)


def score_frames(rows: list[TaskRow], outputs: list[str]) -> dict[str, float]:
    """Return the exact match of whole frames, and of the intents alone."""
    intents = [output.split("|")[0].strip() for output in outputs]
    expected = [{"completion": row["completion"].split("|")[0]} for row in rows]
    return {"frame_exact_match": exact_match(rows, outputs), "intent_accuracy": exact_match(expected, intents)}


def score_sentences(rows: list[TaskRow], outputs: list[str]) -> dict[str, float]:
    """Return the corpus BLEU (0 to 100) over all references, and per slot the share of values that outputs repeat."""
    import sacrebleu

    references = [row["meta"]["references"] for row in rows]
    most = max(map(len, references))
    padded = [refs + [None] * (most - len(refs)) for refs in references]
    bleu = sacrebleu.corpus_bleu(list(outputs), [list(refs) for refs in zip(*padded, strict=True)])
    scores = {"bleu": bleu.score}
    for slot in _VERBATIM_SLOTS:
        hits = [
            row["meta"]["slots"][slot].casefold() in output.casefold()
            for row, output in zip(rows, outputs, strict=True)
            if slot in row["meta"]["slots"]
        ]
        if hits:
            scores[f"slot_{slot}"] = sum(hits) / len(hits)
    return scores


def _frame(intent: str, spans: list[dict[str, str]]) -> TaskRow:
    slots = [f" | {span['entity']} = {span['text'].strip()}" for span in spans if "entity" in span]
    return {"prompt": "".join(span["text"] for span in spans).strip(), "completion": intent + "".join(slots)}


def _read_csv(raw: bytes) -> list[tuple[str, str]]:
    """Return the (meaning representation, sentence) pairs of one file."""
    table = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""))
    return [(row["mr"].strip(), row["ref"].strip()) for row in table]


def _by_meaning(pairs: list[tuple[str, str]]) -> list[TaskRow]:
    references: dict[str, list[str]] = defaultdict(list)
    for meaning, text in pairs:
        references[meaning].append(text)
    return [
        {"prompt": m, "completion": refs[0], "meta": {"references": refs, "slots": dict(_SLOT.findall(m))}}
        for m, refs in references.items()
    ]


@contextlib.contextmanager
def _format_errors(path: Path) -> Iterator[None]:
    """Raise InputError if a file is missing, or if its content is not as expected."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; data/README.md describes the layout of the data folder")
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError, zipfile.BadZipFile) as e:
        problem = f"not as data/README.md describes it ({type(e).__name__}: {e})"
        raise InputError(f"{path}: {problem}; download it again") from e


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not valid JSON ({e.msg} at column {e.colno})") from None
