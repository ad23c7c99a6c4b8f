"""Catalogues on disk: items from Parquet, JSONL or CSV in batches.

Reading streams: memory holds a batch, never the file. Training and `semid tokenize` read with the same functions.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.template import FieldValue, TextTemplate

T = TypeVar("T")

ITEM_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
ARRAY_SUFFIXES = (".npy", ".safetensors")
BATCH_ROWS = 1024

# Bytes of a Parquet column that are read at once: a row group may have a million rows.
BUFFER_BYTES = 2**20

# A catalogue's column -> the template's field.
FIELDS: Mapping[str, str] = {
    "title": "title",
    "brand": "brand",
    "category": "categories",
    "categories": "categories",
    "description": "description",
}


@dataclass(frozen=True)
class CatalogueItem:
    """One row of a catalogue.

    Attributes:
        item_id: The catalogue's own key, as a string.
        fields: The template's fields that the row has; absent ones are left out.
        text: The ready text, where the catalogue has a column `text`; it goes before the fields.
        kept: Other columns that were asked for, as strings.
    """

    item_id: str
    fields: Mapping[str, FieldValue] = field(default_factory=dict)
    text: str | None = None
    kept: Mapping[str, str] = field(default_factory=dict)

    def content(self, template: TextTemplate) -> str:
        """The text that is tokenized; empty where the row has none."""
        return self.text.strip() if self.text else template.render(self.fields)


class RowError(ValueError):
    """One row cannot be read; those behind it can.

    Attributes:
        item_id: The row's own, where it has one.
    """

    def __init__(self, words: str, item_id: str | None = None) -> None:
        super().__init__(words)
        self.item_id = item_id


def read_items(
    path: Path, batch_rows: int = BATCH_ROWS, keep: Sequence[str] = (), columns: Mapping[str, str] | None = None
) -> Iterator[list[CatalogueItem]]:
    """The items of a catalogue file, batch by batch, in the file's order.

    Args:
        path: `.parquet`, `.jsonl`, `.ndjson` or `.csv` (UTF-8, a header line) with `item_id` and at least one of
            `title`, `brand`, `category` or `categories` (a path as one string or a list), `description`, `text`.
        batch_rows: Rows of a batch.
        keep: Other columns to hand on; a row without one has "".
        columns: This catalogue's names for the columns above, such as `{"item_id": "sku"}`.

    Raises:
        ValueError: The file's kind is unknown, it cannot be read, or columns are missing.
    """
    rows = map(_sound, read_each(path, batch_rows, keep, columns))
    while batch := list(islice(rows, batch_rows)):
        yield batch


def read_each(
    path: Path, batch_rows: int = BATCH_ROWS, keep: Sequence[str] = (), columns: Mapping[str, str] | None = None
) -> Iterator[CatalogueItem | RowError]:
    """The same, row by row; in the place of a row that cannot be read there is its error.

    Args:
        path: As `read_items`, like the others.
        batch_rows: Rows that are read together.
        keep: Other columns to hand on.
        columns: This catalogue's names.

    Raises:
        ValueError: The file cannot be read, or columns are missing.
    """
    names = _Names(columns or {}, tuple(keep))
    for number, row in enumerate(_rows(path, batch_rows), 1):
        try:
            # A line of JSON has columns of its own: a later one that lacks some fails alone, as an empty cell does.
            yield names.item(_sound(row), f"{path}, row {number}", is_first=number == 1)
        except RowError as error:
            yield error


def read_row(row: Mapping[str, Any], place: str) -> CatalogueItem:
    """The item of one row, read elsewhere, whose columns are named as in `read_items`.

    Args:
        row: Column -> value.
        place: Where it stands, for the words of an error.

    Raises:
        ValueError: A column is missing, or a value is of another kind.
    """
    return _Names({}, ()).item(row, place, is_first=True)


def has_embeddings(path: Path) -> bool:
    """Whether a file holds embeddings and no texts: an array, or Parquet with a column `embedding`."""
    if path.suffix in ARRAY_SUFFIXES:
        return True
    if path.suffix != ".parquet":
        return False
    with open_parquet(path) as file:
        names = set(file.schema_arrow.names)
    return "embedding" in names and not names & {*FIELDS, "text"}


def columns_of(path: Path) -> frozenset[str] | None:
    """The columns of a Parquet or CSV file; None where each row has its own, or the file is of another kind.

    Raises:
        ValueError: The file cannot be read.
    """
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            return frozenset(file.schema_arrow.names)
    if path.suffix == ".csv" and path.is_file():
        first = next(_rows(path, 1), None)
        return None if first is None else frozenset(_sound(first))
    return None


def rows_of(path: Path) -> int | None:
    """How many rows a Parquet file has; None of other files, which have to be read for that.

    Raises:
        ValueError: The file cannot be read.
    """
    if path.suffix != ".parquet":
        return None
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def read_item_ids(path: Path) -> pa.LargeStringArray:
    """The item ids (N,) of a Parquet file of embeddings, as strings, in the file's order.

    Raises:
        ValueError: The file has no column `item_id`, or an id is missing, empty, or neither a string nor an integer.
    """
    if path.suffix != ".parquet":
        msg = f"{path} names no items: embeddings with item ids are Parquet with the columns item_id and embedding"
        raise ValueError(msg)
    with open_parquet(path) as file:
        if "item_id" not in file.schema_arrow.names:
            msg = f"{path} has no column 'item_id'; its columns are {file.schema_arrow.names}"
            raise ValueError(msg)
        column = file.read(["item_id"]).column("item_id")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (
        pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ):
        msg = f"{path}, item_id: expected strings or integers, got {column.type}"
        raise ValueError(msg)
    ids = pa.concat_arrays([pa.array([], pa.large_string()), *column.cast(pa.large_string()).chunks])
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        msg = f"{path} has rows without an item_id"
        raise ValueError(msg)
    return ids


class _Names:
    """Turns a file's rows into items; a file's own column names are looked up once."""

    def __init__(self, renamed: Mapping[str, str], keep: tuple[str, ...]) -> None:
        self._item_id = renamed.get("item_id", "item_id")
        self._text = renamed.get("text", "text")
        self._fields = {renamed.get(column, column): name for column, name in FIELDS.items()}
        self._keep = keep

    def item(self, row: Mapping[str, Any], place: str, *, is_first: bool) -> CatalogueItem:
        """The item of a row; where it is the first one, columns that it lacks are lacking in the file."""
        if is_first:
            self._require_columns(row, place)
        item_id = row.get(self._item_id)
        if item_id in (None, "") or (isinstance(item_id, float) and math.isnan(item_id)):
            raise RowError(f"{place} has no {self._item_id!r}")
        if isinstance(item_id, bool) or not isinstance(item_id, (str, int)):
            raise RowError(f"{place}, {self._item_id}: expected a string or an integer, got {item_id!r}")
        _require_unicode([str(item_id)], place)
        try:
            return self._item(str(item_id), row, place)
        except ValueError as error:
            raise RowError(str(error), str(item_id)) from error

    def _require_columns(self, row: Mapping[str, Any], place: str) -> None:
        if self._item_id not in row:
            msg = f"{place} has no {self._item_id!r}; its columns are {sorted(row)}"
            raise ValueError(msg)
        if self._text not in row and not self._fields.keys() & row.keys():
            msg = (
                f"{place} has none of the columns {sorted({*self._fields, self._text})}; its columns are {sorted(row)}"
            )
            raise ValueError(msg)

    def _item(self, item_id: str, row: Mapping[str, Any], place: str) -> CatalogueItem:
        fields = {
            name: _field(row[column], f"{place}, {column}")
            for column, name in self._fields.items()
            if row.get(column) not in (None, "") and row[column] == row[column]  # NaN is no value
        }
        text = row.get(self._text)
        if text is not None and not isinstance(text, str):
            msg = f"{place}, {self._text}: expected a string, got {type(text).__name__}"
            raise ValueError(msg)
        kept = {column: "" if row.get(column) is None else str(row[column]) for column in self._keep}
        lists = [[value] if isinstance(value, str) else value or () for value in fields.values()]
        _require_unicode([text or "", *kept.values(), *(part for parts in lists for part in parts)], place)
        return CatalogueItem(item_id, fields, text or None, kept)


def _sound(row: T | RowError) -> T:
    """The row; what is wrong with it is raised."""
    if isinstance(row, RowError):
        raise row
    return row


def _require_unicode(strings: Iterable[str], place: str) -> None:
    """Raise RowError where a string has half a surrogate pair, which no UTF-8 can write."""
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        words = f"{place} has half a surrogate pair ({error.object[error.start]!r}), which is no character"
        raise RowError(words) from error


def _field(value: Any, place: str) -> FieldValue:
    """A string, or a list of strings; numbers become strings."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    msg = f"{place}: expected a string or a list of strings, got {value!r}"
    raise ValueError(msg)


def _rows(path: Path, batch_rows: int) -> Iterator[dict[str, Any] | RowError]:
    readers = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".ndjson": _json_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        msg = f"{path} is no catalogue: known are {', '.join(ITEM_SUFFIXES)}"
        raise ValueError(msg)
    if not path.is_file():
        msg = f"there is no file {path}"
        raise ValueError(msg)
    return _readable(path, reader(path, batch_rows))


def _readable(path: Path, rows: Iterator[T]) -> Iterator[T]:
    """The same rows; what cannot be read is a ValueError that names the file."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8: {error}"
        raise ValueError(msg) from error
    except (OSError, csv.Error, pa.ArrowException) as error:
        msg = f"{path} cannot be read: {error}"
        raise ValueError(msg) from error


def _parquet_rows(path: Path, batch_rows: int) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=batch_rows):
            yield from batch.to_pylist()


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, to be read in bounded memory; the caller closes it.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        msg = f"{path} cannot be read as Parquet: {error}"
        raise ValueError(msg) from error


def _json_rows(path: Path, _: int) -> Iterator[dict[str, Any] | RowError]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield RowError(f"{path}, line {number} is not JSON: {error}")
                continue
            yield row if isinstance(row, dict) else RowError(f"{path}, line {number} is no JSON object")


def _csv_rows(path: Path, _: int) -> Iterator[dict[str, Any] | RowError]:
    # utf-8-sig: spreadsheets put a byte order mark in front of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: else all that follows a quote that is never closed would be one cell, and its items lost.
        rows, number = csv.DictReader(file, strict=True), 0
        try:
            if rows.fieldnames is None:
                msg = f"{path} has no header line"
                raise ValueError(msg)
            for number, row in enumerate(rows, 1):
                yield RowError(f"{path}, row {number} has more cells than the header") if None in row else row
        except csv.Error as error:
            msg = f"{path}, row {number + 1} cannot be read: {error}"
            raise ValueError(msg) from error
