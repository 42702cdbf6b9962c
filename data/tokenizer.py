"""Text <-> ids. SentencePiece BPE trained here, or a Hugging Face `tokenizer.json`; both give the same Tokenizer."""

import hashlib
import heapq
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import InputError

ROLES = ("system", "user", "assistant")
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES))
SAMPLE_BYTES = 8 << 20  # what BPE learns from: more costs time and moves few pieces
_BLOCK = "\u2581"  # SentencePiece writes a space as this character


@dataclass(frozen=True)
class Tokenizer:
    """`encode` gives no special token, whatever the text says; `decode(encode(x)) == x` if trained here."""

    file: str  # tokenizer.model or tokenizer.json
    data: bytes = field(repr=False)
    vocab_size: int
    bos: int
    eos: int
    pad: int
    special: dict[str, int]
    encode_batch: Callable[[Sequence[str]], list[list[int]]] = field(repr=False, compare=False)
    _decode: Callable[[list[int]], str] = field(repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens give nothing. InputError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise InputError(f"token id {bad}: outside the vocabulary of {self.vocab_size}; wrong tokenizer?")
        return self._decode(ids)

    @property
    def end(self) -> int:
        """The id that ends a turn: eos, which a base has learnt to predict where a text ends.

        A token of its own would be one that pretraining never saw: its row of the table is like those of all unused
        pieces, and a method that leaves the table frozen (LoRA, a mask, a prompt) could not tell it from them.
        """
        return self.eos

    @property
    def digest(self) -> str:
        """sha256 of the tokenizer's file."""
        return hashlib.sha256(self.data).hexdigest()

    def save(self, folder: Path | str) -> Path:
        """Write the file (and the names of bos, eos, pad for a tokenizer.json) into `folder`; returns its path."""
        path = Path(folder) / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        if self.file == "tokenizer.json":
            names = {i: name for name, i in self.special.items()}
            config = {f"{k}_token": names[getattr(self, k)] for k in ("bos", "eos", "pad")}
            (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
        return path


def train_tokenizer(
    texts: Iterable[str], path: Path | str, vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train BPE on a bounded sample of `texts`, write it to `path`. The same texts, in any order, give the same file.

    InputError when the text is too small for `vocab_size`, or `vocab_size` too small for the text.
    """
    import sentencepiece

    sample = _sample(texts, sample_bytes)
    if not sample:
        raise InputError("tokenizer: no text to train on; at least one document that is not blank is wanted")
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
            max_sentence_length=1 << 20,  # longer ones are left out without a word
            num_threads=2,  # written into the file, so a constant
            minloglevel=2,
        )
    except RuntimeError as e:
        raise InputError(_reason(str(e), vocab_size, sum(len(s.encode()) for s in sample))) from None
    path = Path(path)
    path = path if path.suffix == ".model" else path / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def _reason(message: str, vocab_size: int, n_bytes: int) -> str:
    if "too high" in message:
        most = message.rpartition("<= ")[2].rstrip(". ")
        few = f"tokenizer: {n_bytes} bytes of text are too few for {vocab_size} pieces"
        return f"{few}; give more text, or ask for at most {most}"
    if "smaller than required_chars" in message:
        return f"tokenizer: {vocab_size} pieces cannot hold the 256 bytes and the characters of the text; ask for more"
    return f"tokenizer: SentencePiece refused {vocab_size} pieces ({message.strip().splitlines()[-1]})"


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    """At most `limit` bytes of pieces of `texts`: those of smallest crc32, so neither order nor chance decides."""
    from .clean import cut

    heap: list[tuple[int, str]] = []
    size, lost = 0, (-(1 << 32), "")  # the best key thrown out: nothing worse may take its room later
    for text in texts:
        for piece in cut(text, 4096):
            key = (-zlib.crc32(piece.encode()), piece)
            if key < lost:
                continue
            heapq.heappush(heap, key)
            size += len(piece.encode())
            while size > limit and len(heap) > 1:
                lost = heapq.heappop(heap)
                size -= len(lost[1].encode())
    return [piece for _, piece in sorted(heap, reverse=True)]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """From `tokenizer.model`, `tokenizer.json`, or a folder that holds one. InputError when it cannot be read."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: no tokenizer.model and no tokenizer.json in it; graftax tokenizer trains one")
        # A Hugging Face folder may hold both (Llama 2): the .json says how special tokens are meant.
        path = found[-1]
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(
            f"{path}: cannot be read ({e.strerror}); a tokenizer.model or tokenizer.json is wanted"
        ) from None
    return _hugging_face(path, data) if path.suffix == ".json" else _sentencepiece(path, data)


def _sentencepiece(path: Path, data: bytes) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = model.get_piece_size()
    except RuntimeError:
        raise InputError(f"{path}: not a SentencePiece model; a tokenizer.model or tokenizer.json is wanted") from None
    special = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        ids = model.encode(list(texts), out_type=int)
        for n, text in enumerate(texts):
            if _BLOCK in text and model.unk_id() not in block:  # a literal one would come back as a space
                parts = model.encode(text.split(_BLOCK), out_type=int)
                ids[n] = parts[0] + [i for part in parts[1:] for i in (*block, *part)]
        return ids

    eos = _wanted(model.eos_id(), "eos", path)
    bos = model.bos_id() if model.bos_id() >= 0 else eos
    pad = model.pad_id() if model.pad_id() >= 0 else eos
    return Tokenizer("tokenizer.model", data, size, bos, eos, pad, special, encode_batch, model.decode)


def _wanted(i: int | None, name: str, path: Path) -> int:
    if i is None or i < 0:
        raise InputError(
            f"{path}: names no {name} token; one is wanted (in tokenizer_config.json for a tokenizer.json)"
        )
    return i


def _hugging_face(path: Path, data: bytes) -> Tokenizer:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as e:  # the Rust side raises bare Exception
        reason = str(e).splitlines()[0]
        raise InputError(f"{path}: not a Hugging Face tokenizer.json ({reason})") from None
    model.encode_special_tokens = True  # "</s>" in a text is text
    model.no_truncation()
    model.no_padding()
    special = {t.content: i for i, t in model.get_added_tokens_decoder().items() if t.special}
    named = _hf_names(path.parent)
    ids = {k: model.token_to_id(named[k]) if k in named else None for k in ("bos", "eos", "pad")}
    # No bos (Qwen) or no pad is common: eos then separates documents, and a padded position never counts.
    eos = _wanted(ids["eos"], "eos", path)
    bos, pad = (eos if (i := ids[k]) is None else i for k in ("bos", "pad"))
    special |= {named[k]: i for k, i in ids.items() if i is not None}

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in model.encode_batch_fast(list(texts), add_special_tokens=False)]

    size = model.get_vocab_size(with_added_tokens=True)
    size = max(size, 1 + max(special.values()))
    return Tokenizer("tokenizer.json", data, size, bos, eos, pad, special, encode_batch, model.decode)


def _hf_names(folder: Path) -> dict[str, str]:
    """{"eos": "</s>", ...} from tokenizer_config.json or special_tokens_map.json; a token is a string or a dict."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text("utf-8"))
        except ValueError as e:
            raise InputError(f"{file}: not valid JSON ({e})") from None
        for k in ("bos", "eos", "pad"):
            token = config.get(f"{k}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names[k] = token
    return names
