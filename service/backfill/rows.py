"""The rows of blocks, read in bounded memory from a file that stays the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from service.backfill.files import look_at, open_parquet
from service.backfill.plan import Block


class RowReader:
    """Reads blocks.

    It keeps its place in a file: blocks of one row group that follow each other are decoded once, not from the group's
    beginning each.

    Args:
        columns: Those that are read; a file may lack some.
        together: Rows of a batch, at most.
    """

    def __init__(self, columns: Sequence[str], together: int) -> None:
        self._columns = columns
        self._together = together
        self._file: pq.ParquetFile | None = None
        self._path = ""  # of this file
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._at = 0  # the next row of the file

    def rows(self, block: Block) -> Iterator[pa.RecordBatch]:
        """The rows of a block, in order.

        Raises:
            ValueError: The file cannot be read, or is not that of the plan any more, which shows at the end of a block.
        """
        try:
            self._go_to(block)
            missing = block.rows
            while missing:
                batch = self._next(missing)
                missing -= len(batch)
                yield batch
            _require_same(block)
        except (OSError, pa.ArrowException, StopIteration) as error:
            self.close()
            _require_same(block)
            raise ValueError(f"{block.file.path} cannot be read from row {block.start} on: {error!r}") from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close(force=True)
            self._file, self._path = None, ""

    def _go_to(self, block: Block) -> None:
        if block.file.path != self._path:
            self.close()
            _require_same(block)
            self._file, self._path = open_parquet(block.file.path), block.file.path
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


def _require_same(block: Block) -> None:
    """Raises ValueError where the file is another than that of the plan."""
    if look_at(block.file.path) != block.file:
        raise ValueError(f"{block.file.path} was changed or replaced after the backfill of it began")
