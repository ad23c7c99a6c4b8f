"""A block of a file -> its items, as columns, a portion at a time; a row that is at fault fails alone (P7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.catalogue import read_row
from service.backfill.plan import Block, Columns, Kind
from service.backfill.rows import RowReader
from service.bulk.arrow import read_columns
from service.bulk.columns import EmbeddingColumn, ItemColumns, TextColumn
from service.content import Item, ItemReader, entry_of
from service.errors import InvalidItem, ItemError

TEXTS_TOGETHER = 1024
EMBEDDINGS_TOGETHER = 4096


class Portion(NamedTuple):
    """Some rows of a block.

    Attributes:
        first: The first row, by the count over all files.
        item_ids: As strings, null where a row has none.
        columns: The items.
        order: What items of equal codes are sorted by; None where that is the rows.
        displays: Their titles; None where none are read.
    """

    first: int
    item_ids: pa.Array
    columns: ItemColumns
    order: pa.Array | None
    displays: pa.Array | None


class BlockReader:
    """Reads blocks.

    Args:
        reader: Of the tokenizer.
        kind: What is tokenized.
        columns: Those that are read.
    """

    def __init__(self, reader: ItemReader, kind: Kind, columns: Columns) -> None:
        self._reader = reader
        self._kind = kind
        self._columns = columns
        together = EMBEDDINGS_TOGETHER if kind is Kind.EMBEDDINGS else TEXTS_TOGETHER
        self._rows = RowReader(columns.read, together)

    def portions(self, block: Block) -> Iterator[Portion]:
        """The rows of a block, in order.

        Raises:
            ValueError: As `RowReader.rows`.
        """
        first = block.first
        for rows in self._rows.rows(block):
            yield self._portion(first, rows)
            first += len(rows)

    def close(self) -> None:
        """Closes the file."""
        self._rows.close()

    def _portion(self, first: int, rows: pa.RecordBatch) -> Portion:
        rows, broken = _without_broken(rows)
        item_ids = rows["item_id"].cast(pa.string())
        columns = self._embeddings(item_ids, rows) if self._kind is Kind.EMBEDDINGS else self._texts(item_ids, rows)
        _ = columns.digests  # here, while the model is at work
        if broken:
            columns = replace(columns, failures={**columns.failures, **broken})
        order, order_type, display = self._columns.order_by, self._columns.order_type, self._columns.display
        return Portion(
            first,
            item_ids,
            columns,
            None if order_type is None else _sortable(rows[order], order_type),
            None if display is None else rows[display].cast(pa.string()),
        )

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
        return _columns_of(read, TextColumn.of(read))

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


def _without_broken(rows: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, ItemError]]:
    """The rows, their strings that are no UTF-8 made null, and where these were: files may call any bytes strings."""
    broken: dict[int, ItemError] = {}
    for number, name in enumerate(rows.schema.names):
        column = rows[name]
        if _is_sound(column):
            continue
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        sound = [_is_sound(column[place : place + 1]) for place in range(len(column))]
        places = pa.array([place if is_sound else None for place, is_sound in enumerate(sound)], pa.int64())
        rows = rows.set_column(number, name, column.take(places))
        error = InvalidItem(f"its {name} is not UTF-8")
        broken |= {place: error for place, is_sound in enumerate(sound) if not is_sound}
    return rows, broken


def _is_sound(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _columns_of(read: Sequence[Item | ItemError], contents: TextColumn | EmbeddingColumn) -> ItemColumns:
    return ItemColumns(
        item_ids=[item.item_id.encode() if isinstance(item, Item) else b"" for item in read],
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
