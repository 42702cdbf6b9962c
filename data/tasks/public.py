"""Three public data sets as tasks, read from a folder with the layout of data/README.md."""

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
from .base import Row, Task, accuracy, drop_leaks, exact_match

_SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
_VERBATIM = ("name", "near", "eatType", "food", "area")  # the slots whose value a sentence repeats as it is


def _need(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: not there; the data folder's layout is in data/README.md")
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is there but not as it should be is one line too."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError, zipfile.BadZipFile) as e:
        raise InputError(f"{path}: not as data/README.md describes it ({type(e).__name__}: {e}); get it again") from e


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not valid JSON ({e.msg} at column {e.colno})") from None


def clinc150(root: Path | str) -> Task:
    """Utterance -> one of 150 intents (Larson et al. 2019, arXiv 1909.02027); in-scope rows only."""
    path = _need(Path(root) / "clinc150" / "data_full.json")
    with _reading(path):
        data = _json(path, read_text(path))
        parts = {
            part: [{"prompt": text, "completion": intent.replace("_", " ")} for text, intent in data[part]]
            for part in ("train", "val", "test")
        }
    valid, lost = drop_leaks(parts["val"], parts["test"])
    train, dropped = drop_leaks(parts["train"], parts["test"] + valid)
    choices = sorted({row["completion"] for row in train})
    return Task("clinc150", train, valid, parts["test"], accuracy, choices, dropped + lost)


def snips(root: Path | str) -> Task:
    """Utterance -> `Intent | slot = value | ...`, slots in the order of the utterance (arXiv 1805.10190)."""
    folder = _need(Path(root) / "snips")
    found: dict[str, list[Row]] = {"train": [], "validate": []}
    for path in sorted(folder.glob("*.json")):
        part, _, rest = path.stem.partition("_")
        intent = rest.removesuffix("_full")
        # This one file is latin-1; the other 13 are UTF-8.
        text = path.read_text("latin-1") if path.name == "train_PlayMusic_full.json" else read_text(path)
        with _reading(path):
            found[part] += [_frame(intent, item["data"]) for item in _json(path, text)[intent]]
    if not found["train"] or not found["validate"]:
        raise InputError(f"{folder}: no train_*.json or no validate_*.json in it; the layout is in data/README.md")
    kept, dropped = drop_leaks(found["train"], found["validate"])
    parts = {True: [], False: []}
    for row in kept:
        parts[is_held_out(row["prompt"], 0.05)].append(row)
    return Task("snips", parts[False], parts[True], found["validate"], score_frames, None, dropped)


def _frame(intent: str, spans: list[dict[str, str]]) -> Row:
    slots = [f" | {span['entity']} = {span['text'].strip()}" for span in spans if "entity" in span]
    return {"prompt": "".join(span["text"] for span in spans).strip(), "completion": intent + "".join(slots)}


def score_frames(rows: list[Row], outputs: list[str]) -> dict[str, float]:
    """Whole frames equal, and intents equal."""
    intents = [o.split("|")[0].strip() for o in outputs]
    wanted = [{"completion": row["completion"].split("|")[0]} for row in rows]
    return {"frame_exact_match": exact_match(rows, outputs), "intent_accuracy": exact_match(wanted, intents)}


def e2e_nlg(root: Path | str) -> Task:
    """Meaning representation -> sentence (Novikova et al. 2017, arXiv 1706.09254). Train: a row a reference; valid and
    test: a row a representation, all its references in meta. The three share no representation.
    """
    path = _need(Path(root) / "e2e_nlg" / "e2e-dataset.zip")
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {"train": "trainset", "valid": "devset", "test": "testset_w_refs"}
        read = {part: _pairs(archive.read(f"e2e-dataset/{name}.csv")) for part, name in names.items()}
    test = _by_meaning(read["test"])
    valid, lost = drop_leaks(_by_meaning(read["valid"]), test)
    train = [{"prompt": meaning, "completion": text} for meaning, text in read["train"]]
    train, dropped = drop_leaks(train, test + valid)
    return Task("e2e_nlg", train, valid, test, score_sentences, None, dropped + lost)


def _pairs(raw: bytes) -> list[tuple[str, str]]:
    table = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""))
    return [(row["mr"].strip(), row["ref"].strip()) for row in table]


def _by_meaning(pairs: list[tuple[str, str]]) -> list[Row]:
    texts: dict[str, list[str]] = defaultdict(list)
    for meaning, text in pairs:
        texts[meaning].append(text)
    return [
        {"prompt": m, "completion": refs[0], "meta": {"references": refs, "slots": dict(_SLOT.findall(m))}}
        for m, refs in texts.items()
    ]


def score_sentences(rows: list[Row], outputs: list[str]) -> dict[str, float]:
    """Corpus BLEU over all references, and the share of slot values that the sentence repeats, by slot."""
    import sacrebleu

    most = max(len(row["meta"]["references"]) for row in rows)
    padded = [row["meta"]["references"] + [None] * (most - len(row["meta"]["references"])) for row in rows]
    scores = {"bleu": sacrebleu.corpus_bleu(list(outputs), [list(refs) for refs in zip(*padded, strict=True)]).score}
    pairs = [(row["meta"]["slots"], output) for row, output in zip(rows, outputs, strict=True)]
    for slot in _VERBATIM:
        asked = [(slots[slot].casefold(), output.casefold()) for slots, output in pairs if slot in slots]
        if asked:
            scores[f"slot_{slot}"] = sum(value in output for value, output in asked) / len(asked)
    return scores
