"""Add tokens to a tokenizer: special ones, which no text gives, and ordinary ones, which their text gives."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import InputError
from .hf_files import TokenizerFiles
from .huggingface import from_files, load_backend
from .sentencepiece import append_pieces, from_sentencepiece, user_pieces
from .tokenizer import CONFIG, SPECIAL, Tokenizer


def add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[Tokenizer, dict[str, int]]:
    """Return (`tokenizer` with the tokens `names`, {name: id}). Tokens that it already has stay as they are.

    A token of the chat format (a role's marker, or one that the chat template names) becomes special: no text of a row
    gives it. Any other is given by its text wherever that stands: in rows, documents and prompts.
    """
    tokenizer = _extend(tokenizer, {name: name in SPECIAL or name in tokenizer.template for name in names})
    ordinary = text_tokens(tokenizer)
    for name in names:  # a byte-level decoder takes some letters that are not ASCII for bytes
        if name in ordinary and name not in tokenizer.decode([*tokenizer.encode("a"), ordinary[name]]):
            raise InputError(f"added token {name!r}: this tokenizer would not decode it to its text; use ASCII letters")
    return tokenizer, {name: (tokenizer.special | ordinary)[name] for name in names}


def add_special(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Return `tokenizer` with the special tokens `names` under new ids at the end; those that it has stay as they are.

    The embedding table needs as many more rows. Raises InputError if a name is blank or an ordinary piece.
    """
    return _extend(tokenizer, dict.fromkeys(names, True))


def text_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return {text: id} of the added tokens that are not special: their text gives them."""
    if tokenizer.encode_marked is None:
        return user_pieces(tokenizer.data)
    added = load_backend(_files(tokenizer))[0].get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if not token.special}


def _files(tokenizer: Tokenizer) -> TokenizerFiles:
    folder = Path(tokenizer.template_file).parent  # for messages
    return TokenizerFiles(folder, tokenizer.file, tokenizer.data, tokenizer.files)


def _extend(tokenizer: Tokenizer, tokens: dict[str, bool]) -> Tokenizer:
    """Return `tokenizer` with the tokens {text: special}; a Hugging Face tokenizer becomes a tokenizer.json."""
    blank = next((name for name in tokens if not name.strip()), None)
    if blank is not None:
        raise InputError(f"added token {blank!r}: expected text that is not blank")
    known = tokenizer.special | text_tokens(tokenizer)
    new = {name: special for name, special in tokens.items() if name not in known}
    if not new:
        return tokenizer
    files = _files(tokenizer)
    if tokenizer.encode_marked is None:
        return from_sentencepiece(files.path, append_pieces(tokenizer.data, new))
    from tokenizers import AddedToken

    model, names = load_backend(files)
    ordinary = next((name for name in new if model.token_to_id(name) is not None), None)
    if ordinary is not None:
        raise InputError(f"added token {ordinary!r}: already an ordinary piece of this vocabulary; take another name")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **files.json(CONFIG)}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    for name, special in new.items():
        token = AddedToken(name, special=special, normalized=False)
        (model.add_special_tokens if special else model.add_tokens)([token])
        if config.get("added_tokens_decoder"):
            listed = {"content": name, **flags, "special": special}
            config["added_tokens_decoder"][str(model.token_to_id(name))] = listed
    beside = tokenizer.files | {CONFIG: json.dumps(config, indent=2).encode()}
    return from_files(TokenizerFiles(files.folder, "tokenizer.json", model.to_str(pretty=True).encode(), beside))
