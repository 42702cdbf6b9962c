"""A SentencePiece BPE model of Llama's kind as a `tokenizers.Tokenizer`, as transformers makes it."""

import json
from pathlib import Path
from typing import Any

from ... import InputError
from .hf_files import CONFIG, Folder, read_folder
from .tokenizer import Tokenizer

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # SentencePiece's types of pieces
_BLOCK = "\u2581"  # SentencePiece writes a space as this character


def read_proto(data: bytes, path: Path = Path("tokenizer.model")) -> Any:
    """The ModelProto of a tokenizer.model; `path` is for messages."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    package: Any = sentencepiece_model_pb2  # generated: type checkers see no names in it
    try:
        proto = package.ModelProto.FromString(data)
    except DecodeError:
        proto = None
    if not proto or not proto.pieces:
        raise InputError(f"{path}: not a SentencePiece model")
    return proto


def is_bpe(data: bytes, path: Path) -> bool:
    """Whether `convert` can."""
    spec = read_proto(data, path).trainer_spec
    return spec.model_type == spec.BPE


def names(data: bytes, path: Path) -> dict[str, str]:
    """{"eos_token": "</s>", ...}: what the model itself calls its tokens."""
    proto = read_proto(data, path)
    ids = {k: getattr(proto.trainer_spec, f"{k}_id") for k in ("bos", "eos", "pad", "unk")}
    return {f"{k}_token": proto.pieces[i].piece for k, i in ids.items() if 0 <= i < len(proto.pieces)}


def convert(folder: Folder, data: bytes) -> Any:
    """The same pieces and merges. The dummy prefix is HF's: with "legacy": false at the beginning of a text only."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    proto = read_proto(data)
    if not is_bpe(data, folder.path):
        raise InputError(
            f"{folder.path / 'tokenizer.model'}: a unigram model's chat template needs a tokenizer.json; "
            "transformers writes one with save_pretrained"
        )
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    control = {piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)}
    unknown = next((piece.piece for piece in proto.pieces if piece.type == _UNKNOWN), None)
    merges = _merges(vocab, control)
    model = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = folder.config.get("add_prefix_space")
    prefix = proto.normalizer_spec.add_dummy_prefix if prefix is None else bool(prefix)
    _spaces(model, proto.normalizer_spec, prefix, legacy=bool(folder.config.get("legacy")))
    steps = [decoders.Replace(_BLOCK, " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    for piece in proto.pieces:
        if piece.piece in control:
            model.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == _USER:
            model.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    return model


def _merges(vocab: dict[str, int], control: set[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first: SentencePiece orders them by the id of what they make."""
    pairs = []
    for piece, i in vocab.items():
        cuts = ((piece[:n], piece[n:]) for n in range(1, len(piece))) if piece not in control else ()
        local = sorted((vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab)
        pairs += [(i, len(a), len(b), a, b) for _, _, a, b in local]
    pairs.sort(key=lambda pair: pair[:3])
    return [(a, b) for *_, a, b in pairs]


def _spaces(model: Any, spec: Any, prefix: bool, legacy: bool) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        model.normalizer = normalizers.Sequence(steps)
    # "first" looks for the place 0 of a text, which is gone where white space before it is.
    scheme = "never" if not prefix else "always" if legacy or spec.remove_extra_whitespaces else "first"
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLOCK, prepend_scheme=scheme, split=False)


def user_pieces(data: bytes) -> dict[str, int]:
    """{text: id} of the pieces that are made of their text whatever stands around it."""
    found = {piece.piece: i for i, piece in enumerate(read_proto(data).pieces) if piece.type == _USER}
    return {piece.replace(_BLOCK, " "): i for piece, i in found.items()}


def append(data: bytes, new: dict[str, bool]) -> bytes:
    """The model with pieces {text: special} at its end: a special one never comes from text, any other always does."""
    proto = read_proto(data)
    known = {piece.piece for piece in proto.pieces}
    for name, special in new.items():
        piece = name if special else name.replace(" ", _BLOCK)
        if piece in known:
            raise InputError(f"added token {name!r}: already an ordinary piece of this vocabulary; take another name")
        proto.pieces.add(piece=piece, score=0.0, type=_CONTROL if special else _USER)
    return proto.SerializeToString()


def for_transformers(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer in files that transformers reads: one of graftax's own becomes a tokenizer.json; any other is that
    already. A literal U+2581 becomes a space. InputError if other ids would differ."""
    if tokenizer.encode_marked is not None:
        return tokenizer
    from .huggingface import from_files

    model = convert(read_folder(Path(), {}), tokenizer.data)
    said = names(tokenizer.data, Path(tokenizer.file))
    files = {CONFIG: json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **said}, indent=2).encode()}
    made = from_files(Path(), "tokenizer.json", model.to_str(pretty=True).encode(), files)
    for text in ("a  b\n\tc 1234 \u00e9\u4e2d\U0001f600\x00 ", " x<|eos|>", "def f(x):\r\n    return x\n"):
        if made.encode(text) != tokenizer.encode(text):
            raise InputError(f"{tokenizer.file}: its tokenizer.json would give other ids for {text!r}")
    return made
