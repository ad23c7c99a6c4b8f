"""A record's table -> a record: what is not there is put back, what is there stands, and each refusal has its reason.

table --unreadable rows--> assignments --> record, the present IDs first --what would break a promise--> refusals
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from service.backup.record_table import (
    DISPLAY,
    GONE,
    LIVE,
    REPLACED,
    Description,
    NotARecordTable,
    columns,
    read_groups,
)
from service.errors import MalformedSemanticId
from service.registry.assignment import DIGEST_BYTES, Assignment, write_time
from service.registry.record import Record
from service.registry.restoring import Restored
from service.semantic_id import MAX_SUFFIX, SemanticId

MAX_ITEM_ID_BYTES = 256
ROWS_PER_BATCH = 8192

Progress = Callable[[int, int], None]


class Outcome(NamedTuple):
    """How many IDs were put back, were there already, and were refused."""

    restored: int
    known: int
    refused: int


class Refusals:
    """The rows that were refused, each with its reason, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        """Begins the file."""
        self._file = path.open("w", encoding="utf-8")
        self.count = 0

    def add(self, row: Mapping[str, Any], reason: str) -> None:
        """Notes a row."""
        told = {name: row[name] for name in ("item_id", "semantic_id", "state")}
        self._file.write(json.dumps({**told, "reason": reason}, ensure_ascii=False) + "\n")
        self.count += 1

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


async def restore_table(
    record: Record, path: Path, description: Description, refusals: Refusals, progress: Progress
) -> Outcome:
    """Puts a table's IDs back into a record of the same tokenizer; doing it again changes nothing.

    Args:
        record: Where to.
        path: The table.
        description: What the table says of itself.
        refusals: Gets the rows that are refused.
        progress: Told of the rows done.

    Raises:
        NotARecordTable: The columns are not those of a record's table.
        RegistryUnavailable: The registry cannot be reached; what was put back stays.
    """
    reader = _RowReader(description)
    total = reader.check(path)
    restored = known = done = 0
    for present in (True, False):  # an ID that was replaced needs the one that replaced it
        for rows in reader.rows(path, present=present):
            assignments, readable = [], []
            for row in rows:
                try:
                    assignments.append(reader.assignment(row))
                    readable.append(row)
                except (ValueError, MalformedSemanticId) as error:
                    refusals.add(row, str(error))
            outcomes = await record.restore(assignments)
            await _restore_displays(record, zip(readable, outcomes, strict=True))
            for row, outcome in zip(readable, outcomes, strict=True):
                if outcome.refusal is not None:
                    refusals.add(row, outcome.refusal)
                restored += outcome.created
                known += not outcome.created and outcome.refusal is None
            done += len(rows)
            progress(done, total)
    return Outcome(restored, known, refusals.count)


async def _restore_displays(record: Record, rows: Iterable[tuple[Mapping[str, Any], Restored]]) -> None:
    """Puts back the titles of items that have none; one that an item has stands."""
    told = {row["item_id"].encode(): row[DISPLAY] for row, one in rows if row[DISPLAY] and one.refusal is None}
    known = await record.displays.of(list(told))
    await record.displays.put({item_id: told[item_id] for item_id, own in zip(told, known, strict=True) if own is None})


class _RowReader:
    """Reads a table's rows, each on its own."""

    def __init__(self, description: Description) -> None:
        self._origin = description.origin
        self._columns = columns(self._origin)
        highest = self._origin.max_suffix
        self._max_suffix = MAX_SUFFIX if highest is None else highest

    def check(self, path: Path) -> int:
        """The number of rows, once all of them are known to have these columns."""
        return sum(len(rows) for rows in self._groups(path))

    def rows(self, path: Path, *, present: bool) -> Iterator[Sequence[Mapping[str, Any]]]:
        """The rows of IDs that were replaced, or all others, a bounded number at a time."""
        for rows in self._groups(path):
            replaced = pc.fill_null(pc.equal(rows["state"], REPLACED), False)
            wanted = rows.filter(pc.invert(replaced) if present else replaced)
            for batch in wanted.to_batches(ROWS_PER_BATCH):
                yield batch.to_pylist()

    def _groups(self, path: Path) -> Iterator[pa.Table]:
        try:
            for rows in read_groups(path):
                if DISPLAY not in rows.column_names:
                    rows = rows.append_column(DISPLAY, pa.nulls(len(rows), pa.string()))  # noqa: PLW2901
                table = rows.select(self._columns.names).cast(self._columns)
                table.validate(full=True)
                yield table
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError, OSError) as error:
            raise NotARecordTable(f"{path} has not the columns that semid export writes: {error}") from error

    def assignment(self, row: Mapping[str, Any]) -> Assignment:
        """What a row says.

        Raises:
            ValueError: It says nothing that could be put back; the message says why.
            MalformedSemanticId: The same.
        """
        state = row["state"]
        self._check_origin(row)
        _check(state in {LIVE, GONE, REPLACED}, f"there is no state {state!r}")
        _check(0 < len((row["item_id"] or "").encode()) <= MAX_ITEM_ID_BYTES, "an item id has 1 to 256 bytes")
        _check(row["assigned_at"] is not None, "there is no time of its assignment")
        _check((row["retired_at"] is not None) is (state == GONE), f"retired_at does not fit the state {state!r}")
        _check((row["replaced_by"] is not None) is (state == REPLACED), f"replaced_by does not fit the state {state!r}")
        for time in filter(None, (row["assigned_at"], row["retired_at"])):
            write_time(time)  # else it would fail the whole call
        held = state != REPLACED
        _check(not held or len(row["digest"] or b"") == DIGEST_BYTES, "there is no digest")
        _check(not held or row["content_changed"] is not None, "there is no content_changed")
        sizes = self._origin.codebook_sizes
        return Assignment(
            item_id=row["item_id"],
            semantic_id=self._semantic_id(row),
            assigned_at=row["assigned_at"],
            digest=row["digest"] or bytes(DIGEST_BYTES),
            content_changed=bool(row["content_changed"]),
            retired_at=row["retired_at"],
            replaced_by=None if held else SemanticId.parse(row["replaced_by"], sizes),
        )

    def _check_origin(self, row: Mapping[str, Any]) -> None:
        for name, ours in (("tokenizer", self._origin.tokenizer), ("namespace", self._origin.namespace)):
            _check(row[name] == ours, f"the {name} is {row[name]!r}, that of the table {ours!r}")

    def _semantic_id(self, row: Mapping[str, Any]) -> SemanticId:
        codes, suffix, sizes = row["codes"], row["suffix"], self._origin.codebook_sizes
        _check(codes is not None and None not in codes and suffix is not None, "there are no codes, or no suffix")
        _check(
            all(code < size for code, size in zip(codes, sizes, strict=True)),
            f"the codes {codes} are out of range: the codebook sizes are {list(sizes)}",
        )
        _check(0 <= suffix <= self._max_suffix, f"the suffix {suffix} is above the highest, {self._max_suffix}")
        semantic_id = SemanticId(tuple(codes), suffix)
        _check(row["semantic_id"] == str(semantic_id), f"codes and suffix are those of {semantic_id}")
        return semantic_id


def _check(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - a condition
    if not holds:
        raise ValueError(otherwise)
