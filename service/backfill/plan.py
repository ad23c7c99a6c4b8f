"""What a backfill is of: files, cut into blocks of rows. It is the same on every machine and for every engine.

files --> blocks --engine--> codes of each, sorted --> one order over all --> claims --> a part for each block
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from models.catalogue import FIELDS
from service.backfill.files import SourceFile, find_files, open_parquet

INPUT_ORDER = "input"


class Kind(StrEnum):
    """What the files hold; of embeddings a block is encoded in seconds, of texts in minutes."""

    EMBEDDINGS = "embeddings"
    TEXTS = "texts"

    @property
    def block_rows(self) -> int:
        """How many rows a block has where nobody says."""
        return 65_536 if self is Kind.EMBEDDINGS else 8_192


class Block(NamedTuple):
    """Rows of one file that are encoded together; what a kill loses at most, and what has an output of its own.

    Attributes:
        number: From 0, in the order of the files.
        path: The file's.
        start: Its first row, by the file's own count from 0.
        rows: How many.
        first: Its first row, by the count over all files.
    """

    number: int
    path: str
    start: int
    rows: int
    first: int


class Plan(NamedTuple):
    """Files and their blocks.

    Attributes:
        files: In their order.
        kind: What they hold.
        columns: Those that are read.
        order_by: A column by whose values items of equal codes get their suffixes; `input`: by their rows.
        order_type: What these values are sorted as; None of `input`.
        block_rows: Rows of a block, at most.
        blocks: In their order.
    """

    files: tuple[SourceFile, ...]
    kind: Kind
    columns: tuple[str, ...]
    order_by: str
    order_type: pa.DataType | None
    block_rows: int
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(block.rows for block in self.blocks)

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be gone on with, as JSON."""
        return {
            "files": [list(file) for file in self.files],
            "order_by": self.order_by,
            "block_rows": self.block_rows,
        }


def make_plan(
    paths: Sequence[str], *, order_by: str = INPUT_ORDER, block_rows: int | None = None, out: Path | None = None
) -> Plan:
    """The plan for these paths; reads no more than what the files say of themselves.

    Args:
        paths: See `find_files`.
        order_by: See `Plan`.
        block_rows: Rows of a block, at most; by the kind where None.
        out: The directory of the table, where there is to be one.

    Raises:
        ValueError: Files are missing, cannot be read, have not the columns that are needed, all the same, or lie where
            the table goes.
    """
    files = find_files(paths)
    if out is not None:
        _keep_apart(paths, files, out)
    rows, of_columns = [], []
    for file in files:
        with open_parquet(file.path) as parquet:
            rows.append(parquet.metadata.num_rows)
            of_columns.append(_columns(file.path, parquet.schema_arrow, order_by))
    kinds = {kind for kind, _, _ in of_columns}
    orders = {order for _, _, order in of_columns}
    if len(kinds) > 1:
        raise ValueError("some files hold embeddings and others texts: backfill them one after the other")
    if len(orders) > 1:
        raise ValueError(f"the column {order_by} is of several types: {', '.join(sorted(map(str, orders)))}")
    (kind,), (order_type,) = kinds, orders
    if order_type is not None and pa.types.is_temporal(order_type):
        order_type = pa.int64()
    block_rows = block_rows or kind.block_rows
    columns = tuple(sorted({name for _, names, _ in of_columns for name in names}))
    blocks = tuple(_blocks(files, rows, block_rows))
    return Plan(tuple(files), kind, columns, order_by, order_type, block_rows, blocks)


def _keep_apart(paths: Sequence[str], files: Sequence[SourceFile], out: Path) -> None:
    """Raises ValueError where the table's parts would be read as items, or be written over what is read."""
    place = out.resolve()
    around = [path for path in paths if "://" not in path and place.is_relative_to(Path(path).resolve())]
    within = [file.path for file in files if "://" not in file.path and Path(file.path).resolve().is_relative_to(place)]
    for path in (*around, *within):
        raise ValueError(f"{path} is read, so the table cannot go to {out}: name a directory apart from it by --out")


def _blocks(files: Sequence[SourceFile], rows: Sequence[int], block_rows: int) -> list[Block]:
    blocks: list[Block] = []
    first = 0
    for file, in_file in zip(files, rows, strict=True):
        for start in range(0, in_file, block_rows):
            size = min(block_rows, in_file - start)
            blocks.append(Block(len(blocks), file.path, start, size, first + start))
        first += in_file
    return blocks


def _columns(path: str, schema: pa.Schema, order_by: str) -> tuple[Kind, frozenset[str], pa.DataType | None]:
    """What a file holds, which of its columns are read, and the type that its order is sorted as."""
    names = set(schema.names)
    texts = names & {*FIELDS, "text"}
    if "item_id" not in names or not (texts or "embedding" in names):
        wanted = f"item_id, and embedding or some of {', '.join(sorted({*FIELDS, 'text'}))}"
        raise ValueError(f"{path} has not the columns {wanted}; its columns are {schema.names}")
    item_id = schema.field("item_id").type
    if not (pa.types.is_integer(item_id) or is_string(item_id)):
        raise ValueError(f"{path}, item_id: expected strings or integers, got {item_id}")
    kind = Kind.TEXTS if texts else Kind.EMBEDDINGS
    read = {"item_id", *(texts or {"embedding"})}
    if order_by == INPUT_ORDER:
        return kind, frozenset(read), None
    if order_by not in names:
        raise ValueError(f"{path} has no column {order_by!r} to order by; its columns are {schema.names}")
    order_type = _sorted_as(schema.field(order_by).type)
    if order_type is None:
        raise ValueError(f"{path}, {order_by}: values of {schema.field(order_by).type} have no order here")
    return kind, frozenset(read | {order_by}), order_type


def is_string(kind: pa.DataType) -> bool:
    """Whether these are strings, however they are kept."""
    if pa.types.is_dictionary(kind):
        return is_string(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _sorted_as(kind: pa.DataType) -> pa.DataType | None:
    """The type that values are compared as, one for all files of a catalogue; None where they have no order here.

    Times stay what they are, since numbers of seconds and of days do not compare.
    """
    if is_string(kind):
        return pa.string()
    if pa.types.is_uint64(kind):
        return pa.uint64()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return pa.int64()
    if pa.types.is_temporal(kind):
        return pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind
    return pa.float64() if pa.types.is_floating(kind) else None
