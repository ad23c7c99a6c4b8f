"""A block's codes and what its items hold -> a part of the table, in the block's own order; and what was rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.whole_files import write_whole
from service.backfill.code_files import CodeFile, read_arrow, unpacked
from service.backfill.journal import REJECTED, Journal, part_name
from service.backfill.plan import Block
from service.backfill.sorting import Slices
from service.semantic_id import CodeLayout
from service.table import COLUMNS

ROW_GROUP = 65_536


class Table:
    """The parts of one table.

    Args:
        journal: Where all of it is.
        slices: Where the blocks' rows stand in the runs.
        layout: Of the tokenizer.
        origin: Whose IDs these are: the metadata of each part.
    """

    def __init__(self, journal: Journal, slices: Slices, layout: CodeLayout, origin: dict[str, str]) -> None:
        self._journal = journal
        self._slices = slices
        self._layout = layout
        self._schema = COLUMNS.with_metadata(origin)

    def write(self, block: Block) -> None:
        """Writes a block's part, and before it what was rejected of it."""
        codes = CodeFile.open(self._journal.code_file(block.number))
        rows, failed = codes.rows.slice(0, codes.valid), codes.rows.slice(codes.valid)
        held = self._held(block.number)
        if held is not None and held["error"].null_count < len(held):
            wrong = pc.is_valid(held["error"])
            unplaced = rows.filter(wrong).select(["row", "item_id"]).append_column("error", held["error"].filter(wrong))
            failed = pa.concat_tables([failed.select(["row", "item_id", "error"]), unplaced])
            rows, held = rows.filter(pc.invert(wrong)), held.filter(pc.invert(wrong))
        self._write_rejected(block, failed)
        self._write_part(block, rows, held)

    def _held(self, block: int) -> pa.Table | None:
        """What the valid rows of a block hold, in the order of its codes; None where there are none."""
        parts = []
        for run, first, count in self._slices.of(block):
            parts.append(read_arrow(self._journal.claim_file(run)).slice(first, count))
        return pa.concat_tables(parts) if parts else None

    def _write_part(self, block: Block, rows: pa.Table, held: pa.Table | None) -> None:
        if held is None:
            table = self._schema.empty_table()
        else:
            order = pc.sort_indices(rows["row"])
            held = held.take(order).combine_chunks()
            table = pa.table(
                [
                    rows["item_id"].take(order).combine_chunks(),
                    *_written(held, self._layout),
                    held["suffix"].cast(pa.int32()),
                    held["created"],
                    held["content_changed"],
                ],
                schema=self._schema,
            )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
        self._journal.out.write(part_name(block.number), sink.getvalue().to_pybytes())

    def _write_rejected(self, block: Block, failed: pa.Table) -> None:
        lines = [json.dumps(_told(block, row), ensure_ascii=False) + "\n" for row in failed.sort_by("row").to_pylist()]
        write_whole(self._journal.rejected_file(block.number), "".join(lines))


class Counts(NamedTuple):
    """Of a whole backfill."""

    written: int
    created: int
    rejected: int


def finish(journal: Journal, blocks: Sequence[Block], runs: Sequence[int]) -> Counts:
    """Writes what was rejected of all blocks into one file, if anything was, and counts."""
    rejected = created = 0
    of_blocks = [journal.rejected_file(block.number) for block in blocks]
    if any(path.stat().st_size for path in of_blocks):
        with journal.out.writing(REJECTED) as file:
            for path in of_blocks:
                lines = path.read_bytes()
                rejected += lines.count(b"\n")
                file.write(lines)
    for run in runs:
        held = read_arrow(journal.claim_file(run))
        created += pc.sum(pc.and_(held["created"], pc.is_null(held["error"]))).as_py()
    return Counts(sum(block.rows for block in blocks) - rejected, created, rejected)


def _written(held: pa.Table, layout: CodeLayout) -> tuple[pa.Array, pa.Array]:
    """The Semantic IDs and the codes."""
    levels, codes = len(layout.codebook_sizes), unpacked(held["codes"], layout)
    numbers = [pa.array(level).cast(pa.string()) for level in np.ascontiguousarray(codes.T)]
    joined = pc.binary_join_element_wise(*numbers, held["suffix"].combine_chunks().cast(pa.string()), "-")
    offsets = pa.array(np.arange(0, codes.size + 1, levels, dtype=np.int32))
    return joined, pa.ListArray.from_arrays(offsets, pa.array(codes.reshape(-1)))


def _told(block: Block, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": block.file.path,
        "row": row["row"] - block.first + block.start + 1,
        "item_id": row["item_id"],
        **row["error"],
    }
