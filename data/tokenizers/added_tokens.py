"""Tokens added to a tokenizer: special ones, which no text gives, and such as are made of their text."""

import json
from collections.abc import Sequence
from pathlib import Path

from ... import InputError
from .hf_files import CONFIG
from .huggingface import from_files, model_of
from .sentencepiece import append, user_pieces
from .tokenizer import SPECIAL, Tokenizer, from_sentencepiece


def add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[Tokenizer, dict[str, int]]:
    """(`tokenizer` with tokens `names`, the id of each); those that it has stay as they are.

    A token that a chat is written with, which is a role's marker or one that the chat template names, is special: no
    text of a row gives it. Any other is made of its text wherever that stands: in rows, documents and prompts.
    """
    tokenizer = _extended(tokenizer, {name: name in SPECIAL or name in tokenizer.template for name in names})
    special, plain = tokenizer.special, text_tokens(tokenizer)
    for name in names:  # a byte-level decoder takes some letters that are not ASCII for bytes
        if name in plain and name not in tokenizer.decode([*tokenizer.encode("a"), plain[name]]):
            raise InputError(f"added token {name!r}: this tokenizer would not give its text back; take ASCII letters")
    return tokenizer, {name: (special | plain)[name] for name in names}


def add_special(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """`tokenizer` with special tokens `names` under new ids at the end; those that it has stay as they are.

    The table of embeddings needs as many more rows. InputError: a name that is blank or an ordinary piece.
    """
    return _extended(tokenizer, dict.fromkeys(names, True))


def _extended(tokenizer: Tokenizer, tokens: dict[str, bool]) -> Tokenizer:
    """`tokenizer` with {token: whether it is special}."""
    bad = next((name for name in tokens if not name.strip()), None)
    if bad is not None:
        raise InputError(f"added token {bad!r}: a text that is not blank is wanted")
    known = tokenizer.special | text_tokens(tokenizer)
    new = {name: special for name, special in tokens.items() if name not in known}
    if not new:
        return tokenizer
    path = Path(tokenizer.template_file).parent  # for messages
    if tokenizer.encode_marked is None:
        return from_sentencepiece(path / tokenizer.file, append(tokenizer.data, new))
    data, ids = _append(tokenizer, new)
    return from_files(path, tokenizer.file, data, _listed(tokenizer, ids, new))


def text_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """{text: id} of the tokens beside the vocabulary proper that are no special ones: their text gives them."""
    if tokenizer.encode_marked is None:
        return user_pieces(tokenizer.data)
    return {
        token.content: i for i, token in model_of(tokenizer)[0].get_added_tokens_decoder().items() if not token.special
    }


def _append(tokenizer: Tokenizer, new: dict[str, bool]) -> tuple[bytes, dict[str, int]]:
    """(the main file, the ids of the tokens `new`). Only tokenizer.json itself takes them; others have a list."""
    from tokenizers import AddedToken

    model, _ = model_of(tokenizer)
    old = next((name for name in new if model.token_to_id(name) is not None), None)
    if old is not None:
        raise InputError(f"added token {old!r}: already an ordinary piece of this vocabulary; take another name")
    for name, special in new.items():
        token = AddedToken(name, special=special, normalized=False)
        (model.add_special_tokens if special else model.add_tokens)([token])
    ids = {name: model.token_to_id(name) for name in new}
    return (model.to_str(pretty=True).encode() if tokenizer.file == "tokenizer.json" else tokenizer.data), ids


def _listed(tokenizer: Tokenizer, ids: dict[str, int], special: dict[str, bool]) -> dict[str, bytes]:
    """The files beside the main one with `ids`, where they list tokens or have to."""
    _, folder = model_of(tokenizer)
    if "added_tokens_decoder" not in folder.config and tokenizer.file == "tokenizer.json":
        return tokenizer.files
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    new = {i: {"content": name, **flags, "special": special[name]} for name, i in ids.items()}
    listed = {str(i): token for i, token in (folder.added | new).items()}
    # With such a list transformers reads no special_tokens_map.json: the names have to be here too.
    config = folder.names | folder.config | {"added_tokens_decoder": listed}
    return tokenizer.files | {CONFIG: json.dumps(config, indent=2).encode()}
