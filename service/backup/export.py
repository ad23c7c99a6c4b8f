"""A record -> a file: the whole table, or what a generator reads; at exactly one revision while writes go on.

    revision --> scan of all buckets --> items that changed meanwhile, read again --> table [--> generator's format]

An item is read again for as long as it changes while it is read. When no change since revision R concerns an item that
was last read after R, every item was read as it was at R: the table is the record at R.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from service.backup.record_table import Description, Origin, TableWriter, read_groups
from service.errors import ChangesGone, RegistryUnavailable, SemidError
from service.registry.contents import Held
from service.registry.record import Record

ATTEMPTS = 3
ROUNDS = 1000
CHANGES_PER_READ = 10_000
FOLLOW_INTERVAL_S = 0.5

Progress = Callable[[int, int], None]
"""Told how many of how many there are; the second number is an estimate until the end."""


class NothingToExport(SemidError):
    """The record has no assignment, or there is no such record."""

    title = "There is nothing to export"


class _Cut(NamedTuple):
    """At which revision a scan became exact, and the items that are not as the scan saw them."""

    revision: int
    changed: dict[bytes, Held]


async def export_table(record: Record, origin: Origin, path: Path, progress: Progress) -> Description:
    """Writes a record's table; the file appears when it is whole.

    Args:
        record: What is exported.
        origin: What the table says that it is of.
        path: The Parquet file.
        progress: Told of the items read.

    Returns:
        What the file says of itself.

    Raises:
        NothingToExport: The record is empty.
        RegistryUnavailable: The registry cannot be reached, or changes faster than it can be read.
    """
    for _ in range(ATTEMPTS):
        try:
            with draft(path) as whole:
                return await _export(record, origin, whole, progress)
        except ChangesGone:
            continue
    msg = "The record changes faster than it can be read: keep more changes (SID_CHANGES_KEPT)."
    raise RegistryUnavailable(msg)


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file of another name, which gets its own when it is whole and vanishes when writing fails."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
        unfinished = Path(file.name)
    try:
        yield unfinished
        unfinished.chmod(0o644)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


async def _export(record: Record, origin: Origin, path: Path, progress: Progress) -> Description:
    with draft(path) as scanned:
        with TableWriter(scanned, origin) as table:
            revision, changed = await _scan(record, table, progress)
            if not revision:
                raise NothingToExport(
                    f"nothing was ever assigned in namespace {origin.namespace!r} under {origin.tokenizer}"
                )
            cut = await _cut(record, revision, changed)
            await record.settle()
            description = Description(origin, cut.revision, datetime.now(UTC).isoformat(timespec="seconds"))
            table.describe(description)
        if cut.changed:
            await asyncio.to_thread(_replace, scanned, cut.changed, description)
    return description


async def _scan(record: Record, table: TableWriter, progress: Progress) -> tuple[int, set[bytes]]:
    """Writes all items; returns a revision, and which items changed up to there since the scan began."""
    follower = _Follower(record, await record.changes.revision())
    if follower.revision:  # else there is nothing, and no bucket to look for it in
        items = 0
        async for part in record.contents.scan():
            await asyncio.to_thread(table.write_items, part.items)
            items += len(part.items)
            progress(items, items * part.buckets // part.buckets_read)
            await follower.look()
        await follower.catch_up()
    return follower.revision, follower.changed


class _Follower:
    """Follows the changes during a scan, so that not all of them need be kept until its end."""

    def __init__(self, record: Record, revision: int) -> None:
        self.revision = revision
        self.changed: set[bytes] = set()
        self._record = record
        self._next = 0.0

    async def look(self) -> None:
        """Catches up, where that is long ago."""
        if asyncio.get_running_loop().time() >= self._next:
            await self.catch_up()
            self._next = asyncio.get_running_loop().time() + FOLLOW_INTERVAL_S

    async def catch_up(self) -> None:
        """Reads all changes that there are."""
        self.revision, changed = await _changed_after(self._record, self.revision)
        self.changed |= changed


async def _changed_after(record: Record, revision: int) -> tuple[int, set[bytes]]:
    """Which items changed after a revision, and up to which.

    Raises:
        ChangesGone: The changes are no longer kept.
    """
    items: set[bytes] = set()
    while True:
        changes = (await record.changes.after(revision, CHANGES_PER_READ)).changes
        items.update(change.item_id.encode() for change in changes)
        revision = changes[-1].revision if changes else revision
        if len(changes) < CHANGES_PER_READ:
            return revision, items


async def _cut(record: Record, revision: int, changed: set[bytes]) -> _Cut:
    """Reads what changed again, until it was all read as it was at one revision."""
    fresh: dict[bytes, Held] = {}
    for _ in range(ROUNDS):
        fresh.update((held.item_id, held) for held in await record.contents.of(list(changed)))
        later, changed_since = await _changed_after(record, revision)
        if changed.isdisjoint(changed_since):
            return _Cut(revision, fresh)
        revision, changed = later, changed_since
    msg = "The same items change faster than they can be read: export again when there is less to do."
    raise RegistryUnavailable(msg)


def _replace(path: Path, changed: dict[bytes, Held], description: Description) -> None:
    """Writes a table anew with these items as they are now."""
    ids = pa.array(list(changed), pa.binary()).cast(pa.string())
    with draft(path) as whole, TableWriter(whole, description.origin) as table:
        for rows in read_groups(path):
            table.write(rows.filter(pc.invert(pc.is_in(rows["item_id"], value_set=ids))))
        table.write_items(list(changed.values()))
        table.describe(description)
