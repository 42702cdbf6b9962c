"""Rows of tuning data -> messages -> packed rows whose loss is on the assistant's words alone.

The template is the tokenizer's own (chat.py) where a Hugging Face tokenizer has one. Else: bos, then for each turn
`<|role|>` content eos; a vocabulary without role tokens gets `<|role|>` and a newline as plain text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np

from .. import InputError
from .columns import chat_of
from .dialogue import Chat, Message, as_chat
from .errors import RAISE, RowErrors
from .pack import Row, empty_row
from .tokenizers.chat import encode_chats, encode_prompts
from .tokenizers import Tokenizer

_BINS = 256  # rows kept open while packing


@dataclass(frozen=True)
class Sft:
    """What tuning reads; `rows` is one epoch in order, `train` the endless shuffled stream of them."""

    train: grain.MapDataset
    rows: list[Row]
    examples: int
    tokens: int  # of one epoch, padding not counted
    target_tokens: int  # of one epoch, those with weight 1
    digest: str  # the same digest is the same stream of rows
    kept: list[str] = field(default_factory=list)  # where the examples come from
    valid: list[Row] = field(default_factory=list)  # the rows that choose, packed


def _marker(role: str, tokenizer: Tokenizer) -> list[int]:
    name = f"<|{role}|>"
    return [tokenizer.special[name]] if name in tokenizer.special else tokenizer.encode(f"{name}\n")


def encode_example(chat: Chat | list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, weights): weight 1 on what the assistant says, where it is learnt, and the token that ends it; else 0."""
    return next(encode_examples([("chat", chat)], tokenizer))


def encode_examples(
    rows: Sequence[tuple[str, Chat | list[Message]]], tokenizer: Tokenizer, bad: RowErrors = RAISE
) -> Iterator[tuple[list[int], list[int]]]:
    """`encode_example` of many (where, dialogue) at once: a chat template then takes one child process for all.
    ([], []) for a row that it refuses, if `bad` leaves that out."""
    chats = [(where, as_chat(chat)) for where, chat in rows]
    if tokenizer.template:
        yield from encode_chats(tokenizer, chats, bad)
        return
    for where, chat in chats:
        check_expressible(chat, tokenizer, where)
    contents = iter(tokenizer.encode_batch([turn["content"] for _, chat in chats for turn in chat.messages]))
    for _, chat in chats:
        yield _assemble(chat, contents, tokenizer)


def check_expressible(chat: Chat, tokenizer: Tokenizer, where: str) -> None:
    """InputError for what graftax's own format has no place for: anything but text by system, user and assistant."""
    if tokenizer.template:
        return
    role = "a message from tool" if any(turn["role"] == "tool" for turn in chat.messages) else ""
    if what := next((f"{name!r}" for name in chat.beyond_text), role):
        hint = f", or leave it out with --data.ignore {what[1:-1]}" if chat.beyond_text else ""
        raise InputError(f"{where}: {what} has no place in graftax's own chat format, and this tokenizer has no chat "
                         f"template; take a base whose tokenizer has one{hint}")  # fmt: skip


def _assemble(chat: Chat, contents: Iterator[list[int]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids, weights = [tokenizer.bos], [0]
    for turn, learnt in zip(chat.messages, chat.learnt, strict=True):
        head, content = _marker(turn["role"], tokenizer), next(contents)
        ids += [*head, *content, tokenizer.end]
        weights += [0] * len(head) + [int(learnt)] * (len(content) + 1)
    return ids, weights


def render_prompt(chat: Chat | list[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids a reply is generated from: `chat` without a last reply, then what the template begins a reply with."""
    return render_prompts([("chat", chat)], tokenizer)[0]


def render_prompts(
    rows: Sequence[tuple[str, Chat | list[Message]]], tokenizer: Tokenizer, bad: RowErrors = RAISE
) -> list[list[int]]:
    """`render_prompt` of many (where, dialogue) at once; [] for a row that `bad` leaves out."""
    asked = [(where, as_chat(chat).prompt) for where, chat in rows]
    if tokenizer.template:
        return encode_prompts(tokenizer, asked, bad)
    return [ids + _marker("assistant", tokenizer) for ids, _ in encode_examples(asked, tokenizer)]


def sft_rows(
    rows: Iterable[tuple[str, dict]], tokenizer: Tokenizer, T: int, seed: int, pack: bool = True, bad: RowErrors = RAISE
) -> Sft:
    """Encode (where, row) pairs and put several in a row of T (pack=False: one). Same row format as pretraining.

    n tokens take n - 1 positions, because the last is only ever a target. InputError, unless `bad` says otherwise: a
    bad row, one that does not fit T, one without a target. InputError too for no rows.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: an integer in [0, 2**32) is wanted")
    sha = hashlib.sha256(f"{tokenizer.digest} {T} {seed} {pack}".encode())
    checked = []
    for where, row in rows:
        with bad:
            chat = chat_of(row, where, bad)
            check_expressible(chat, tokenizer, where)
            checked.append((where, chat))
    bad.rows = max(bad.rows, len(checked))  # tasks that no reader has counted
    examples, kept = [], []
    for (where, chat), pair in zip(checked, encode_examples(checked, tokenizer, bad), strict=True):
        if not pair[0]:
            continue  # left out
        with bad:
            ids, weights = _fitting(pair, T, where, bad)
            sha.update(ids.tobytes() + b"|" + weights.tobytes())
            if chat.tools or chat.variables:  # a template may write some of these into prompts alone
                sha.update(json.dumps([chat.tools, chat.variables], sort_keys=True).encode())
            examples.append({"ids": ids[:-1], "targets": ids[1:], "weights": weights[1:].astype(np.float32)})
            kept.append(where)
    if not examples:
        bad.settle()
        raise InputError("tuning data: no rows; at least one is wanted")
    packed = _pack(examples, T, seed) if pack else [_one(example, T) for example in examples]
    packed = [row | {"row": np.int64(i)} for i, row in enumerate(packed)]
    return Sft(
        train=grain.MapDataset.source(packed).shuffle(seed=seed).repeat(),
        rows=packed,
        examples=len(examples),
        tokens=sum(len(example["ids"]) for example in examples),
        target_tokens=int(sum(example["weights"].sum() for example in examples)),
        digest=sha.hexdigest(),
        kept=kept,
    )


def _fitting(pair: tuple[list[int], list[int]], T: int, where: str, bad: RowErrors) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) that a row of T holds, and of which something is learnt. InputError for any other."""
    ids, weights = np.array(pair[0], np.int32), np.array(pair[1], np.int32)
    if (n := len(ids) - 1) > T:
        bad.repair(InputError(f"{where}: {n} tokens, but a row holds T={T}; raise T, or shorten the row"))
        ids, weights = ids[: T + 1], weights[: T + 1]
    if not weights[1:].any():
        rest = f" in the first {T} tokens" if n > T else ""
        raise InputError(f"{where}: no target tokens{rest}, so nothing to learn; drop the row or shorten its prompt")
    return ids, weights


def _one(example: Row, T: int) -> Row:
    row, n = empty_row(T), len(example["ids"])
    for name, values in example.items():
        row[name][:n] = values
    row["segments"][:n], row["positions"][:n] = 1, np.arange(n)
    return row


def _pack(examples: list[Row], T: int, seed: int) -> list[Row]:
    """Best fit, once and offline: the result is a list with random access."""
    # In random order: longest first leaves 18 % of the places empty where this leaves 7 %, as rows of one length fill
    # the open ones before short ones come.
    order = np.random.default_rng(seed).permutation(len(examples))
    packed = grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source([examples[k] for k in order]).to_iter_dataset(grain.ReadOptions(0, 0)),
        length_struct=dict.fromkeys(examples[0], T),
        num_packing_bins=_BINS,
        shuffle_bins=False,
    )
    names = {"ids_segment_ids": "segments", "ids_positions": "positions", "ids": "ids", "targets": "targets"}
    return [{to: row[name] for name, to in (names | {"weights": "weights"}).items()} for row in packed]
