"""Answers of the service -> a table on disk, row by row: Parquet, JSONL or CSV by the file's ending."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 8192
COLUMNS = pa.schema(
    [
        ("item_id", pa.string()),
        ("semantic_id", pa.string()),
        ("codes", pa.list_(pa.int32())),
        ("suffix", pa.int32()),
        ("created", pa.bool_()),
        ("content_changed", pa.bool_()),
    ]
)


class Table(Protocol):
    """Takes rows."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row."""

    def close(self) -> None:
        """Write what is pending and close the file."""


@contextmanager
def write_table(path: Path) -> Iterator[Table]:
    """Opens a table that appears at `path` when it is whole, and not at all when writing fails.

    Raises:
        ValueError: The ending is none of .parquet, .jsonl, .csv.
    """
    if path.suffix not in _KINDS:
        raise ValueError(f"{path}: write to one of {', '.join(_KINDS)}")
    draft = path.with_name(f".{path.name}.part")
    try:
        with closing(_KINDS[path.suffix](draft)) as table:
            yield table
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({name: row[name] for name in COLUMNS.names}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Csv(_Jsonl):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS.names)

    def write(self, row: Mapping[str, Any]) -> None:
        codes = "-".join(map(str, row["codes"]))
        self._rows.writerow([codes if name == "codes" else row[name] for name in COLUMNS.names])


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, COLUMNS, compression="zstd")
        self._pending: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self._pending.append({name: row[name] for name in COLUMNS.names})
        if len(self._pending) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=COLUMNS))
            self._pending.clear()

    def close(self) -> None:
        self._flush()
        self._writer.close()


_KINDS: Mapping[str, Callable[[Path], Table]] = {".parquet": _Parquet, ".jsonl": _Jsonl, ".csv": _Csv}
