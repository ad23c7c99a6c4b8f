"""On a cluster, after servers came back without a part of what was acknowledged: what is left is made whole again.

    outboxes and log --> items that know less than the codes --> codes that know less than the items
        --> IDs that only the log knows --> counts

A single server comes back as it was at one moment. Of several, each may come back as of another: an item then holds an
ID that its codes do not know, or the other way round. Nothing that is still known anywhere is given up.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from service.registry.assignment import (
    CONTROL,
    DEAD,
    DIGEST_BYTES,
    RETIRED,
    VERSION_BYTES,
    held_id,
    read_holder,
    split_former,
    write_semantic_id,
)
from service.registry.changes import rows_of
from service.registry.places import asking_holders, asking_sizes, read_holders, read_sizes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from service.registry.cluster import Cluster
    from service.registry.contents import Contents, Held
    from service.registry.keys import RecordKeys
    from service.registry.stepwise import SteppedRecord
    from service.registry.tree import LiveTree
    from service.semantic_id import SemanticId

logger = logging.getLogger(__name__)

BUCKETS_PER_READ = 64
ENTRIES = 64  # of the log in one read; one has at most 2048 changes


class Mended(NamedTuple):
    """What was put right.

    Attributes:
        items: Items that knew less of their IDs than the codes did.
        ids: IDs that were not as their items hold them.
        conflicts: IDs that two items hold; the one that the codes name keeps it.
        lost: IDs that were issued, and of which nobody knows to whom; none is issued again.
    """

    items: int
    ids: int
    conflicts: list[bytes]
    lost: int


class Named(NamedTuple):
    """An ID as the codes know it: whether it is live, and the version of its last change."""

    semantic_id: bytes
    live: bool
    version: int


class Mending:
    """Makes one record whole; no service may write to it meanwhile."""

    def __init__(
        self, cluster: Cluster, keys: RecordKeys, record: SteppedRecord, contents: Contents, tree: LiveTree
    ) -> None:
        """Of the record with these keys."""
        self._cluster = cluster
        self._keys = keys
        self._record = record
        self._contents = contents
        self._tree = tree

    async def mend(self) -> Mended:
        """Makes it whole.

        Raises:
            RegistryUnavailable: A server cannot be reached; mend again.
        """
        await self._outboxes()
        behind = await self._items_behind()
        for item_id, named in behind.items():
            await self._hold(item_id, named)
        ids, conflicts = 0, []
        async for part in self._contents.scan():
            fixed, held_twice = await self._ids_of(part.items)
            ids += fixed
            conflicts += held_twice
        await self._record.flush()
        lost = await self._lost_ids()
        if lost:
            await self._never_again(lost)
        await self._counts()
        for semantic_id in conflicts:
            logger.error("Two items of the record %s hold the ID %r", self._keys.name, semantic_id)
        if lost:
            logger.error("%d IDs of the record %s are lost with their items", len(lost), self._keys.name)
        return Mended(len(behind), ids, conflicts, len(lost))

    async def _outboxes(self) -> None:
        """Outboxes go on behind what the log has of them; the log, behind what they no longer have."""
        codes = list(self._keys.first_codes())
        (moved,) = await self._cluster.read([("HGETALL", self._keys.outboxes)])
        found = await self._cluster.read([("HMGET", self._keys.outbox(code), b"n", b"t") for code in codes])
        for code, (reached, trimmed) in zip(codes, found, strict=True):
            number = int(moved.get(code, 0))
            if int(reached or 0) < number:
                await self._write(("HSET", self._keys.outbox(code), b"n", number, b"t", number))
            if int(trimmed or 0) > number:  # the log has lost changes: who follows takes a new trie
                await self._write(("HSET", self._keys.outboxes, code, int(trimmed)))
                await self._write(("DEL", self._keys.changes))

    async def _items_behind(self) -> dict[bytes, list[Named]]:
        """Items that do not know an ID that names them, or its last change; and all IDs that do."""
        behind: dict[bytes, list[Named]] = {}
        async for pairs in self._named():
            held = await self._forward([item_id for item_id, _ in pairs])
            for (item_id, named), (value, former, control) in zip(pairs, held, strict=True):
                known = {id_ for id_, _ in split_former(former or b"", self._keys.layout.width)}
                known |= {held_id(value)} if value else set()
                begun = len(control or b"") > VERSION_BYTES  # then it is finished by whoever looks
                if not begun and (named.semantic_id not in known or named.version > _version(control)):
                    behind[item_id] = []
        async for pairs in self._named():
            for item_id, named in pairs:
                if item_id in behind:
                    behind[item_id].append(named)
        return behind

    async def _named(self) -> AsyncIterator[list[tuple[bytes, Named]]]:
        buckets = self._keys.reverse_buckets()
        while some := list(islice(buckets, BUCKETS_PER_READ)):
            holders = await self._tree.holders(some)
            yield [(read_holder(holder)[0], _named(id_, holder)) for id_, holder in holders]

    async def _hold(self, item_id: bytes, named: Sequence[Named]) -> None:
        """Lets an item hold the IDs that name it: as its own the live one, or else the one that changed last."""
        ((value, former, control),) = await self._forward([item_id])
        now = int(time.time()).to_bytes(4)
        times = dict(split_former(former or b"", self._keys.layout.width))
        if value:
            times[held_id(value)] = value[5:9] if value[0] & RETIRED else value[1:5]
        # Of two live ones the item did not know the later one.
        current = max(named, key=lambda one: (one.live, one.semantic_id not in times, one.version))
        same = value is not None and held_id(value) == current.semantic_id
        digest = (
            value[-len(current.semantic_id) - DIGEST_BYTES :][:DIGEST_BYTES] if value and same else bytes(DIGEST_BYTES)
        )
        state = b"\0" if current.live else bytes([RETIRED]) + now
        held = state + times.get(current.semantic_id, now) + digest + current.semantic_id
        others = [one.semantic_id for one in named if one is not current]
        others += [id_ for id_ in times if id_ not in {one.semantic_id for one in named}]
        fields = [item_id, held]
        if others:
            fields += [DEAD + item_id, b"".join(times.get(id_, now) + id_ + b"," for id_ in others)]
        if version := max(_version(control), *(one.version for one in named)):
            fields += [CONTROL + item_id, version.to_bytes(VERSION_BYTES)]
        await self._write(("HSET", self._keys.forward(item_id), *fields))

    async def _ids_of(self, items: Sequence[Held]) -> tuple[int, list[bytes]]:
        """Lets the codes know the IDs that these items hold and held."""
        width = self._keys.layout.width
        wanted: list[tuple[bytes, bytes, bool, bytes]] = []  # item, ID, whether it is live, the change that says so
        for item_id, value, former, _ in items:
            current = held_id(value)
            live = not value[0] & RETIRED
            wanted.append((item_id, current, live, (b"a%b," if live else b"d%b,") % current))
            wanted += [(item_id, id_, False, b"r%b,%b," % (id_, current)) for id_, _ in split_former(former, width)]
        holders = await self._holders([id_ for _, id_, _, _ in wanted])
        conflicts: list[bytes] = []
        wrong: list[tuple[bytes, bytes, bool, bytes]] = []
        for one, holder in zip(wanted, holders, strict=True):
            if holder and read_holder(holder)[0] != one[0]:
                conflicts.append(one[1])
            elif not holder or read_holder(holder)[1] != one[2]:
                wrong.append(one)
        if wrong:
            await self._record.put_right(wrong)
        return len(wrong), conflicts

    async def _lost_ids(self) -> set[SemanticId]:
        """IDs that the log tells of and that name no item: one server lost both the item and its codes."""
        lost: set[SemanticId] = set()
        start = b"-"
        while entries := (await self._cluster.read([("XRANGE", self._keys.changes, start, b"+", "COUNT", ENTRIES)]))[0]:
            start = b"(" + entries[-1][0]
            rows = [row for entry, fields in entries for row in rows_of(entry, fields[b"c"], self._keys.layout)]
            told = list({row.semantic_id for row in rows})
            fields = [write_semantic_id(semantic_id, self._keys.layout) for semantic_id in told]
            holders = await self._holders(fields)
            lost |= {semantic_id for semantic_id, holder in zip(told, holders, strict=True) if holder is None}
        return lost

    async def _never_again(self, lost: set[SemanticId]) -> None:
        """The suffixes of their codes go on behind these IDs; the log, which tells of them, is at its end."""
        last: dict[bytes, int] = {}
        for semantic_id in lost:
            codes = self._keys.layout.pack(semantic_id.codes)
            last[codes] = max(last.get(codes, 0), semantic_id.suffix)
        sizes = read_sizes(await self._cluster.read(asking_sizes(list(last), self._keys)), self._keys)
        for (codes, suffix), size in zip(last.items(), sizes, strict=True):
            if size <= suffix:
                await self._write(("HSET", *self._keys.places(codes)[0], suffix))
        await self._write(("DEL", self._keys.changes))  # who follows takes a new trie

    async def _counts(self) -> None:
        """The live IDs under each first code, and of all."""
        layout = self._keys.layout
        codes = list(self._keys.first_codes())
        prefixes = [(int.from_bytes(code),) if code else () for code in codes]
        counts = [sum(children.values()) for children in await self._tree.children(prefixes)]
        if len(layout.codebook_sizes) > 1:
            await self._write(("DEL", self._keys.root))
            for code, count in zip(codes, counts, strict=True):
                if count:
                    await self._write(("HSET", self._keys.root, code, count))
        await self._write(("HSET", self._keys.meta, b"count", sum(counts)))

    async def _holders(self, semantic_ids: Sequence[bytes]) -> list[bytes | None]:
        return read_holders(await self._cluster.read(asking_holders(semantic_ids, self._keys)), self._keys)

    async def _forward(self, item_ids: Sequence[bytes]) -> list[list[bytes | None]]:
        return await self._cluster.read(
            [("HMGET", self._keys.forward(item), item, DEAD + item, CONTROL + item) for item in item_ids]
        )

    async def _write(self, command: tuple[object, ...]) -> None:
        await self._cluster.call(partial(self._cluster.written, [command]))


def _version(control: bytes | None) -> int:
    return int.from_bytes((control or b"")[:VERSION_BYTES])


def _named(semantic_id: bytes, holder: bytes) -> Named:
    """What stands for an ID, see `lib.lua`."""
    versioned = holder.startswith(CONTROL)
    return Named(semantic_id, read_holder(holder)[1], int.from_bytes(holder[2:6]) if versioned else 0)
