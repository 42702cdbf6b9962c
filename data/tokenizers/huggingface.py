"""Hugging Face tokenizers: `tokenizer.json`; `vocab.json` and `merges.txt`; a SentencePiece model of Llama's kind.

All become a `tokenizers.Tokenizer`, as transformers does it, so that ids, offsets and special tokens are HF's.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ... import InputError
from .template import default_template
from .hf_files import Folder, parse, read_folder
from .tokenizer import Tokenizer, wanted

# Where one text is cut before its pieces are merged; Qwen2's, from its tokenizer.json.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


def from_files(path: Path, main: str, data: bytes, files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer whose file `main` holds `data`, with `files` beside it; `path` is for messages.

    InputError: a broken file, no eos, a recorded id that does not come out.
    """
    folder = _folder(path, main, data, files)
    build = functools.partial(_build, folder, main, data)
    plain, special, added = _plain(build, folder.names.get("unk_token", "<unk>"), path / main)
    # No bos (Qwen) or no pad is common: eos then separates documents, and a padded position never counts.
    eos = wanted(special.get(folder.names.get("eos_token", "")), "eos", path / main)
    bos, pad = (special.get(folder.names.get(f"{k}_token", ""), eos) for k in ("bos", "pad"))

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    ids = {*plain.get_vocab(with_added_tokens=True).values(), *added}
    return Tokenizer(
        file=main,
        data=data,
        # Not the number of tokens: ids may have gaps, and one that is too large would be a wrong row of the table.
        vocab_size=1 + max(ids),
        bos=bos,
        eos=eos,
        pad=pad,
        special=special,
        encode_batch=encode_batch,
        _decode=plain.decode,
        gaps=tuple(sorted(set(range(max(ids))) - ids)),
        template=folder.template or default_template(special),
        template_file=folder.template_file,
        names={k: token for k, token in folder.names.items() if plain.token_to_id(token) is not None},
        ends=tuple(dict.fromkeys((eos, *folder.ends))),
        files=files,
        encode_marked=_marked(build),
    )


def _plain(build: Callable[[], Any], unknown: str, path: Path) -> tuple[Any, dict[str, int], list[int]]:
    """(the model, to which "</s>" in a text is text; its special tokens; the ids of all added ones). Any text may give
    the token `unknown`.
    """
    try:
        model = build()
        model.encode_special_tokens = True
        added = model.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        _check_plain(model, {token: i for token, i in special.items() if token != unknown}, path)
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the Rust side raises bare Exception, and panics; Python what a strange file gives
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: not a tokenizer that works ({reason}); fetch it again") from None
    return model, special, list(added)


def _marked(build: Callable[[], Any]) -> Callable[[Sequence[str], bool], list[Any]]:
    """(texts, add special tokens) -> encodings, special tokens in the texts recognised. Built when first needed."""
    model = functools.cache(build)
    return lambda texts, add: model().encode_batch(list(texts), add_special_tokens=add)


def _folder(path: Path, main: str, data: bytes, files: dict[str, bytes]) -> Folder:
    folder = read_folder(path, files)
    if main != "tokenizer.model":
        return folder
    from .sentencepiece import names

    return dataclasses.replace(folder, names=names(data, path / main) | folder.names)


def _build(folder: Folder, main: str, data: bytes) -> Any:
    model = _base(folder, main, data)
    model.no_truncation()
    model.no_padding()
    _add(model, folder)
    if main != "tokenizer.json":
        _post_process(model, folder, bos=main == "tokenizer.model")
    return model


def _base(folder: Folder, main: str, data: bytes) -> Any:
    """What the main file says, before the others."""
    if main == "tokenizer.json":
        return _read(folder, data)
    if main == "vocab.json":
        return _byte_level(folder, data)
    from .sentencepiece import convert

    return convert(folder, data)


def _read(folder: Folder, data: bytes) -> Any:
    """A tokenizer.json, its added tokens with the flags that added_tokens_decoder gives them."""
    import tokenizers

    path = folder.path / "tokenizer.json"
    try:
        model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as e:  # the Rust side raises bare Exception
        reason = str(e).splitlines()[0]
        raise InputError(f"{path}: not a Hugging Face tokenizer.json ({reason})") from None
    listed = folder.added if "added_tokens_decoder" in folder.config else {}
    flags = {i: {k: v for k, v in token.items() if k in _FLAGS and isinstance(v, bool)} for i, token in listed.items()}
    tokens = model.get_added_tokens_decoder()
    if any(getattr(tokens[i], k) != v for i in flags.keys() & tokens.keys() for k, v in flags[i].items()):
        state = json.loads(data)
        state["added_tokens"] = [token | flags.get(token["id"], {}) for token in state["added_tokens"]]
        data = json.dumps(state).encode()
        model = tokenizers.Tokenizer.from_str(data.decode())
    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    if any(token in (found.value for found in model.model.tokenize(token)) for token in special):
        model = tokenizers.Tokenizer.from_str(_without_special(data, special))
    return model


def _without_special(data: bytes, special: set[str]) -> str:
    """The file with a model that does not make special tokens of their characters: HF cuts their texts out before."""
    state = json.loads(data)
    model = state["model"]
    if model.get("type") == "BPE":
        whole = [pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair) for pair in model["merges"]]
        model["merges"] = [pair for pair, piece in zip(model["merges"], whole, strict=True) if piece not in special]
    elif model.get("type") == "Unigram":
        kept = [i == model.get("unk_id") or piece not in special for i, (piece, _) in enumerate(model["vocab"])]
        model["vocab"] = [[p, score if keep else -1e9] for (p, score), keep in zip(model["vocab"], kept, strict=True)]
    return json.dumps(state)


def _check_plain(model: Any, special: dict[str, int], path: Path) -> None:
    """InputError if the text of a special token gives it all the same."""
    model.encode_batch(["\U000f0000 \x00"], add_special_tokens=False)  # one without <unk> may fail at such a text alone
    for form in ("{}", "a{}a", " {} "):
        found = model.encode_batch([form.format(token) for token in special], add_special_tokens=False)
        bad = next((token for (token, i), one in zip(special.items(), found, strict=True) if i in one.ids), None)
        if bad is not None:
            raise InputError(f"{path}: the plain text {bad!r} gives its special token, which nothing here prevents")


def _byte_level(folder: Folder, data: bytes) -> Any:
    """From `vocab.json` and `merges.txt`, as GPT-2 and Qwen2 cut texts; other classes need a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = folder.path / "vocab.json"
    if folder.kind not in ("", "GPT2Tokenizer", "Qwen2Tokenizer"):
        raise InputError(f"{path}: how a {folder.kind} cuts texts is not known here; give its tokenizer.json")
    if "merges.txt" not in folder.files:
        raise InputError(f"{folder.path}: vocab.json without merges.txt; give both, or a tokenizer.json")
    lines = folder.files["merges.txt"].decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    merges: Any = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        model = Tokenizer(models.BPE(vocab=parse(folder.path, {"vocab.json": data}, "vocab.json"), merges=merges))
    except Exception as e:  # the Rust side raises bare Exception
        raise InputError(f"{path}: no vocabulary for merges.txt ({str(e).splitlines()[0]})") from None
    prefix = bool(folder.config.get("add_prefix_space"))
    qwen = folder.kind == "Qwen2Tokenizer"
    cut = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not qwen)
    if qwen:
        model.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"), cut])
    model.pre_tokenizer, model.decoder = cut, decoders.ByteLevel()
    return model


def _add(model: Any, folder: Folder) -> None:
    """The tokens that files beside the model list, under the ids they list; then those that have a name."""
    from tokenizers import AddedToken

    known = {token.content for token in model.get_added_tokens_decoder().values()}
    for i, token in folder.added.items():
        content, special = token["content"], bool(token.get("special"))
        if content in known:
            continue
        flags = {k: bool(token.get(k)) for k in ("lstrip", "rstrip", "single_word")}
        flags["normalized"] = bool(token.get("normalized", not special))
        one = [AddedToken(content, special=special, **flags)]
        (model.add_special_tokens if special else model.add_tokens)(one)
        if model.token_to_id(content) != i:
            raise InputError(
                f"{folder.path}: added token {content!r} is listed as id {i}, but comes out as "
                f"{model.token_to_id(content)}; these files do not belong together"
            )
    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    named = [name for name in folder.names.values() if name not in special and model.token_to_id(name) is not None]
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in named])


def _post_process(model: Any, folder: Folder, bos: bool) -> None:
    """bos and eos around a text, as add_bos_token and add_eos_token say; Llama's kind has bos unless told otherwise."""
    from tokenizers import processors

    parts: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
    for name, default in (("bos", bos), ("eos", False)):
        token = folder.names.get(f"{name}_token", "")
        flag = folder.config.get(f"add_{name}_token")
        if (default if flag is None else flag) and model.token_to_id(token) is not None:
            parts[name] = [(token, model.token_to_id(token))]
    order = [*(token for token, _ in parts["bos"]), "$A", *(token for token, _ in parts["eos"])]
    special = parts["bos"] + parts["eos"]
    if special:
        model.post_processor = processors.TemplateProcessing(single=order, special_tokens=special)


def model_of(tokenizer: Tokenizer) -> tuple[Any, Folder]:
    """(the `tokenizers` model with the tokens that the files beside it list, the facts of those files)."""
    folder = _folder(Path(), tokenizer.file, tokenizer.data, tokenizer.files)
    model = _base(folder, tokenizer.file, tokenizer.data)
    _add(model, folder)
    return model, folder
