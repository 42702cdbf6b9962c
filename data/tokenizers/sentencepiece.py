"""SentencePiece models: BPE trained by graftax, loaded and extended."""

import heapq
import io
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ... import InputError
from ..clean import cut
from .tokenizer import BOS, EOS, PAD, SPECIAL, Tokenizer, require_id

SAMPLE_BYTES = 8 << 20  # BPE learns from this much text: more costs time and changes few pieces
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # SentencePiece's types of pieces


def train_tokenizer(
    texts: Iterable[str], path: Path | str, vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train BPE on a bounded sample of `texts` and write it to `path`. The order of the texts does not matter.

    Raises InputError if the text is too small for `vocab_size`, or `vocab_size` too small for the text.
    """
    import sentencepiece

    sample = _sample(texts, sample_bytes)
    if not sample:
        raise InputError("tokenizer: no text to train on; provide at least one document that is not blank")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",  # the default destroys newlines, tabs and runs of spaces
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=list(SPECIAL[3:]),
            max_sentence_length=1 << 20,  # longer ones are silently left out
            num_threads=2,  # written into the file, so a constant
            minloglevel=2,
        )
    except RuntimeError as e:
        raise InputError(_training_error(str(e), vocab_size, sum(len(s.encode()) for s in sample))) from None
    path = Path(path)
    path = path if path.suffix == ".model" else path / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return from_sentencepiece(path, model.getvalue())


def _training_error(message: str, vocab_size: int, n_bytes: int) -> str:
    if "too high" in message:
        most = message.rpartition("<= ")[2].rstrip(". ")
        few = f"tokenizer: {n_bytes} bytes of text are too few for {vocab_size} pieces"
        return f"{few}; give more text, or ask for at most {most}"
    if "smaller than required_chars" in message:
        return f"tokenizer: {vocab_size} pieces cannot hold the 256 bytes and the characters of the text; ask for more"
    return f"tokenizer: SentencePiece refused {vocab_size} pieces ({message.strip().splitlines()[-1]})"


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    """Return at most `limit` bytes of pieces of `texts`: those of smallest crc32, whatever their order."""
    heap: list[tuple[int, str]] = []
    size, dropped = 0, (-(1 << 32), "")  # the best key dropped: a worse one may not take its room later
    for text in texts:
        for piece in cut(text, 4096):
            key = (-zlib.crc32(piece.encode()), piece)
            if key < dropped:
                continue
            heapq.heappush(heap, key)
            size += len(piece.encode())
            while size > limit and len(heap) > 1:
                dropped = heapq.heappop(heap)
                size -= len(dropped[1].encode())
    return [piece for _, piece in sorted(heap, reverse=True)]


def from_sentencepiece(path: Path, data: bytes) -> Tokenizer:
    """Return the tokenizer of a SentencePiece model; `path` is for messages."""
    import sentencepiece

    try:
        if not data:  # SentencePiece takes an empty one for a model to be loaded later
            raise RuntimeError
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = model.get_piece_size()
    except RuntimeError:
        raise InputError(
            f"{path}: not a whole SentencePiece model; expected a tokenizer.model or tokenizer.json"
        ) from None
    special = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    space_bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        ids = model.encode(list(texts), out_type=int)
        for n, text in enumerate(texts):
            if _SPACE in text and model.unk_id() not in space_bytes:  # a literal one would come back as a space
                parts = model.encode(text.split(_SPACE), out_type=int)
                ids[n] = parts[0] + [i for part in parts[1:] for i in (*space_bytes, *part)]
        return ids

    eos = require_id(model.eos_id(), "eos", path)
    bos = model.bos_id() if model.bos_id() >= 0 else eos
    pad = model.pad_id() if model.pad_id() >= 0 else eos
    return Tokenizer("tokenizer.model", data, size, bos, eos, pad, special, encode_batch, model.decode)


def read_proto(data: bytes, path: Path = Path("tokenizer.model")) -> Any:
    """Return the ModelProto of a tokenizer.model; `path` is for messages."""
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
    """Return whether the model is BPE, and not a unigram model."""
    spec = read_proto(data, path).trainer_spec
    return spec.model_type == spec.BPE


def token_names(data: bytes) -> dict[str, str]:
    """Return {"eos_token": "</s>", ...}: the special tokens that the model itself names."""
    proto = read_proto(data)
    ids = {kind: getattr(proto.trainer_spec, f"{kind}_id") for kind in ("bos", "eos", "pad", "unk")}
    return {f"{kind}_token": proto.pieces[i].piece for kind, i in ids.items() if 0 <= i < len(proto.pieces)}


def listed_pieces(data: bytes) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Return (the model, {id: token}): its control and user-defined pieces as added tokens for transformers.

    transformers would match user-defined pieces by a rule that lets a text give any other piece by its name.
    """
    proto = read_proto(data)
    tokens: dict[str, dict[str, Any]] = {}
    for i, piece in enumerate(proto.pieces):
        if piece.type in (_CONTROL, _USER_DEFINED):
            special = piece.type == _CONTROL
            content = piece.piece if special else piece.piece.replace(_SPACE, " ")
            tokens[str(i)] = {"content": content, "special": special, "normalized": False}
            piece.type = piece.type if special else _UNUSED
    return proto.SerializeToString(), tokens


def user_pieces(data: bytes) -> dict[str, int]:
    """Return {text: id} of the user-defined pieces, which their text always gives."""
    pieces = enumerate(read_proto(data).pieces)
    return {piece.piece.replace(_SPACE, " "): i for i, piece in pieces if piece.type == _USER_DEFINED}


def append_pieces(data: bytes, new: dict[str, bool]) -> bytes:
    """Return the model with pieces {text: special} at its end: no text gives a special one, its text any other."""
    proto = read_proto(data)
    known = {piece.piece for piece in proto.pieces}
    for name, special in new.items():
        piece = name if special else name.replace(" ", _SPACE)
        if piece in known:
            raise InputError(f"added token {name!r}: already an ordinary piece of this vocabulary; take another name")
        proto.pieces.add(piece=piece, score=0.0, type=_CONTROL if special else _USER_DEFINED)
    return proto.SerializeToString()
