"""Everything a record keeps of its items, bucket by bucket: what a copy of it is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from service.registry.assignment import CONTROL, DEAD, VERSION_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from service.registry.history import History
    from service.registry.keys import RecordKeys

    ReadHistories = Callable[[Sequence[bytes]], Awaitable[list[tuple[bytes | None, bytes | None]]]]

FIELDS_PER_SCAN = 10_000
ITEMS_PER_READ = 20_000
MAX_BUCKETS_PER_READ = 256


class Held(NamedTuple):
    """What the record keeps of an item; the bytes are those of `lib.lua`.

    Attributes:
        item_id: The item's own opaque key, UTF-8.
        value: Its assignment.
        former: The IDs it held before; empty where there are none.
        display: Its title, UTF-8; empty where there is none.
    """

    item_id: bytes
    value: bytes
    former: bytes
    display: bytes = b""


class Part(NamedTuple):
    """Some of the record's items, and how far the scan is."""

    items: list[Held]
    buckets_read: int
    buckets: int


class Contents:
    """Reads what one record keeps of its items."""

    def __init__(self, history: History, keys: RecordKeys, histories: ReadHistories) -> None:
        """Reads buckets whole; `histories` reads items, and finishes what is being done with them."""
        self._history = history
        self._keys = keys
        self._histories = histories

    async def scan(self) -> AsyncIterator[Part]:
        """All items, each once, retired ones too; one that is there throughout is found.

        What changes meanwhile may be told as it was or as it is.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        (count,) = await self._history.read([("HGET", self._keys.meta, b"count")])
        buckets = self._keys.buckets
        step = min(max(1, ITEMS_PER_READ * buckets // max(int(count or 0), 1)), MAX_BUCKETS_PER_READ)
        for start in range(0, buckets, step):
            numbers = range(start, min(start + step, buckets))
            found = await self._whole([self._keys.forward_bucket(number) for number in numbers])
            titles = await self._whole([self._keys.display_bucket(number) for number in numbers])
            held = [one for fields, of_them in zip(found, titles, strict=True) for one in _held(fields, of_them)]
            begun = [item_id for fields in found for item_id in _begun(fields)]
            if begun:
                held = [one for one in held if one.item_id not in begun] + await self.of(begun)
            yield Part(held, numbers.stop, buckets)

    async def of(self, item_ids: Sequence[bytes]) -> list[Held]:
        """What is kept of these items, in order, without those that have no assignment.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        held = await self._histories(item_ids)
        titles = await self._history.read([("HGET", self._keys.display(item_id), item_id) for item_id in item_ids])
        return [
            Held(item_id, value, former or b"", title or b"")
            for item_id, (value, former), title in zip(item_ids, held, titles, strict=True)
            if value
        ]

    async def _whole(self, keys: Sequence[bytes]) -> list[dict[bytes, bytes]]:
        """All fields of each bucket; one in listpack encoding comes in one answer, a larger one in several."""
        found: list[dict[bytes, bytes]] = [{} for _ in keys]
        cursors = dict.fromkeys(range(len(keys)), 0)
        while cursors:
            commands = [("HSCAN", keys[i], cursor, "COUNT", FIELDS_PER_SCAN) for i, cursor in cursors.items()]
            answers = await self._history.read(commands)
            for i, (_, fields) in zip(cursors, answers, strict=True):
                found[i].update(fields)
            cursors = {i: cursor for i, (cursor, _) in zip(cursors, answers, strict=True) if cursor}
        return found


def _held(fields: Mapping[bytes, bytes], titles: Mapping[bytes, bytes]) -> Iterator[Held]:
    for item_id, value in fields.items():
        if not item_id.startswith((DEAD, CONTROL)):
            yield Held(item_id, value, fields.get(DEAD + item_id, b""), titles.get(item_id, b""))


def _begun(fields: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """Items with which something is being done, see `forward.lua`."""
    for field, control in fields.items():
        if field.startswith(CONTROL) and len(control) > VERSION_BYTES:
            yield field.removeprefix(CONTROL)
