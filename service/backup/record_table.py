"""A record as a Parquet table: a row for each Semantic ID that was ever assigned.

The member `semid` of the file's metadata is JSON and says of what record the table is, and at which revision.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from service.registry.assignment import CONTENT_CHANGED, DIGEST_BYTES, RETIRED
from service.registry.contents import Held
from service.semantic_id import CodeLayout

FORMAT = 1
ROWS_PER_GROUP = 65_536
DISPLAY = "display"  # older tables are without
METADATA_KEY = b"semid"
LIVE, GONE, REPLACED = "live", "retired", "replaced"
STATES = np.array([LIVE, GONE, REPLACED])
TIME = pa.timestamp("ms", tz="UTC")


class NotARecordTable(ValueError):
    """The file is not a table that `semid export` wrote."""


@dataclass(frozen=True)
class Origin:
    """Of what record a table is.

    Attributes:
        tokenizer: `name@fingerprint`.
        fingerprint: The tokenizer's.
        codebook_sizes: The number of codewords of each of its levels.
        max_suffix: The highest suffix it may issue; None without bound.
        namespace: The catalogue's.
        schema: Of the registry's keys.
    """

    tokenizer: str
    fingerprint: str
    codebook_sizes: tuple[int, ...]
    max_suffix: int | None
    namespace: str
    schema: int


class Description(NamedTuple):
    """What the file's metadata says: of what, at which revision, and when it was written (ISO 8601)."""

    origin: Origin
    revision: int
    exported_at: str

    def to_json(self) -> bytes:
        """As it stands in the file."""
        rest = {"revision": self.revision, "exported_at": self.exported_at, "format": FORMAT}
        return json.dumps({**asdict(self.origin), **rest}).encode()

    @classmethod
    def of(cls, path: Path) -> Description:
        """The description of a table.

        Raises:
            NotARecordTable: The file has none, or one of another format.
        """
        try:
            described = json.loads((pq.read_metadata(path).metadata or {})[METADATA_KEY])
            if described.pop("format") != FORMAT:
                raise NotARecordTable(f"{path} was exported by another version of semid")
            revision, exported_at = described.pop("revision"), described.pop("exported_at")
            described["codebook_sizes"] = tuple(described["codebook_sizes"])
            return cls(Origin(**described), revision, exported_at)
        except (pa.ArrowInvalid, KeyError, TypeError, json.JSONDecodeError) as error:
            raise NotARecordTable(f"{path} is not a table that semid export wrote") from error


def columns(origin: Origin) -> pa.Schema:
    """The table's columns."""
    return pa.schema(
        [
            ("item_id", pa.string()),
            ("codes", pa.list_(pa.uint16(), len(origin.codebook_sizes))),
            ("suffix", pa.int32()),
            ("semantic_id", pa.string()),
            ("state", pa.string()),
            ("assigned_at", TIME),
            ("retired_at", TIME),
            ("replaced_by", pa.string()),
            ("digest", pa.binary(DIGEST_BYTES)),
            ("content_changed", pa.bool_()),
            (DISPLAY, pa.string()),
            ("tokenizer", pa.string()),
            ("namespace", pa.string()),
        ]
    )


class TableWriter:
    """Writes rows in groups, and at the end what the table is of."""

    def __init__(self, path: Path, origin: Origin) -> None:
        """Begins the file."""
        self._origin = origin
        self._layout = CodeLayout(origin.codebook_sizes)
        self._columns = columns(origin)
        self._writer = pq.ParquetWriter(path, self._columns, compression="zstd")
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self.rows = 0

    def write_items(self, items: Sequence[Held]) -> None:
        """Adds the rows of these items: the ID each holds, then those it held before."""
        if items:
            self.write(_rows(items, self._layout, self._origin, self._columns))

    def write(self, rows: pa.Table) -> None:
        """Adds rows."""
        self._pending.append(rows)
        self._pending_rows += len(rows)
        self.rows += len(rows)
        if self._pending_rows >= ROWS_PER_GROUP:
            self._flush()

    def describe(self, description: Description) -> None:
        """Says what the table is of."""
        self._writer.add_key_value_metadata({METADATA_KEY: description.to_json()})

    def _flush(self) -> None:
        if self._pending_rows:
            self._writer.write_table(pa.concat_tables(self._pending).combine_chunks(), row_group_size=ROWS_PER_GROUP)
        self._pending, self._pending_rows = [], 0

    def close(self) -> None:
        """Writes what is pending, and the file's end."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_groups(path: Path, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows, a bounded number at a time.

    Args:
        path: A table.
        names: Which columns; None for all.
    """
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP, columns=names):
            yield pa.Table.from_batches([batch])


class _Columns:
    """The bytes of rows, column by column; what a row has not is empty."""

    def __init__(self) -> None:
        self.item_ids: list[bytes] = []
        self.states: list[int] = []  # places in STATES
        self.assigned_at: list[bytes] = []
        self.retired_at: list[bytes] = []
        self.ids: list[bytes] = []
        self.replaced_by: list[bytes] = []
        self.digests: list[bytes] = []
        self.changed: list[bool | None] = []
        self.displays: list[bytes] = []

    def add(self, held: Held, width: int) -> None:
        """The rows of an item."""
        item_id, value, former, display = held
        retired, start = b"", 1
        if value[0] & RETIRED:
            retired, start = value[1:5], 5
        current = value[start + 12 :]
        self._add(item_id, 1 if retired else 0, value[start : start + 4], current)
        self.retired_at.append(retired)
        self.replaced_by.append(b"")
        self.digests.append(value[start + 4 : start + 12])
        self.changed.append(bool(value[0] & CONTENT_CHANGED))
        self.displays.append(b"" if retired else display)
        start = 0
        while start < len(former):
            end = former.index(b",", start + 4 + width)
            self._add(item_id, 2, former[start : start + 4], former[start + 4 : end])
            self.retired_at.append(b"")
            self.replaced_by.append(current)
            self.digests.append(b"")
            self.changed.append(None)
            self.displays.append(b"")
            start = end + 1

    def _add(self, item_id: bytes, state: int, assigned_at: bytes, semantic_id: bytes) -> None:
        self.item_ids.append(item_id)
        self.states.append(state)
        self.assigned_at.append(assigned_at)
        self.ids.append(semantic_id)


def _rows(items: Sequence[Held], layout: CodeLayout, origin: Origin, schema: pa.Schema) -> pa.Table:
    """The rows of these items, a column at a time."""
    found = _Columns()
    for held in items:
        found.add(held, layout.width)
    codes, suffixes = _numbers(found.ids, layout)
    return pa.table(
        {
            "item_id": pa.array(found.item_ids, pa.binary()).cast(pa.string()),
            "codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), codes.shape[1]),
            "suffix": pa.array(suffixes),
            "semantic_id": _written(codes, suffixes),
            "state": pa.array(STATES[found.states]),
            "assigned_at": _times(found.assigned_at),
            "retired_at": _times(found.retired_at),
            "replaced_by": _successors(found.replaced_by, layout),
            "digest": pa.array([digest or None for digest in found.digests], pa.binary(DIGEST_BYTES)),
            "content_changed": pa.array(found.changed, pa.bool_()),
            DISPLAY: pa.array([display or None for display in found.displays], pa.binary()).cast(pa.string()),
            "tokenizer": pa.repeat(origin.tokenizer, len(found.ids)),
            "namespace": pa.repeat(origin.namespace, len(found.ids)),
        },
        schema=schema,
    )


def _numbers(packed: Sequence[bytes], layout: CodeLayout) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Packed IDs as codes (N, L) uint16 and suffixes (N,) int32."""
    kind = ">u1" if layout.bytes_per_code == 1 else ">u2"
    codes = np.frombuffer(b"".join(field[: layout.width] for field in packed), dtype=kind)
    suffixes = np.array([int(field[layout.width :]) for field in packed], dtype=np.int32)
    return codes.reshape(-1, len(layout.codebook_sizes)).astype(np.uint16), suffixes


def _written(codes: np.ndarray[Any, Any], suffixes: np.ndarray[Any, Any]) -> pa.Array:
    """IDs in the hyphenated form."""
    numbers = [*(codes[:, level] for level in range(codes.shape[1])), suffixes]
    return pc.binary_join_element_wise(*[pa.array(column).cast(pa.string()) for column in numbers], "-")


def _successors(packed: Sequence[bytes], layout: CodeLayout) -> pa.Array:
    """The same, null where there is none."""
    there = [field for field in packed if field]
    if not there:
        return pa.nulls(len(packed), pa.string())
    written = iter(_written(*_numbers(there, layout)).to_pylist())
    return pa.array([next(written) if field else None for field in packed], pa.string())


def _times(fields: Sequence[bytes]) -> pa.Array:
    """Seconds in 4 bytes as times, null where there are none."""
    missing = np.array([not field for field in fields], dtype=bool)
    seconds = np.frombuffer(b"".join(field or b"\0\0\0\0" for field in fields), dtype=">u4").astype(np.int64)
    return pa.array(seconds * 1000, pa.int64(), mask=missing).cast(TIME)
