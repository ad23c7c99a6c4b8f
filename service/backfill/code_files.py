"""The codes of a block on disk: an Arrow file, sorted, mapped into memory and read in slices.

A file has a row for each row of its block. First come the valid ones, by their codes, then the order that was asked
for, then their rows: the order in which suffixes are issued. Behind them come those that failed, with their errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.whole_files import write_whole
from service.semantic_id import CodeLayout

ERROR = pa.struct([(name, pa.string()) for name in ("type", "title", "detail")])
Failure = tuple[int, str | None, Mapping[str, str]]
"""Row, item id, error."""

SORT_KEYS = [(name, "ascending", "at_end") for name in ("codes", "order", "row")]


def path_of(directory: Path, block: int) -> Path:
    """The file of a block."""
    return directory / f"{block:06}.arrow"


class CodeFile(NamedTuple):
    """A mapped file.

    Attributes:
        rows: `row` by the count over all files, `item_id`, `digest` of its content, packed `codes`, `order`, `display`,
            `error`.
        valid: How many rows have codes; they come first.
    """

    rows: pa.Table
    valid: int

    @classmethod
    def open(cls, path: Path) -> CodeFile:
        """The file; the system reads what is looked at.

        Raises:
            ValueError: As `read_arrow`.
        """
        rows = read_arrow(path)
        return cls(rows, int(rows.schema.metadata[b"valid"]))

    def keys(self) -> NDArray[np.bytes_]:
        """The packed codes (n,) of the valid rows, which compare as the codes do."""
        column = self.rows["codes"].combine_chunks()
        width = column.type.byte_width
        return np.frombuffer(column.buffers()[1], f"S{width}", self.valid, column.offset * width)

    def key(self, place: int) -> tuple[Any, ...]:
        """What a valid row is sorted by behind its codes: in Python's order as in Arrow's, nothing last."""
        order = self.rows["order"][place].as_py() if self.rows["order"].type != pa.null() else None
        return (order is None, 0 if order is None else order, self.rows["row"][place].as_py())


def read_arrow(path: Path) -> pa.Table:
    """A file of the journal, mapped.

    Raises:
        ValueError: It is damaged, which no kill does.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as batches:
            return batches.read_all()
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the same command makes it again") from error


def write_arrow(path: Path, table: pa.Table) -> None:
    """Writes what `read_arrow` reads, whole or not at all."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    write_whole(path, sink.getvalue())


def write_code_file(
    path: Path,
    columns: Mapping[str, pa.ChunkedArray | pa.Array],
    failures: Sequence[Failure],
    width: int,
) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: The file.
        columns: Of the valid rows, in any order: all but `error`.
        failures: Of the others.
        width: Of packed codes.
    """
    valid = pa.table({**columns, "error": pa.nulls(len(columns["row"]), ERROR)})
    keys = [key for key in SORT_KEYS if valid[key[0]].type != pa.null()]
    valid = valid.take(pc.sort_indices(valid, sort_keys=keys))
    failed = pa.table(
        {
            "row": pa.array([row for row, _, _ in failures], pa.int64()),
            "item_id": pa.array([item_id for _, item_id, _ in failures], pa.string()),
            "digest": pa.array(np.zeros(len(failures), np.uint64)),
            "codes": pa.array([bytes(width)] * len(failures), pa.binary(width)),
            **{name: pa.nulls(len(failures), valid[name].type) for name in ("order", "display")},
            "error": pa.array([error for _, _, error in failures], ERROR),
        }
    )
    rows = pa.concat_tables([valid, failed]).combine_chunks()
    write_arrow(path, rows.replace_schema_metadata({"valid": str(len(valid))}))


def unpacked(column: pa.ChunkedArray, layout: CodeLayout) -> NDArray[np.int32]:
    """Codes (n, L) of packed ones."""
    packed = column.combine_chunks()
    numbers = np.frombuffer(packed.buffers()[1], f">u{layout.bytes_per_code}").reshape(-1, len(layout.codebook_sizes))
    return numbers[packed.offset : packed.offset + len(packed)].astype(np.int32)


def packed_column(packed: NDArray[np.uint8]) -> pa.Array:
    """Packed codes (B, width) as a column."""
    data = pa.py_buffer(np.ascontiguousarray(packed))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(packed.shape[1]), len(packed), [None, data])
