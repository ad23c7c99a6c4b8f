"""A block of a file -> its items, as columns, a portion at a time; a row that is at fault fails alone (P7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.catalogue import read_row
from service.backfill.files import open_parquet
from service.backfill.plan import Block, Kind
from service.bulk.arrow import read_columns
from service.bulk.columns import EmbeddingColumn, ItemColumns
from service.content import Item, ItemReader, entry_of
from service.errors import InvalidItem, ItemError

TEXTS_TOGETHER = 1024
EMBEDDINGS_TOGETHER = 4096

_NOTHING = np.zeros(8, np.uint8).tobytes()


class Portion(NamedTuple):
    """Some rows of a block.

    Attributes:
        first: The first row, by the count over all files.
        item_ids: As strings, null where a row has none.
        columns: The items.
        order: What items of equal codes are sorted by; None where that is the rows.
    """

    first: int
    item_ids: pa.Array
    columns: ItemColumns
    order: pa.Array | None


class BlockReader:
    """Reads blocks.

    It keeps its place in a file: blocks of one row group that follow each other are decoded once, not from the group's
    beginning each.

    Args:
        reader: Of the tokenizer.
        kind: What the files hold.
        columns: Those that are read.
        order_by: The one to sort by, and the type of its values; None where that is the rows.
    """

    def __init__(
        self, reader: ItemReader, kind: Kind, columns: Sequence[str], order_by: tuple[str, pa.DataType] | None
    ) -> None:
        self._reader = reader
        self._kind = kind
        self._columns = columns
        self._order_by = order_by
        self._together = EMBEDDINGS_TOGETHER if kind is Kind.EMBEDDINGS else TEXTS_TOGETHER
        self._path = ""
        self._file: pq.ParquetFile | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._at = 0  # the next row of the file

    def portions(self, block: Block) -> Iterator[Portion]:
        """The rows of a block, in order.

        Raises:
            ValueError: The file cannot be read, or is not that of the plan any more.
        """
        try:
            self._go_to(block)
            missing = block.rows
            while missing:
                rows = self._next(missing)
                yield self._portion(block.first + block.rows - missing, rows)
                missing -= len(rows)
        except (OSError, pa.ArrowException, StopIteration) as error:
            self._path = ""
            raise ValueError(f"{block.path} cannot be read from row {block.start} on: {error!r}") from error

    def _go_to(self, block: Block) -> None:
        if block.path != self._path:
            self.close()
            self._file = open_parquet(block.path)
            self._path = block.path
            self._begin(0)
        assert self._file is not None
        group, first = 0, 0
        while first + (rows := self._file.metadata.row_group(group).num_rows) <= block.start:
            group, first = group + 1, first + rows
        if not first <= self._at <= block.start:
            self._begin(group, first)
        while self._at < block.start:
            self._next(block.start - self._at)

    def _begin(self, group: int, first: int = 0) -> None:
        assert self._file is not None
        groups = list(range(group, self._file.metadata.num_row_groups))
        present = [name for name in self._columns if name in self._file.schema_arrow.names]
        self._batches = self._file.iter_batches(self._together, row_groups=groups, columns=present)
        self._rest, self._at = None, first

    def _next(self, most: int) -> pa.RecordBatch:
        """The next rows, one at least."""
        batch = self._rest
        while not batch:
            batch = next(self._batches)
        taken = batch.slice(0, most)
        self._rest = batch.slice(len(taken)) if len(taken) < len(batch) else None
        self._at += len(taken)
        return taken

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close(force=True)
            self._file, self._path = None, ""

    def _portion(self, first: int, rows: pa.RecordBatch) -> Portion:
        rows, broken = _without_broken(rows)
        item_ids = rows["item_id"].cast(pa.string())
        columns = self._embeddings(item_ids, rows) if self._kind is Kind.EMBEDDINGS else self._texts(item_ids, rows)
        if broken:
            columns = replace(columns, failures={**columns.failures, **broken})
        order = None if self._order_by is None else _sortable(rows[self._order_by[0]], self._order_by[1])
        return Portion(first, item_ids, columns, order)

    def _embeddings(self, item_ids: pa.Array, rows: pa.RecordBatch) -> ItemColumns:
        kind = pa.list_(pa.float32(), self._reader.shape.dimension)
        try:
            embeddings = rows["embedding"].cast(kind)
        except pa.ArrowException:  # some are of another length
            entries = zip(item_ids.to_pylist(), rows["embedding"].to_pylist(), strict=True)
            read = [self._read({"item_id": item_id, "embedding": embedding}) for item_id, embedding in entries]
            nothing = np.zeros(self._reader.shape.dimension, np.float32)
            contents = [item.content if isinstance(item, Item) else nothing for item in read]
            return _columns_of(read, EmbeddingColumn(np.stack(contents)))
        return read_columns(pa.record_batch({"item_id": item_ids, "embedding": embeddings}), self._reader)

    def _texts(self, item_ids: pa.Array, rows: pa.RecordBatch) -> ItemColumns:
        read = [
            self._row({**row, "item_id": item_id})
            for item_id, row in zip(item_ids.to_pylist(), rows.to_pylist(), strict=True)
        ]
        return _columns_of(read, _Texts([str(item.content) if isinstance(item, Item) else "" for item in read]))

    def _row(self, row: Mapping[str, Any]) -> Item | ItemError:
        if not row["item_id"]:
            return self._read({"item_id": row["item_id"]})
        try:
            entry = entry_of(read_row(row, "it"))
        except ValueError as error:
            return InvalidItem(str(error))
        return self._read(entry)

    def _read(self, entry: Mapping[str, Any]) -> Item | ItemError:
        try:
            return self._reader.read(dict(entry))
        except ItemError as error:
            return error


class _Texts:
    """Texts, as `service.bulk.columns.ContentColumn`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def at(self, places: NDArray[np.int64]) -> list[str]:
        return [self._texts[place] for place in places.tolist()]


def _without_broken(rows: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, ItemError]]:
    """The rows, those with bytes that are no UTF-8 made empty, and why, by place: files may call such bytes strings."""
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid:
        broken: dict[int, ItemError] = {}
        for place in range(len(rows)):
            try:
                rows.slice(place, 1).validate(full=True)
            except pa.ArrowInvalid:
                broken[place] = InvalidItem("it has a string that is not UTF-8")
        return rows.take(pa.array([None if place in broken else place for place in range(len(rows))])), broken
    return rows, {}


def _columns_of(read: Sequence[Item | ItemError], contents: _Texts | EmbeddingColumn) -> ItemColumns:
    return ItemColumns(
        item_ids=[item.item_id.encode() if isinstance(item, Item) else b"" for item in read],
        digests=np.frombuffer(
            b"".join([item.digest if isinstance(item, Item) else _NOTHING for item in read]), np.uint64
        ),
        contents=contents,
        failures={place: item for place, item in enumerate(read) if isinstance(item, ItemError)},
    )


def _sortable(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values as their order compares them; what is no number is nothing."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_temporal(values.type):
        values = values.cast(pa.int32() if values.type.bit_width == 32 else pa.int64())
    values = values.cast(kind)
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, kind), values)
    return values
