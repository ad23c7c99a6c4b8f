"""Answers of the service -> a table on disk, batch by batch: Parquet, JSONL or CSV by the file's ending."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

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

    def write(self, rows: pa.RecordBatch) -> None:
        """Add rows of the columns above."""

    def close(self) -> None:
        """Write what is pending and close the file."""


def require_writable(path: Path) -> None:
    """Raise ValueError unless the ending is one of .parquet, .jsonl, .csv and the directory is there."""
    if path.suffix not in _KINDS:
        raise ValueError(f"{path}: write to one of {', '.join(_KINDS)}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} cannot be written")


@contextmanager
def write_table(path: Path) -> Iterator[Table]:
    """Opens a table that appears at `path` when it is whole and on disk, and not at all when writing fails.

    The file is a function of the rows alone, not of how they are handed over.

    Raises:
        ValueError: The ending is none of .parquet, .jsonl, .csv.
    """
    require_writable(path)
    with replaced(path) as draft, closing(_KINDS[path.suffix](draft)) as table:
        yield table


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes its place when it is whole and on disk."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")

    def write(self, rows: pa.RecordBatch) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())

    def close(self) -> None:
        self._file.close()


class _Csv:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS.names)

    def write(self, rows: pa.RecordBatch) -> None:
        for row in rows.to_pylist():
            self._rows.writerow([*({**row, "codes": "-".join(map(str, row["codes"]))}.values())])

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, COLUMNS, compression="zstd")
        self._pending = COLUMNS.empty_table()

    def write(self, rows: pa.RecordBatch) -> None:
        self._pending = pa.concat_tables([self._pending, pa.Table.from_batches([rows])])
        while len(self._pending) >= ROW_GROUP:
            self._writer.write_table(self._pending.slice(0, ROW_GROUP))
            self._pending = self._pending.slice(ROW_GROUP)

    def close(self) -> None:
        if len(self._pending):
            self._writer.write_table(self._pending)
        self._writer.close()


_KINDS: Mapping[str, Callable[[Path], Table]] = {".parquet": _Parquet, ".jsonl": _Jsonl, ".csv": _Csv}
