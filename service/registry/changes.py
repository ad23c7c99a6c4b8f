"""What was assigned, retired and replaced, in order: the feed that keeps a decoder's trie fresh."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple

from service.errors import ChangesGone, Overloaded, RegistryOlder, RegistryUnavailable
from service.registry.assignment import read_holder, read_semantic_id, write_semantic_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from service.registry.history import History
    from service.registry.keys import RecordKeys
    from service.semantic_id import CodeLayout, SemanticId

    Holders = Callable[[Sequence[bytes]], Awaitable[list[bytes | None]]]

CHANGES_PER_CALL = 2048  # a call has at most 1024 requests, and each changes at most two IDs
LOOK_INTERVAL_S = 0.1
MAX_FOLLOWERS = 1024
KINDS = {b"A": "assigned", b"B": "returned", b"D": "retired", b"R": "replaced"}


class Change(NamedTuple):
    """One change of the record.

    Attributes:
        revision: Its number; the next change has the next one.
        kind: `assigned` or `returned`, and the ID is live now; `retired` or `replaced`, and it is no longer.
        item_id: Whose.
        semantic_id: Which came, or went.
        replaced_by: Which came instead, where it was replaced; that one has its own change.
    """

    revision: int
    kind: str
    item_id: str
    semantic_id: SemanticId
    replaced_by: SemanticId | None

    @property
    def live(self) -> bool:
        """Whether the ID came."""
        return self.kind in {"assigned", "returned"}


class Changes(NamedTuple):
    """Changes in order, and the record's revision when they were read."""

    revision: int
    changes: list[Change]


class ChangeLog:
    """The latest changes of one record."""

    def __init__(
        self, history: History, keys: RecordKeys, settle: Callable[[], Awaitable[None]], holders: Holders
    ) -> None:
        """Reads the log; `settle` returns when what was read is durable, `holders` tells what stands for packed IDs."""
        self._history = history
        self._keys = keys
        self._settle = settle
        self._holders = holders
        self._watch = RevisionWatch(self.revision)

    async def revision(self) -> int:
        """The number of changes so far.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        (revision,) = await self._history.read([("HGET", self._keys.meta, b"revision")])
        return int(revision or 0)

    def revised(self, revision: int) -> None:
        """This process has just made that revision: who follows need not wait for the next look."""
        self._watch.see(revision)

    async def after(self, revision: int, limit: int, wait_s: float = 0.0, epoch: bytes | None = None) -> Changes:
        """The changes after a revision, at most `limit`; where there are none, those that come within `wait_s`.

        Raises:
            ChangesGone: They are no longer kept, the record is not as far, or `epoch` is given and its is another.
            Overloaded: Too many wait already.
            RegistryUnavailable: The server cannot be reached.
        """
        if epoch is not None and epoch != self._history.epoch:
            detail = f"revision {revision} is of another epoch of this record, which was cut short"
            raise ChangesGone(detail, await self.revision())
        found = await self._read(revision, limit)
        if not found.changes and wait_s > 0:
            await self._watch.beyond(revision, wait_s)
            found = await self._read(revision, limit)
        return found

    async def _read(self, after: int, limit: int) -> Changes:
        # An entry has the revision of its last change: the one that holds `after + limit` may be that much further.
        last = after + limit + CHANGES_PER_CALL - 1
        latest, entries = await self._history.read(
            [
                ("HGET", self._keys.meta, b"revision"),
                ("XRANGE", self._keys.changes, f"{after + 1}-0", f"{last}-0"),
            ]
        )
        latest = int(latest or 0)
        rows = [row for entry, fields in entries for row in rows_of(entry, fields[b"c"], self._keys.layout)]
        first = rows[0].revision if rows else latest + 1
        if first > after + 1 or after > latest:
            detail = f"the changes after revision {after} cannot be told; the record is at {latest}"
            raise ChangesGone(detail, latest)
        wanted = [row for row in rows if row.revision > after][:limit]
        if wanted:
            await self._settle()
        return Changes(max(latest, wanted[-1].revision if wanted else 0), await self._with_items(wanted))

    async def _with_items(self, rows: Sequence[Row]) -> list[Change]:
        """An ID names its item for good, so the log need not."""
        fields = [write_semantic_id(row.semantic_id, self._keys.layout) for row in rows]
        holders = await self._holders(fields)
        if lost := holders.count(None):
            self._history.lost_a_part(lost)
        return [
            Change(row.revision, row.kind, read_holder(holder)[0].decode(), row.semantic_id, row.replaced_by)
            for row, holder in zip(rows, holders, strict=True)
            if holder is not None
        ]


class RevisionWatch:
    """Wakes all who wait for a revision, by one look in `LOOK_INTERVAL_S` however many they are."""

    def __init__(self, look: Callable[[], Awaitable[int]]) -> None:
        """Looks by `look`."""
        self._look = look
        self._latest = 0
        self._changed = asyncio.Event()
        self._waiting = 0
        self._looker: asyncio.Task[None] | None = None

    def see(self, revision: int) -> None:
        """The record is at this revision."""
        if revision != self._latest:
            self._latest = revision
            self._changed.set()
            self._changed = asyncio.Event()

    async def beyond(self, revision: int, wait_s: float) -> None:
        """Returns when the record is beyond the revision, or after `wait_s`.

        Raises:
            Overloaded: Too many wait already.
        """
        if self._waiting >= MAX_FOLLOWERS:
            raise Overloaded(f"{self._waiting} followers wait already")
        self._waiting += 1
        if self._looker is None:
            self._looker = asyncio.create_task(self._keep_looking(), name="registry-revision")
        try:
            async with asyncio.timeout(wait_s):
                while self._latest <= revision:
                    await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1

    async def _keep_looking(self) -> None:
        try:
            while self._waiting:
                with contextlib.suppress(RegistryUnavailable, RegistryOlder):  # said to each who waits, when it reads
                    self.see(await self._look())
                await asyncio.sleep(LOOK_INTERVAL_S)
        finally:
            self._looker = None


class Row(NamedTuple):
    """A change as the log has it, which does not name the item."""

    revision: int
    kind: str
    semantic_id: SemanticId
    replaced_by: SemanticId | None


def rows_of(entry: bytes, packed: bytes, layout: CodeLayout) -> list[Row]:
    """The changes of one entry of the stream; its id tells the revision of the last."""
    changes = list(_changes(packed, layout))
    first = int(entry.partition(b"-")[0]) - len(changes) + 1
    return [Row(revision, *change) for revision, change in enumerate(changes, first)]


def _changes(packed: bytes, layout: CodeLayout) -> Iterator[tuple[str, SemanticId, SemanticId | None]]:
    start = 0
    while start < len(packed):
        kind = packed[start : start + 1]
        semantic_id, start = _read_id(packed, start + 1, layout)
        replaced_by = None
        if kind == b"R":
            replaced_by, start = _read_id(packed, start, layout)
        yield KINDS[kind], semantic_id, replaced_by


def _read_id(packed: bytes, start: int, layout: CodeLayout) -> tuple[SemanticId, int]:
    """The ID that begins there, and where the next thing does."""
    end = packed.index(b",", start + layout.width)
    return read_semantic_id(packed[start:end], layout), end + 1
