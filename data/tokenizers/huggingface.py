"""Hugging Face tokenizers, loaded by transformers: tokenizer.json, vocab.json with merges.txt, or tokenizer.model.

Ids, offsets and special tokens are those of transformers. Beyond that, text never becomes a special token here, and
files that contradict each other are an error.
"""

import contextlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ... import InputError
from .chat import turn_end
from .hf_files import ADDED_TOKENS, MERGES, SPECIAL_MAP, TokenizerFiles, token_text
from .sentencepiece import listed_pieces, read_proto, token_names
from .template import default_template
from .tokenizer import CONFIG, Tokenizer, require_id


def from_files(files: TokenizerFiles) -> Tokenizer:
    """Return the tokenizer of `files`.

    Raises InputError for a broken file, a tokenizer without eos, files that do not belong together, and a vocabulary in
    which plain text gives a special token.
    """
    template, template_file = files.template()
    end_ids = files.eos_ids()
    marked, names = load_backend(files)
    special = {token.content: i for i, token in marked.get_added_tokens_decoder().items() if token.special}
    # No bos (Qwen) or no pad is common: eos then separates documents, and a padded position never counts.
    eos = require_id(special.get(names.get("eos_token", "")), "eos", files.path)
    bos, pad = (special.get(names.get(f"{kind}_token", ""), eos) for kind in ("bos", "pad"))
    with _as_input_error(files.path):
        unknown = names.get("unk_token", "<unk>")  # any text may give this one
        plain = _plain_text_model(marked, {t: i for t, i in special.items() if t != unknown}, files.path)

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(texts: Sequence[str], add_special_tokens: bool) -> list[Any]:
        return marked.encode_batch(list(texts), add_special_tokens=add_special_tokens)

    ids = set(marked.get_vocab(with_added_tokens=True).values())
    return Tokenizer(
        file=files.main,
        data=files.data,
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
        files=files.beside,
        encode_marked=encode_marked,
        turn_end=turn_end,
    )


def load_backend(files: TokenizerFiles) -> tuple[Any, dict[str, str]]:
    """Have transformers load a tokenizer, with the tokens that its files define and no others.

    Returns (a tokenizers.Tokenizer that recognises special tokens in text, {"eos_token": "</s>", ...}).
    """
    listed = files.listed_tokens()
    known = _vocabulary(files) | {token_text(token) for token in listed.values()}
    with _as_input_error(files.path):
        config, data = _config(files)
        config = {key: _known_only(key, value, known) for key, value in config.items()}
        beside = {name: files.beside[name] for name in (ADDED_TOKENS, MERGES) if name in files.beside}
        loaded = _from_pretrained({CONFIG: json.dumps(config).encode(), files.main: data, **beside})
    model = loaded.backend_tokenizer
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = False
    for i, content in ((i, token_text(token)) for i, token in listed.items()):
        if (actual := model.token_to_id(content)) != i:
            raise InputError(
                f"{files.folder}: added token {content!r} is listed as id {i}, but has id {actual}; these files do not "
                "belong together"
            )
    return model, loaded.special_tokens_map


def _vocabulary(files: TokenizerFiles) -> set[str]:
    """Return the tokens in the main file. Raises InputError if it is broken."""
    if files.main == "tokenizer.model":
        return {piece.piece for piece in read_proto(files.data, files.path).pieces}
    if files.main == "vocab.json":
        if MERGES not in files.beside:
            raise InputError(f"{files.folder}: vocab.json without {MERGES}; provide both, or a tokenizer.json")
        return set(files.json("vocab.json"))
    tree = files.json("tokenizer.json")
    with _as_input_error(files.path):
        vocab = tree["model"]["vocab"]
        pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
        return {*pieces, *(token["content"] for token in tree.get("added_tokens") or ())}


def _config(files: TokenizerFiles) -> tuple[dict[str, Any], bytes]:
    """Return (tokenizer_config.json, the main file) as transformers shall read them.

    A tokenizer.json is read as it is: some classes of transformers would rebuild it with rules of their own.
    """
    config = files.json(CONFIG)
    if config.get("added_tokens_decoder") is None:  # only then transformers reads the map, and prefers it
        config |= files.json(SPECIAL_MAP)
        config.pop("added_tokens_decoder", None)
    config.pop("chat_template", None)
    for name, token in config.items():
        if name.endswith("_token") and isinstance(token, dict):
            config[name] = {"__type": "AddedToken", "special": True, **token}
    kind = config.get("tokenizer_class")
    config = _default_names(kind) | config
    if files.main == "tokenizer.json":
        return config | {"tokenizer_class": "PreTrainedTokenizerFast"}, files.data
    if files.main == "vocab.json":
        unnamed = dict.fromkeys(("bos_token", "eos_token", "unk_token"))
        return config if kind else unnamed | config | {"tokenizer_class": "GPT2Tokenizer"}, files.data
    config = token_names(files.data) | config
    if config.get("add_bos_token") is None:
        config["add_bos_token"] = True
    if kind:
        return config, files.data
    data, pieces = listed_pieces(files.data)  # transformers follows the rules in the model
    listed = {str(i): token for i, token in files.listed_tokens().items()}
    return config | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": pieces | listed}, data


def _known_only(key: str, value: Any, known: set[str]) -> Any:
    """Return a value of tokenizer_config.json without tokens that no file defines.

    transformers would append them to the vocabulary, where no row of a table was trained for them.
    """
    if key.endswith("special_tokens"):  # additional_ or extra_; transformers fails at anything but a list or an object
        if isinstance(value, dict):
            return {name: token for name, token in value.items() if token_text(token) in known}
        return [token for token in value if token_text(token) in known] if isinstance(value, list) else None
    return None if key.endswith("_token") and token_text(value) not in known and type(value) is not bool else value


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


@contextlib.contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    """Raise InputError for any other error."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # Rust raises bare Exception and panics; Python raises whatever a strange file causes
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise InputError(f"{path}: not a tokenizer that transformers can load ({reason}); fetch it again") from None


def _plain_text_model(marked: Any, special: dict[str, int], path: Path) -> Any:
    """Return a copy of the model that takes special tokens in a text for plain text.

    Raises InputError if the text of a token in `special` still gives that token.
    """
    import tokenizers

    state = marked.to_str()
    for repair in (False, True):
        plain = tokenizers.Tokenizer.from_str(_without_special(state, set(special)) if repair else state)
        plain.encode_special_tokens = True
        plain.encode("\U000f0000 \x00", add_special_tokens=False)  # a model without <unk> may fail at such a text alone
        texts = [(i, token, form.format(token)) for form in ("{}", "a{}a", " {} ") for token, i in special.items()]
        encodings = plain.encode_batch([text for *_, text in texts], add_special_tokens=False)
        leaks = [token for (i, token, _), encoding in zip(texts, encodings, strict=True) if i in encoding.ids]
        if not leaks:
            return plain
    raise InputError(f"{path}: the plain text {leaks[0]!r} gives its special token, which nothing here prevents")


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
    model, _ = load_backend(TokenizerFiles(Path(), tokenizer.file, tokenizer.data, unmarked))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **token_names(tokenizer.data)}
    beside = {CONFIG: json.dumps(config, indent=2).encode()}
    converted = from_files(TokenizerFiles(Path(), "tokenizer.json", model.to_str(pretty=True).encode(), beside))
    for text in ("a  b\n\tc 1234 \u00e9\u4e2d\U0001f600\x00 ", " x<|eos|>", "def f(x):\r\n    return x\n"):
        if converted.encode(text) != tokenizer.encode(text):
            raise InputError(f"{tokenizer.file}: its tokenizer.json would give other ids for {text!r}")
    return converted
