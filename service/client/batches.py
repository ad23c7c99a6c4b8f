"""Many items -> the parts of them that are sent together."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


def batches_of(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size` values.

    Raises:
        TypeError: They are one text or one mapping, whose parts nobody means.
    """
    if isinstance(values, str | bytes | Mapping):
        raise TypeError(f"many are taken, not one {type(values).__name__}: put it into a list")
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


async def batches_of_any(values: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    """The same of values that may arrive bit by bit."""
    if not isinstance(values, AsyncIterable):
        for batch in batches_of(values, size):
            yield batch
        return
    arrived: list[T] = []
    async for value in values:
        arrived.append(value)
        if len(arrived) == size:
            yield arrived
            arrived = []
    if arrived:
        yield arrived


def slices_of(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `rows` rows, none of them empty."""
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


async def slices_of_any(
    batches: Iterable[pa.RecordBatch] | AsyncIterable[pa.RecordBatch], rows: int
) -> AsyncIterator[pa.RecordBatch]:
    """The same of record batches that may arrive bit by bit."""
    async for (batch,) in batches_of_any(batches, 1):
        for part in slices_of([batch], rows):
            yield part


def as_table(batches: list[pa.RecordBatch]) -> pa.Table:
    """Answers as one table.

    Raises:
        ValueError: There are none.
    """
    import pyarrow as pa

    if not batches:
        raise ValueError("the table has no rows")
    return pa.Table.from_batches(batches)
