"""Supervised fine-tuning rows: dialogues, packed, with the loss on the assistant's words alone.

A dialogue is written by the tokenizer's own chat template (tokenizers/chat.py) if it has one. Otherwise it is bos, and
for each turn `<|role|>` content eos; a vocabulary without role tokens gets `<|role|>` and a newline as plain text.
The packed rows have the format of pack.py.
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
from .tokenizers import Tokenizer
from .tokenizers.chat import encode_chats, encode_prompts

_OPEN_ROWS = 256  # rows that are filled at the same time while packing
NamedChats = Sequence[tuple[str, Chat | list[Message]]]  # (where it comes from, dialogue)


@dataclass(frozen=True)
class Sft:
    """Rows for supervised fine-tuning. Equal digests mean equal streams of rows. Counts are for one epoch."""

    train: grain.MapDataset  # infinite: `rows`, shuffled by epoch
    rows: list[Row]
    examples: int
    tokens: int  # padding not counted
    target_tokens: int  # those with weight 1
    digest: str
    kept: list[str] = field(default_factory=list)  # where each example comes from
    valid: list[Row] = field(default_factory=list)  # packed validation rows


def encode_example(chat: Chat | list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return (ids, weights): weight 1 for the assistant's learnt words and the token that ends them, else 0."""
    return next(encode_examples([("chat", chat)], tokenizer))


def encode_examples(
    chats: NamedChats, tokenizer: Tokenizer, errors: RowErrors = RAISE
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield `encode_example` of each dialogue; a chat template then renders all in one child process.

    Yields ([], []) for a dialogue that the template refuses and `errors` leaves out.
    """
    named = [(where, as_chat(chat)) for where, chat in chats]
    if tokenizer.template:
        yield from encode_chats(tokenizer, named, errors)
        return
    for where, chat in named:
        _check_plain_text(chat, tokenizer, where)
    contents = iter(tokenizer.encode_batch([turn["content"] for _, chat in named for turn in chat.messages]))
    for _, chat in named:
        ids, weights = [tokenizer.bos], [0]
        for turn, learnt in zip(chat.messages, chat.learnt, strict=True):
            marker, content = _role_marker(turn["role"], tokenizer), next(contents)
            ids += [*marker, *content, tokenizer.end]
            weights += [0] * len(marker) + [int(learnt)] * (len(content) + 1)
        yield ids, weights


def _role_marker(role: str, tokenizer: Tokenizer) -> list[int]:
    marker = f"<|{role}|>"
    return [tokenizer.special[marker]] if marker in tokenizer.special else tokenizer.encode(f"{marker}\n")


def _check_plain_text(chat: Chat, tokenizer: Tokenizer, where: str) -> None:
    """Raise InputError, without a chat template, for anything but text by system, user and assistant."""
    if tokenizer.template:
        return
    problem = "a message from tool" if any(turn["role"] == "tool" for turn in chat.messages) else ""
    hint = "take a base whose tokenizer has one"
    if name := next(iter(chat.beyond_text), ""):
        problem, hint = repr(name), f"{hint}, or leave it out with --data.ignore {name}"
    if problem:
        format = "graftax's own chat format, and this tokenizer has no chat template"
        raise InputError(f"{where}: {problem} has no place in {format}; {hint}")


def render_prompt(chat: Chat | list[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the ids to generate a reply from: `chat` without its last reply, then what begins a reply."""
    return render_prompts([("chat", chat)], tokenizer)[0]


def render_prompts(chats: NamedChats, tokenizer: Tokenizer, errors: RowErrors = RAISE) -> list[list[int]]:
    """Return `render_prompt` of each dialogue; [] for one that `errors` leaves out."""
    prompts = [(where, as_chat(chat).prompt) for where, chat in chats]
    if tokenizer.template:
        return encode_prompts(tokenizer, prompts, errors)
    return [ids + _role_marker("assistant", tokenizer) for ids, _ in encode_examples(prompts, tokenizer)]


def sft_rows(
    rows: Iterable[tuple[str, dict]],
    tokenizer: Tokenizer,
    T: int,
    seed: int,
    pack: bool = True,
    errors: RowErrors = RAISE,
) -> Sft:
    """Encode (where, row) pairs as examples, and pack several of them into each row of T (pack=False: one).

    An example of n tokens takes n - 1 positions, because its last token is only a target. Raises InputError for no rows
    and, unless `errors` leaves it out, for a row that cannot be used, does not fit T or has no target.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: expected an integer in [0, 2**32)")
    sha = hashlib.sha256(f"{tokenizer.digest} {T} {seed} {pack}".encode())
    chats = list(_parse_rows(rows, tokenizer, errors))
    errors.rows = max(errors.rows, len(chats))  # the rows of a task were not counted by a reader
    examples, kept = [], []
    for (where, chat), (ids, weights) in zip(chats, encode_examples(chats, tokenizer, errors), strict=True):
        if not ids:
            continue  # left out
        with errors:
            ids, weights = _fit(np.array(ids, np.int32), np.array(weights, np.int32), T, where, errors)
            sha.update(ids.tobytes() + b"|" + weights.tobytes())
            if chat.tools or chat.variables:  # a template may write some of these only into prompts
                sha.update(json.dumps([chat.tools, chat.variables], sort_keys=True).encode())
            examples.append({"ids": ids[:-1], "targets": ids[1:], "weights": weights[1:].astype(np.float32)})
            kept.append(where)
    if not examples:
        errors.check_cap()
        raise InputError("fine-tuning data: no rows; expected at least one")
    packed = _pack(examples, T, seed) if pack else [_pad(example, T) for example in examples]
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


def _parse_rows(
    rows: Iterable[tuple[str, dict]], tokenizer: Tokenizer, errors: RowErrors
) -> Iterator[tuple[str, Chat]]:
    for where, row in rows:
        with errors:
            chat = chat_of(row, where, errors)
            _check_plain_text(chat, tokenizer, where)
            yield where, chat


def _fit(ids: np.ndarray, weights: np.ndarray, T: int, where: str, errors: RowErrors) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, weights), cut to a row of T if `errors` allows it. Raises InputError if no target is left."""
    n = len(ids) - 1
    if n > T:
        errors.repair(InputError(f"{where}: {n} tokens, but a row holds T={T}; raise T, or shorten the row"))
        ids, weights = ids[: T + 1], weights[: T + 1]
    if not weights[1:].any():
        place = f" in the first {T} tokens" if n > T else ""
        raise InputError(f"{where}: no target tokens{place}, so nothing to learn; drop the row or shorten its prompt")
    return ids, weights


def _pad(example: Row, T: int) -> Row:
    """Return a row of T that holds one example."""
    row, n = empty_row(T), len(example["ids"])
    for name, values in example.items():
        row[name][:n] = values
    row["segments"][:n], row["positions"][:n] = 1, np.arange(n)
    return row


def _pack(examples: list[Row], T: int, seed: int) -> list[Row]:
    """Pack examples into rows of T by best fit, once and in memory, so that the rows have random access."""
    # In random order: sorted by length, 18 % of the positions stay empty where this leaves 7 %, because examples of one
    # length fill the open rows before shorter ones come.
    order = np.random.default_rng(seed).permutation(len(examples))
    packed = grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source([examples[k] for k in order]).to_iter_dataset(grain.ReadOptions(0, 0)),
        length_struct=dict.fromkeys(examples[0], T),
        num_packing_bins=_OPEN_ROWS,
        shuffle_bins=False,
    )
    names = {"ids": "ids", "targets": "targets", "weights": "weights"}
    names |= {"ids_segment_ids": "segments", "ids_positions": "positions"}
    return [{name: row[grain_name] for grain_name, name in names.items()} for row in packed]
