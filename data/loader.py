"""Rows -> batches. The position in the stream is counted in rows, so a run can resume with another batch size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from .. import InputError
from .pack import Row, empty_row

Batch = dict[str, Any]  # [B, T] arrays, `row` [B]
_THREADS, _AHEAD = 2, 4  # batches are stacked and put by grain's threads, at most this many ahead


def stack(rows: Sequence[Row]) -> Batch:
    """Rows -> one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Loader:
    """An iterator of batches from row `start` on. `put` (numpy batch -> device batch) runs on the prefetch threads.

    `held`: the rows of each batch that this process needs; no other row is read. The stream, and what is the n-th batch
    of it, are the same for any number of processes.
    `state()` after n batches is {"next_row": start + n * batch_size}: give it as `start` to go on, with any batch size.
    A stream that ends gives no partial batch. InputError for a batch size below 1, or a start outside the stream.
    """

    def __init__(
        self,
        rows: grain.MapDataset,
        batch_size: int,
        put: Callable[[Batch], Batch] | None = None,
        start: int = 0,
        held: Any = None,
    ):
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: at least 1 is wanted")
        if not 0 <= start < len(rows):
            raise InputError(f"start row {start}: outside the stream of {len(rows)} rows; was it written by this run?")
        self._next, self._size = start, batch_size
        taken = range(batch_size) if held is None else [int(i) for i in held]
        stream: Any = grain.MapDataset.range((len(rows) - start) // batch_size)
        stream = stream.map(lambda n: stack([rows[start + n * batch_size + i] for i in taken]))
        stream = stream.map(put) if put else stream
        self._batches = iter(stream.to_iter_dataset(grain.ReadOptions(_THREADS, _AHEAD)))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except (StopIteration, InputError):
            raise
        except Exception as error:  # of a prefetch thread
            where = f"rows {self._next} to {self._next + self._size - 1} of the stream"
            raise InputError(
                f"{where} could not be read ({type(error).__name__}: {error}); put the data back, go on with --resume"
            ) from error
        self._next += self._size
        return batch

    def state(self) -> dict[str, int]:
        """Where to go on: {"next_row": n}. Batches fetched ahead but not given out do not count."""
        return {"next_row": self._next}

    def close(self) -> None:
        """Stop the prefetch threads."""
        self._batches.close()


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    """Yield every row once; the last batch is filled up with rows of weight 0 and `row` -1, so one shape serves."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: at least 1 is wanted")
    for at in range(0, len(rows), batch_size):
        taken = [rows[i] for i in range(at, min(at + batch_size, len(rows)))]
        yield stack(taken + [empty_row(len(taken[0]["ids"]))] * (batch_size - len(taken)))
