"""Load a tokenizer from a file or a folder, whichever library it needs."""

from pathlib import Path

from ... import InputError
from .hf_files import BESIDE, MAIN, collect_files, find_template
from .huggingface import from_files
from .sentencepiece import from_sentencepiece, is_bpe
from .tokenizer import BOS, Tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load tokenizer.model, tokenizer.json, or vocab.json with merges.txt; or the first of these in a folder.

    The files beside it count: names of special tokens, added tokens, the chat template, the ids that end a text.
    Raises InputError if a file cannot be read, is broken, or contradicts another.
    """
    path = Path(path)
    if path.is_dir():
        mains = [path / name for name in MAIN if (path / name).is_file()]
        if not mains:
            raise InputError(f"{path}: no tokenizer.model and no tokenizer.json in it; graftax tokenizer trains one")
        path = mains[0]
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(
            f"{path}: cannot be read ({e.strerror}); expected a tokenizer.model or tokenizer.json"
        ) from None
    main = "tokenizer.model" if path.suffix != ".json" else path.name if path.name in MAIN else "tokenizer.json"
    files = collect_files(path.parent, main)
    if main == "tokenizer.model" and _needs_sentencepiece_alone(data, path, files):
        return from_sentencepiece(path, data)
    return from_files(path.parent, main, data, files)


def _needs_sentencepiece_alone(data: bytes, path: Path, files: dict[str, bytes]) -> bool:
    """Return whether no file beside the model matters: none is Hugging Face's, or graftax trained it, or it is unigram.

    A chat template always matters.
    """
    if not set(files) & set(BESIDE):
        return True
    return not find_template(path.parent, files)[0] and (BOS.encode() in data or not is_bpe(data, path))
