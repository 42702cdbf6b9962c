"""Load a tokenizer from a file or a folder, whichever library it needs."""

from pathlib import Path

from ... import InputError
from .hf_files import BESIDE, MAIN, TokenizerFiles, read_files
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
    files = read_files(path)
    if files.main == "tokenizer.model" and _is_complete_model(files, path):
        return from_sentencepiece(path, files.data)
    return from_files(files)


def _is_complete_model(files: TokenizerFiles, path: Path) -> bool:
    """Return whether the files beside a SentencePiece model may be ignored.

    They may if none is Hugging Face's, or if none has a chat template and the model is unigram or graftax's own.
    """
    if not set(files.beside) & set(BESIDE):
        return True
    return not files.template()[0] and (BOS.encode() in files.data or not is_bpe(files.data, path))
