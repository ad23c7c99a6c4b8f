"""What a backfill is of: files, cut into blocks of rows. It is the same on every machine and for every engine.

files --> blocks --engine--> codes of each, sorted --> one order over all --> claims --> a part for each block
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from models.catalogue import FIELDS
from service.backfill.files import SourceFile, find_files, look_at, open_parquet

logger = logging.getLogger(__name__)

INPUT_ORDER = "input"
TEXTS = frozenset({*FIELDS, "text"})
EMBEDDING = "embedding"


class Kind(StrEnum):
    """What the files hold; of embeddings a block is encoded in seconds, of texts in minutes."""

    EMBEDDINGS = "embeddings"
    TEXTS = "texts"

    @property
    def block_rows(self) -> int:
        """How many rows a block has where nobody says."""
        return 65_536 if self is Kind.EMBEDDINGS else 8_192


class Columns(NamedTuple):
    """Which columns are read.

    Attributes:
        read: All of them.
        order_by: By whose values items of equal codes get their suffixes; `input`: by their rows.
        order_type: What these values are sorted as; None of `input`.
        display: That of the titles; None where none are kept.
    """

    read: tuple[str, ...]
    order_by: str = INPUT_ORDER
    order_type: pa.DataType | None = None
    display: str | None = None


class Block(NamedTuple):
    """Rows of one file that are encoded together; what a kill loses at most, and what has an output of its own.

    Attributes:
        number: From 0, in the order of the files.
        file: Where they are.
        start: Its first row, by the file's own count from 0.
        rows: How many.
        first: Its first row, by the count over all files.
    """

    number: int
    file: SourceFile
    start: int
    rows: int
    first: int


class Plan(NamedTuple):
    """Files and their blocks.

    Attributes:
        files: In their order.
        kind: What is tokenized of them.
        columns: Those that are read.
        block_rows: Rows of a block, at most.
        blocks: In their order.
    """

    files: tuple[SourceFile, ...]
    kind: Kind
    columns: Columns
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
            "content": self.kind,
            "order_by": self.columns.order_by,
            "display": self.columns.display,
            "block_rows": self.block_rows,
        }


def make_plan(
    paths: Sequence[str],
    *,
    content: Kind | None = None,
    takes_text: bool = True,
    order_by: str = INPUT_ORDER,
    display: str | None = None,
    block_rows: int | None = None,
    out: str | None = None,
) -> Plan:
    """The plan for these paths; reads no more than what the files say of themselves.

    Args:
        paths: See `find_files`.
        content: What is tokenized of files that have both; where None texts, if the tokenizer takes any.
        takes_text: Whether it does.
        order_by: See `Columns`.
        display: See `Columns`.
        block_rows: Rows of a block, at most; by the kind where None.
        out: Where the table goes, if there is to be one.

    Raises:
        ValueError: Files are missing, cannot be read, have not the columns that are needed, all the same, or lie where
            the table goes.
    """
    found = find_files(paths)
    if out is not None:
        _keep_apart(paths, found, out)
    files = [look_at(path) for path in found]
    rows: list[int] = []
    schemas: dict[str, pa.Schema] = {}
    for path in found:
        with open_parquet(path) as parquet:
            rows.append(parquet.metadata.num_rows)
            schemas[path] = parquet.schema_arrow
    kind = _kind(schemas, content, takes_text=takes_text)
    columns = Columns(_read(schemas, kind, order_by, display), order_by, _order_type(schemas, order_by), display)
    block_rows = block_rows or kind.block_rows
    return Plan(tuple(files), kind, columns, block_rows, tuple(_blocks(files, rows, block_rows)))


def _keep_apart(paths: Sequence[str], files: Sequence[str], out: str) -> None:
    """Raises ValueError where the table's parts would be read as items, or be written over what is read."""
    place = _place(out)
    around = [path for path in paths if place.is_relative_to(_place(path))]
    within = [path for path in files if _place(path).is_relative_to(place)]
    for path in (*around, *within):
        raise ValueError(f"{path} is read, so the table cannot go to {out}: name a directory apart from it by --out")


def _place(path: str) -> PurePath:
    """Where something lies; an object store's places lie in no directory of this machine."""
    scheme, _, inner = path.partition("://")
    if not inner or scheme == "file":
        return Path(inner or path).resolve()
    return PurePath(scheme, *inner.partition("?")[0].split("/"))


def _blocks(files: Sequence[SourceFile], rows: Sequence[int], block_rows: int) -> list[Block]:
    blocks: list[Block] = []
    first = 0
    for file, in_file in zip(files, rows, strict=True):
        for start in range(0, in_file, block_rows):
            size = min(block_rows, in_file - start)
            blocks.append(Block(len(blocks), file, start, size, first + start))
        first += in_file
    return blocks


def _kind(schemas: Mapping[str, pa.Schema], content: Kind | None, *, takes_text: bool) -> Kind:
    """What is tokenized of the files: it is in all of them."""
    common = set(Kind)
    for path, schema in schemas.items():
        names = set(schema.names)
        there = {kind for kind, of_it in ((Kind.TEXTS, TEXTS), (Kind.EMBEDDINGS, {EMBEDDING})) if names & of_it}
        if "item_id" not in names or not there:
            wanted = f"item_id, and embedding or some of {', '.join(sorted(TEXTS))}"
            raise ValueError(f"{path} has not the columns {wanted}; its columns are {schema.names}")
        common &= there
    if content is not None and content not in common:
        raise ValueError(f"not all of these files have {content}")
    if not common:
        raise ValueError("some files hold embeddings and others texts: backfill them one after the other")
    if content is None and len(common) == 2:
        content, other = (Kind.TEXTS, Kind.EMBEDDINGS) if takes_text else (Kind.EMBEDDINGS, Kind.TEXTS)
        logger.warning("The files have both: %s are tokenized; with --content %s the others would be", content, other)
    return content or common.pop()


def _read(schemas: Mapping[str, pa.Schema], kind: Kind, order_by: str, display: str | None) -> tuple[str, ...]:
    """The columns that are read: of texts those that some files have, of all others each file's."""
    needed = {"item_id", order_by, display} - {INPUT_ORDER, None}
    read = set(needed)
    for path, schema in schemas.items():
        for name in sorted(map(str, needed - set(schema.names))):
            raise ValueError(f"{path} has no column {name!r}; its columns are {schema.names}")
        item_id = schema.field("item_id").type
        if not (pa.types.is_integer(item_id) or is_string(item_id)):
            raise ValueError(f"{path}, item_id: expected strings or integers, got {item_id}")
        if display is not None and not is_string(schema.field(display).type):
            raise ValueError(f"{path}, {display}: titles are strings, got {schema.field(display).type}")
        read |= TEXTS & set(schema.names) if kind is Kind.TEXTS else {EMBEDDING}
    return tuple(sorted(map(str, read)))


def _order_type(schemas: Mapping[str, pa.Schema], order_by: str) -> pa.DataType | None:
    """The type that the column's values are sorted as, in all files; None of `input`."""
    if order_by == INPUT_ORDER:
        return None
    kinds = {path: schema.field(order_by).type for path, schema in schemas.items()}
    sorted_as = {path: _sorted_as(kind) for path, kind in kinds.items()}
    for path in (path for path, kind in sorted_as.items() if kind is None):
        raise ValueError(f"{path}, {order_by}: values of {kinds[path]} have no order here")
    if len(set(sorted_as.values())) > 1:
        raise ValueError(
            f"the column {order_by} is of several types: {', '.join(sorted(set(map(str, sorted_as.values()))))}"
        )
    (order_type,) = set(sorted_as.values())
    return pa.int64() if pa.types.is_temporal(order_type) else order_type


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
