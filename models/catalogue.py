"""Catalogues on disk: items from Parquet, JSONL or CSV in batches, and arrays of embeddings.

Reading streams: memory holds a batch, never the file. Training and `semid tokenize` read with the same functions.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.template import FieldValue, TextTemplate

ITEM_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
ARRAY_SUFFIXES = (".npy", ".safetensors")
BATCH_ROWS = 1024

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
    rows = _rows(path, batch_rows)
    names = _Names(columns or {}, tuple(keep))
    number = 0
    while batch := list(islice(rows, batch_rows)):
        items = []
        for row in batch:
            number += 1
            items.append(names.item(row, f"{path}, row {number}"))
        yield items


def has_embeddings(path: Path) -> bool:
    """Whether a file holds embeddings and no texts: an array, or Parquet with a column `embedding`."""
    if path.suffix in ARRAY_SUFFIXES:
        return True
    if path.suffix != ".parquet":
        return False
    with _open_parquet(path) as file:
        names = set(file.schema_arrow.names)
    return "embedding" in names and not names & {*FIELDS, "text"}


def read_embeddings(path: Path) -> Tensor:
    """An array of embeddings, (N, D) float32.

    Args:
        path: `.npy`; `.safetensors` with one tensor, or one named `embeddings`; `.parquet` with a column `embedding`
            of fixed-size lists. float16, bfloat16, float32 or float64.

    Raises:
        ValueError: The file cannot be read, the shape is not (N, D), there is no row, or a number is not finite.
    """
    if path.suffix == ".npy":
        embeddings = _from_numpy(path)
    elif path.suffix == ".safetensors":
        embeddings = _from_safetensors(path)
    elif path.suffix == ".parquet":
        embeddings = _from_parquet(path)
    else:
        msg = f"{path} is no array of embeddings: known are .npy, .safetensors and .parquet"
        raise ValueError(msg)
    if embeddings.ndim != 2 or 0 in embeddings.shape or not embeddings.is_floating_point():
        msg = f"{path} has shape {tuple(embeddings.shape)} of {embeddings.dtype}, expected (N, D) of floats"
        raise ValueError(msg)
    embeddings = embeddings.to(torch.float32)
    bad = (~embeddings.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        msg = f"{path} has numbers that are not finite in {len(bad)} rows, the first of them row {bad[0]}"
        raise ValueError(msg)
    return embeddings


def read_item_ids(path: Path) -> pa.LargeStringArray:
    """The item ids (N,) of a Parquet file of embeddings, as strings, in the file's order.

    Raises:
        ValueError: The file has no column `item_id`, or an id is missing, empty, or neither a string nor an integer.
    """
    if path.suffix != ".parquet":
        msg = f"{path} names no items: embeddings with item ids are Parquet with the columns item_id and embedding"
        raise ValueError(msg)
    with _open_parquet(path) as file:
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

    def item(self, row: Mapping[str, Any], place: str) -> CatalogueItem:
        item_id = row.get(self._item_id)
        if item_id is None or item_id == "" or isinstance(item_id, (float, bool, list, dict)):
            msg = f"{place} has no {self._item_id!r}; its columns are {sorted(row)}"
            raise ValueError(msg)
        if self._text not in row and not self._fields.keys() & row.keys():
            msg = (
                f"{place} has none of the columns {sorted({*self._fields, self._text})}; its columns are {sorted(row)}"
            )
            raise ValueError(msg)
        fields = {
            name: _field(row[column], f"{place}, {column}")
            for column, name in self._fields.items()
            if row.get(column) not in (None, "") and row[column] == row[column]  # NaN is no value
        }
        text = row.get(self._text)
        if text is not None and not isinstance(text, str):
            msg = f"{place}, {self._text}: expected a string, got {type(text).__name__}"
            raise ValueError(msg)
        kept = {column: str(row.get(column) or "") for column in self._keep}
        item = CatalogueItem(str(item_id), fields, text or None, kept)
        _require_unicode(item, place)
        return item


def _require_unicode(item: CatalogueItem, place: str) -> None:
    """Raise ValueError where a string has half a surrogate pair, which no UTF-8 can write."""
    lists = [[value] if isinstance(value, str) else value or () for value in item.fields.values()]
    strings = [item.item_id, item.text or "", *item.kept.values(), *(part for parts in lists for part in parts)]
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        msg = f"{place} has half a surrogate pair ({error.object[error.start]!r}), which is no character"
        raise ValueError(msg) from error


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


def _rows(path: Path, batch_rows: int) -> Iterator[dict[str, Any]]:
    readers = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".ndjson": _json_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        msg = f"{path} is no catalogue: known are {', '.join(ITEM_SUFFIXES)}"
        raise ValueError(msg)
    if not path.is_file():
        msg = f"there is no file {path}"
        raise ValueError(msg)
    return reader(path, batch_rows)


def _parquet_rows(path: Path, batch_rows: int) -> Iterator[dict[str, Any]]:
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=batch_rows):
            yield from batch.to_pylist()


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        msg = f"{path} cannot be read as Parquet: {error}"
        raise ValueError(msg) from error


def _json_rows(path: Path, _: int) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                msg = f"{path}, line {number} is not JSON: {error}"
                raise ValueError(msg) from error
            if not isinstance(row, dict):
                msg = f"{path}, line {number} is no JSON object"
                raise ValueError(msg)  # noqa: TRY004 - one kind of error for what a file holds
            yield row


def _csv_rows(path: Path, _: int) -> Iterator[dict[str, Any]]:
    # utf-8-sig: spreadsheets put a byte order mark in front of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            if None in row:
                msg = f"{path}, row {number} has more cells than the header"
                raise ValueError(msg)
            yield row


def _from_numpy(path: Path) -> Tensor:
    try:
        # No pickle: an object array would run code.
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read as an array: {error}"
        raise ValueError(msg) from error
    if array.dtype.kind != "f":
        msg = f"{path} holds {array.dtype}, expected floats"
        raise ValueError(msg)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _from_safetensors(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be read as safetensors: {error}"
        raise ValueError(msg) from error
    name = "embeddings" if "embeddings" in tensors else next(iter(tensors), "")
    if not tensors or (len(tensors) > 1 and name != "embeddings"):
        msg = f"{path} holds the tensors {sorted(tensors)}; expected one, or one named 'embeddings'"
        raise ValueError(msg)
    return tensors[name]


def _from_parquet(path: Path) -> Tensor:
    with _open_parquet(path) as file:
        if "embedding" not in file.schema_arrow.names:
            msg = f"{path} has no column 'embedding'; its columns are {file.schema_arrow.names}"
            raise ValueError(msg)
        column = file.read(["embedding"]).column("embedding").combine_chunks()
    if not pa.types.is_fixed_size_list(column.type) or column.null_count or column.flatten().null_count:
        msg = f"{path}, embedding: expected fixed-size lists of floats without nulls, got {column.type}"
        raise ValueError(msg)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(values.reshape(-1, column.type.list_size), dtype=np.float32))
