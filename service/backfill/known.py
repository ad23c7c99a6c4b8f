"""What a record knows of a block's items before they are encoded: content that it knows costs no forward pass.

    item ids of a block --record--> digest and codes of each item --a file--> the worker, which compares digests

The codes of unchanged content are those that the model would give it (P4): what a worker writes is the same without
them. An item whose latest content has other codes than its ID is not among them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service.backfill.code_files import packed_column, read_arrow, unpacked, write_arrow
from service.backfill.plan import Block
from service.backfill.rows import RowReader
from service.opening import Patience
from service.registry import Record
from service.registry.assignment_columns import pack
from service.semantic_id import CodeLayout

ROWS_TOGETHER = 65_536

_COLUMNS = ("known", "digest", "codes")


def known_path(directory: Path, block: int) -> Path:
    """The file of a block."""
    return directory / f"{block:06}.known"


class KnownCodes:
    """Digests and codes of a block's items, where the record knows them.

    Args:
        path: The file; where there is none, nothing is known.
        layout: Of the tokenizer.
    """

    def __init__(self, path: Path, layout: CodeLayout) -> None:
        self._layout = layout
        self._rows = read_arrow(path) if path.exists() else None

    def of(self, first: int, digests: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Which of these contents (n,), from a row of the block on, are known, and their codes (n, L)."""
        if self._rows is None:
            shape = len(digests), len(self._layout.codebook_sizes)
            return np.zeros(shape[0], np.bool_), np.zeros(shape, np.int32)
        rows = self._rows.slice(first, len(digests))
        same = rows["known"].to_numpy() & (rows["digest"].to_numpy() == digests)
        return same, unpacked(rows["codes"], self._layout)


async def recall(record: Record, reader: RowReader, block: Block, path: Path, patience_s: float) -> None:
    """Writes what the record knows of a block's items, if it knows any.

    Args:
        record: Is asked.
        reader: Of the column `item_id`.
        block: Whose items.
        path: The file.
        patience_s: How long a registry that is away is waited for.

    Raises:
        RegistryUnavailable: It was away for longer.
        ValueError: As `RowReader.rows`.
    """
    parts: list[pa.Table] = []
    for rows in reader.rows(block):
        item_ids = rows["item_id"].cast(pa.string()).cast(pa.binary()).fill_null(b"").to_pylist()
        held = await Patience(patience_s).answer(partial(record.held, item_ids))
        known = held.live & ~held.content_changed
        codes = np.where(known[:, None], held.codes, 0)
        columns = [pa.array(known), pa.array(held.digests), packed_column(pack(codes, record.layout))]
        parts.append(pa.table(columns, names=_COLUMNS))
    table = pa.concat_tables(parts).combine_chunks()
    if table["known"].to_numpy().any():
        write_arrow(path, table)
