"""A catalogue's file -> what a client sends, from any row on, and its answers as columns."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.catalogue import CatalogueItem, RowError, columns_of, has_embeddings, read_each, rows_of
from service.cli.tokenize_journal import ANSWERS
from service.client import FailedItem, TokenizedItem, TokenizerClient
from service.client.batches import batches_of
from service.client.calls import OnChange
from service.content import entry_of
from service.errors import InvalidItem

ROWS_TOGETHER = 1024
ROWS_ON_THEIR_WAY = 16_384  # of a part


class Source(Protocol):
    """The rows of a file.

    Attributes:
        rows: How many there are.
    """

    rows: int

    def answers(
        self, client: TokenizerClient, skip: int, *, assign: bool, on_change: OnChange
    ) -> Iterator[pa.RecordBatch]:
        """The answers (`ANSWERS`) to the rows behind the first `skip`, in order.

        Raises:
            TokenizerError: The client's.
            ValueError: The file cannot be read.
        """


class Several:
    """Files one after the other.

    Args:
        sources: In order.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.rows = sum(source.rows for source in sources)
        self._sources = sources

    def answers(
        self, client: TokenizerClient, skip: int, *, assign: bool, on_change: OnChange
    ) -> Iterator[pa.RecordBatch]:
        """As `Source`."""
        for source in self._sources:
            if skip < source.rows:
                yield from source.answers(client, skip, assign=assign, on_change=on_change)
            skip = max(0, skip - source.rows)


def source_of(path: Path, display: str | None = None) -> Source:
    """The file, by what it holds.

    Args:
        path: Parquet, JSONL or CSV.
        display: The column of the titles to send beside the items; None: none are.

    Raises:
        ValueError: It cannot be read, or has no such column.
    """
    there = columns_of(path) if display is not None else None
    if there is not None and display not in there:
        raise ValueError(f"{path} has no column {display!r}; its columns are {sorted(there)}")
    return Embeddings(path, display) if has_embeddings(path) else Texts(path, display)


class Texts:
    """Titles, descriptions, texts: sent item by item, for the tokenizer's own template."""

    def __init__(self, path: Path, display: str | None = None) -> None:
        next(read_each(path, 1), None)  # what is wrong with its columns is said before anything is asked for
        self.rows = _rows(path)
        self._path = path
        self._keep = () if display is None else (display,)

    def answers(
        self, client: TokenizerClient, skip: int, *, assign: bool, on_change: OnChange
    ) -> Iterator[pa.RecordBatch]:
        """As `Source`."""
        tokenize = partial(client.tokenize, assign=assign, on_change=on_change)
        for some in batches_of(self._rows(skip, tokenize), ROWS_TOGETHER):
            yield pa.RecordBatch.from_pylist(some, schema=ANSWERS)

    def _rows(
        self, skip: int, tokenize: Callable[[Iterator[dict[str, Any]]], Iterator[TokenizedItem | FailedItem]]
    ) -> Iterator[dict[str, Any]]:
        """Rows of `ANSWERS`, part by part: what cannot be read waits for the answers in front of it."""
        rows = islice(enumerate(read_each(self._path, keep=self._keep)), skip, None)
        for first in rows:
            unread: deque[tuple[int, RowError]] = deque()  # rows that are not sent, each with its place in the file
            entries = _entries(chain([first], islice(rows, ROWS_ON_THEIR_WAY - 1)), unread)
            yield from _in_order(first[0], map(_row, tokenize(entries)), unread)


class Embeddings:
    """Parquet with `item_id` and `embedding`: sent as Arrow."""

    def __init__(self, path: Path, display: str | None = None) -> None:
        self._path = path
        self._display = display
        self._file = pq.ParquetFile(path, pre_buffer=False)
        self.rows = self._file.metadata.num_rows
        if "item_id" not in self._file.schema_arrow.names:
            raise ValueError(f"{path} has no column 'item_id'; its columns are {self._file.schema_arrow.names}")

    def answers(
        self, client: TokenizerClient, skip: int, *, assign: bool, on_change: OnChange
    ) -> Iterator[pa.RecordBatch]:
        """As `Source`."""
        batches = client.tokenize_batches(self._batches(skip), assign=assign, on_change=on_change)
        for answers in batches:
            columns = [answers[name].cast(ANSWERS.field(name).type) for name in ANSWERS.names]
            yield pa.RecordBatch.from_arrays(columns, schema=ANSWERS)

    def _batches(self, skip: int) -> Iterator[pa.RecordBatch]:
        metadata = self._file.metadata
        groups, first = list(range(metadata.num_row_groups)), 0
        while groups and first + metadata.row_group(groups[0]).num_rows <= skip:
            first += metadata.row_group(groups.pop(0)).num_rows
        if not groups:
            return
        columns = ["item_id", "embedding", *([self._display] if self._display else [])]
        for batch in self._file.iter_batches(ROWS_TOGETHER * 4, row_groups=groups, columns=columns):
            if first + len(batch) > skip:
                yield self._read(batch.slice(max(0, skip - first)))
            first += len(batch)

    def _read(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        kind = batch["embedding"].type
        try:
            lengths = pc.list_value_length(batch["embedding"])  # null of a row without one, which fails alone
            size = kind.list_size if pa.types.is_fixed_size_list(kind) else pc.max(lengths).as_py() or 1
            embeddings = batch["embedding"].cast(pa.list_(pa.float32(), size))
            columns = {"item_id": batch["item_id"].cast(pa.string()), "embedding": embeddings}
            if self._display:
                columns["display"] = batch[self._display].cast(pa.string())
            return pa.record_batch(columns)
        except (pa.ArrowException, TypeError, AttributeError) as error:
            words = f"{self._path}: item_id has to be strings or integers, embedding lists of floats, all of one length"
            raise ValueError(words) from error


def _rows(path: Path) -> int:
    """How many rows a file has."""
    known = rows_of(path)
    if known is not None:
        return known
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        if path.suffix == ".csv":
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)
        return sum(1 for line in file if line.strip())


def _entries(
    rows: Iterator[tuple[int, CatalogueItem | RowError]], unread: deque[tuple[int, RowError]]
) -> Iterator[dict[str, Any]]:
    """What is sent; what cannot be is put into `unread`."""
    for place, item in rows:
        if isinstance(item, RowError):
            unread.append((place, item))
        else:
            yield _entry(item)


def _in_order(
    place: int, answered: Iterator[dict[str, Any]], unread: deque[tuple[int, RowError]]
) -> Iterator[dict[str, Any]]:
    """Rows of `ANSWERS` from a place on; `unread` has those in front of an answer by the time that it is there."""
    for answer in answered:
        while unread and unread[0][0] == place:
            yield _unread_row(unread.popleft()[1])
            place += 1
        yield answer
        place += 1
    yield from (_unread_row(error) for _, error in unread)


def _unread_row(error: RowError) -> dict[str, Any]:
    return {"item_id": error.item_id, "error": InvalidItem(str(error)).as_error()}


def _entry(item: CatalogueItem) -> dict[str, Any]:
    """A row as an item of `POST /tokenize`; what was kept of it is its title, and an empty one is not sent."""
    (display,) = item.kept.values() or ("",)
    return {**entry_of(item), "display": display} if display else entry_of(item)


def _row(answer: TokenizedItem | FailedItem) -> dict[str, Any]:
    """An answer as a row of `ANSWERS`."""
    if isinstance(answer, FailedItem):
        error = answer.error
        return {"item_id": answer.item_id, "error": {"type": error.type, "title": error.title, "detail": error.detail}}
    return {name: getattr(answer, name) for name in ANSWERS.names if name != "error"}
