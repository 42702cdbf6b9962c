"""Loading of batches. The position in the stream is counted in rows, so a run can resume with another batch size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from .. import InputError
from .pack import Row, empty_row

Batch = dict[str, Any]  # a Row's fields with a leading batch axis: arrays [B, T], and `row` [B]
PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches in flight


def stack(rows: Sequence[Row]) -> Batch:
    """Return the batch of some rows."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Loader:
    """Iterator of batches from row `start` on.

    put: function from a NumPy batch to a device batch; it runs on the prefetch threads.
    local_rows: indices [B'] of the rows of each batch that this process needs; it reads no others. Batch n holds the
        same rows of the stream for any number of processes.

    A stream that ends gives no partial batch. To resume after n batches, with any batch size, pass `state()`'s
    next_row = start + n * batch_size as `start`. Raises InputError for a batch size below 1 and a start outside the
    stream.
    """

    def __init__(
        self,
        rows: grain.MapDataset,
        batch_size: int,
        put: Callable[[Batch], Batch] | None = None,
        start: int = 0,
        local_rows: Iterable[int] | None = None,
    ):
        _check_batch_size(batch_size)
        if not 0 <= start < len(rows):
            raise InputError(f"start row {start}: outside the stream of {len(rows)} rows; was it written by this run?")
        self._next_row, self._batch_size = start, batch_size
        indices = range(batch_size) if local_rows is None else [int(i) for i in local_rows]
        stream: Any = grain.MapDataset.range((len(rows) - start) // batch_size)
        stream = stream.map(lambda n: stack([rows[start + n * batch_size + i] for i in indices]))
        stream = stream.map(put) if put else stream
        self._batches = iter(stream.to_iter_dataset(PREFETCH))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except (StopIteration, InputError):
            raise
        except Exception as error:  # in a prefetch thread, e.g. the file behind a memory map is gone
            where = f"rows {self._next_row} to {self._next_row + self._batch_size - 1} of the stream"
            problem = f"could not be read ({type(error).__name__}: {error})"
            raise InputError(f"{where} {problem}; restore the data and continue with --resume") from error
        self._next_row += self._batch_size
        return batch

    def state(self) -> dict[str, int]:
        """Return {"next_row": n}, where to resume. Batches that are prefetched but not yet returned do not count."""
        return {"next_row": self._next_row}

    def close(self) -> None:
        """Stop the prefetch threads."""
        self._batches.close()


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    """Yield every row once; padding (weights 0, `row` -1) fills the last batch, so that all have one shape."""
    _check_batch_size(batch_size)
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        yield stack(batch + [empty_row(len(batch[0]["ids"]))] * (batch_size - len(batch)))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected at least 1")
