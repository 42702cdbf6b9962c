"""Hugging Face tokenizers, loaded by transformers: tokenizer.json, vocab.json with merges.txt, or tokenizer.model.

Ids, offsets and special tokens are those of transformers. Beyond that, text never becomes a special token here, and
files that contradict each other are an error.
"""

import inspect
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import InputError
from .chat import turn_end
from .hf_files import (
    ADDED_TOKENS, SPECIAL_MAP, find_template, generation_eos_ids, listed_tokens, parse_object, token_text,
)  # fmt: skip
from .sentencepiece import listed_pieces, read_proto, token_names
from .template import default_template
from .tokenizer import CONFIG, Tokenizer, require_id


class Backend(NamedTuple):
    """What transformers loaded."""

    model: Any  # a tokenizers.Tokenizer that recognises special tokens in text
    names: dict[str, str]  # {"eos_token": "</s>", ...}


def from_files(folder: Path, main: str, data: bytes, files: dict[str, bytes]) -> Tokenizer:
    """Return the tokenizer whose main file is `main` with content `data`; `files` are those beside it.

    `folder` is for messages. Raises InputError for a broken file, a tokenizer without eos, files that do not belong
    together, and a vocabulary in which plain text gives a special token.
    """
    template, template_file = find_template(folder, files)
    end_ids = generation_eos_ids(folder, files)
    marked, names = load_backend(folder, main, data, files)
    special = {token.content: i for i, token in marked.get_added_tokens_decoder().items() if token.special}
    # No bos (Qwen) or no pad is common: eos then separates documents, and a padded position never counts.
    eos = require_id(special.get(names.get("eos_token", "")), "eos", folder / main)
    bos, pad = (special.get(names.get(f"{kind}_token", ""), eos) for kind in ("bos", "pad"))
    plain = _plain_text_model(marked, special, names.get("unk_token", "<unk>"), folder / main)

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(texts: Sequence[str], add_special_tokens: bool) -> list[Any]:
        return marked.encode_batch(list(texts), add_special_tokens=add_special_tokens)

    ids = set(marked.get_vocab(with_added_tokens=True).values())
    return Tokenizer(
        file=main,
        data=data,
        vocab_size=1 + max(ids),  # not the number of tokens: ids may have gaps
        bos=bos,
        eos=eos,
        pad=pad,
        special=special,
        encode_batch=encode_batch,
        _decode=plain.decode,
        gaps=tuple(sorted(set(range(max(ids))) - ids)),
        template=template or default_template(special),
        template_file=template_file,
        names=names,
        ends=tuple(dict.fromkeys((eos, *end_ids))),
        files=files,
        encode_marked=encode_marked,
        turn_end=turn_end,
    )


def load_backend(folder: Path, main: str, data: bytes, files: dict[str, bytes]) -> Backend:
    """Have transformers load a tokenizer, with the tokens that the files define and no others."""
    listed = listed_tokens(folder, files)
    known = _vocabulary(folder, main, data, files) | {token_text(token) for token in listed.values()}
    try:
        config, data = _config(folder, main, data, files)
        config = {key: _known_only(key, value, known) for key, value in config.items()}
        beside = {name: files[name] for name in (ADDED_TOKENS, "merges.txt") if name in files}
        loaded = _from_pretrained({CONFIG: json.dumps(config).encode(), main: data, **beside})
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # Rust raises bare Exception and panics; Python raises whatever a strange file causes
        raise InputError(f"{folder / main}: transformers cannot load this tokenizer ({_reason(e)})") from None
    model = loaded.backend_tokenizer
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = False
    for i, content in ((i, token_text(token)) for i, token in listed.items()):
        if (actual := model.token_to_id(content)) != i:
            raise InputError(
                f"{folder}: added token {content!r} is listed as id {i}, but has id {actual}; these files do not "
                "belong together"
            )
    return Backend(model, loaded.special_tokens_map)


def _known_only(key: str, value: Any, known: set[str]) -> Any:
    """Return a value of tokenizer_config.json without tokens that no file defines.

    transformers would append them to the vocabulary, where no row of a table was trained for them.
    """
    if key.endswith("special_tokens"):  # additional_ or extra_; transformers fails at anything but a list or an object
        if isinstance(value, dict):
            return {name: token for name, token in value.items() if token_text(token) in known}
        return [token for token in value if token_text(token) in known] if isinstance(value, list) else None
    return None if key.endswith("_token") and token_text(value) not in known and type(value) is not bool else value


def _vocabulary(folder: Path, main: str, data: bytes, files: dict[str, bytes]) -> set[str]:
    """Return the tokens in the main file. Raises InputError if it is broken."""
    if main == "tokenizer.model":
        return {piece.piece for piece in read_proto(data, folder / main).pieces}
    if main == "vocab.json":
        if "merges.txt" not in files:
            raise InputError(f"{folder}: vocab.json without merges.txt; provide both, or a tokenizer.json")
        return set(parse_object(folder, {main: data}, main))
    import tokenizers

    try:
        return set(tokenizers.Tokenizer.from_str(data.decode("utf-8")).get_vocab(with_added_tokens=True))
    except Exception as e:  # Rust raises bare Exception
        raise InputError(f"{folder / main}: not a Hugging Face tokenizer.json ({_reason(e)})") from None


def _config(folder: Path, main: str, data: bytes, files: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
    """Return (tokenizer_config.json, the main file) as transformers shall read them.

    A tokenizer.json is read as it is: some classes of transformers would rebuild it with rules of their own.
    """
    config = parse_object(folder, files, CONFIG)
    if config.get("added_tokens_decoder") is None:  # only then transformers reads the map, and prefers it
        config |= parse_object(folder, files, SPECIAL_MAP)
        config.pop("added_tokens_decoder", None)
    config.pop("chat_template", None)
    for name, token in config.items():
        if name.endswith("_token") and isinstance(token, dict):
            config[name] = {"__type": "AddedToken", "special": True, **token}
    kind = config.get("tokenizer_class")
    config = _default_names(kind) | config
    if main == "tokenizer.json":
        return config | {"tokenizer_class": "PreTrainedTokenizerFast"}, data
    if main == "vocab.json":
        unnamed = dict.fromkeys(("bos_token", "eos_token", "unk_token"))
        return config if kind else unnamed | config | {"tokenizer_class": "GPT2Tokenizer"}, data
    config = token_names(data) | config
    if config.get("add_bos_token") is None:
        config["add_bos_token"] = True
    if not kind:  # a model that follows SentencePiece's own rules
        data, pieces = listed_pieces(data)
        listed = {str(i): token for i, token in listed_tokens(folder, files).items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": pieces | listed}
    return config, data


def _default_names(kind: Any) -> dict[str, str]:
    """Return {"eos_token": "</s>", ...}: the special tokens of a tokenizer class where no file names them."""
    transformers = _transformers()
    cls = getattr(transformers, kind.removesuffix("Fast"), None) if isinstance(kind, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedTokenizerFast):
        return {}
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name.endswith("_token")}
    return {name: str(token) for name, token in defaults.items() if isinstance(token, str)}


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    import transformers

    return transformers


def _from_pretrained(files: dict[str, bytes]) -> Any:
    """Return what AutoTokenizer loads from `files`. No code of a repository runs, and nothing is downloaded."""
    transformers = _transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    finally:
        transformers.logging.set_verbosity(verbosity)


def _reason(e: BaseException) -> str:
    return next(iter(str(e).splitlines()), type(e).__name__)


def _plain_text_model(marked: Any, special: dict[str, int], unknown: str, path: Path) -> Any:
    """Return a copy of the model that takes special tokens in a text for plain text.

    Any text may give the token `unknown`. Raises InputError if the text of another special token still gives it.
    """
    import tokenizers

    try:
        pieces = {token: {piece.value for piece in marked.model.tokenize(token)} for token in special}
        state = marked.to_str()
        plain = tokenizers.Tokenizer.from_str(
            _without_special(state, set(special)) if any(token in pieces[token] for token in special) else state
        )
        plain.encode_special_tokens = True
        plain.encode("\U000f0000 \x00", add_special_tokens=False)  # a model without <unk> may fail at such a text alone
        for form in ("{}", "a{}a", " {} "):
            for token, i in special.items():
                if token != unknown and i in plain.encode(form.format(token), add_special_tokens=False).ids:
                    raise InputError(f"{path}: the plain text {token!r} gives its special token; this cannot be helped")
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # Rust raises bare Exception and panics
        raise InputError(f"{path}: not a tokenizer that works ({_reason(e)}); fetch it again") from None
    return plain


def _without_special(state: str, special: set[str]) -> str:
    """Return the serialised model without the rules that make a special token of its characters."""
    tree = json.loads(state)
    model = tree["model"]
    if model.get("type") == "BPE":
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in special]
    elif model.get("type") == "Unigram":
        never = [i != model.get("unk_id") and piece in special for i, (piece, _) in enumerate(model["vocab"])]
        model["vocab"] = [[p, -1e9 if drop else score] for (p, score), drop in zip(model["vocab"], never, strict=True)]
    return json.dumps(tree)


def for_transformers(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer whose files transformers reads: one trained by graftax becomes a tokenizer.json.

    There a literal U+2581 becomes a space. Raises InputError if other ids would differ.
    """
    if tokenizer.encode_marked is not None:
        return tokenizer
    unmarked = {CONFIG: json.dumps({"add_bos_token": False}).encode()}
    model, _ = load_backend(Path(), tokenizer.file, tokenizer.data, unmarked)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **token_names(tokenizer.data)}
    files = {CONFIG: json.dumps(config, indent=2).encode()}
    converted = from_files(Path(), "tokenizer.json", model.to_str(pretty=True).encode(), files)
    for text in ("a  b\n\tc 1234 \u00e9\u4e2d\U0001f600\x00 ", " x<|eos|>", "def f(x):\r\n    return x\n"):
        if converted.encode(text) != tokenizer.encode(text):
            raise InputError(f"{tokenizer.file}: its tokenizer.json would give other ids for {text!r}")
    return converted
