"""The steps by which a record changes on a cluster, each in one slot; see `stepwise`.

begin (item) --> issue, live, dead, put (codes) --> feed (log) --> commit (item)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import ResponseError

from service.registry.assignment import RETIRED, VERSION_BYTES, held_id, split_former
from service.registry.history import RecordFacts, says_older
from service.registry.places import asking_sizes, read_sizes
from service.registry.primary import Script, ScriptCall
from service.registry.restoring import asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from service.registry.cluster import Cluster
    from service.registry.keys import RecordKeys
    from service.registry.request_queue import Request

CHANGES_PER_FEED = 2048
NUMBER_BYTES = 4


def _script(*names: str) -> Script:
    return Script(b"".join(Path(__file__).with_name(part).read_bytes() for part in ("lib.lua", *names)))


_FORWARD, _REVERSE, _FEED = _script("forward.lua"), _script("nodes.lua", "reverse.lua"), _script("feed.lua")


class Steps:
    """Takes the steps of one record."""

    def __init__(self, cluster: Cluster, keys: RecordKeys, facts: RecordFacts, revised: Callable[[int], None]) -> None:
        """Of the record with these keys; `revised` is told each revision that was made here."""
        self._cluster = cluster
        self._keys = keys
        self._max_suffix = facts.max_suffix
        self._changes_kept = facts.changes_kept
        self._history = facts.history
        self._revised = revised
        self._moved: dict[bytes, int] = {}  # by first code: how far its outbox is known to have been moved
        self._verified = -1  # the servers as they were when the outboxes were last found to be whole

    async def places(self, requests: Sequence[Request]) -> list[Places]:
        """Where each request's item may be placed, and how far the suffixes went there before it was begun."""
        lists = [_codes_of(request.request, self._keys) for request in requests]
        flat = list(dict.fromkeys(codes for places in lists for codes in places))
        first = list({self._keys.first_code(codes): None for codes in flat})
        reads = asking_sizes(flat, self._keys)
        reads += [("HMGET", self._keys.outboxes, *first)] if first else []
        found = await self._history.read(reads)
        for code, number in zip(first, found.pop() if first else (), strict=True):
            self._moved[code] = max(self._moved.get(code, 0), int(number or 0))
        highest = {codes: size - 1 for codes, size in zip(flat, read_sizes(found, self._keys), strict=True)}
        return [Places.of([highest[codes] for codes in places], self._max_suffix) for places in lists]

    async def begin(self, requests: Sequence[tuple[Request, Places]]) -> list[Any]:
        """What is being done with each item, or that nothing is left to do: see `forward.lua`."""
        return await self._write(
            [
                self._forward(item_id, b"begin", request, places.bases, b"%d" % places.number)
                for (item_id, request), places in requests
            ]
        )

    async def finish(self, items: Iterable[Work]) -> None:
        """Takes the remaining steps of these items."""
        work = list(items)
        if not work:
            return
        changes: list[_Changes] = []
        for one, issued in zip(work, await self._turn([self._first_step(one) for one in work], changes), strict=True):
            one.semantic_id = issued
        await self.verify()  # what a server answered that was not the one before, is not told before it is found whole
        replaced = [one for one in work if one.operation == b"R" and one.semantic_id]
        await self._turn([self._replaced(one) for one in replaced], changes)
        # What others changed who took these steps before may not be in the log yet: it is wanted too.
        told = {id_ for change in changes for id_ in change.ids(self._keys.layout.width)}
        silent = {self._keys.first_code(id_) for one in work for id_ in one.touched if id_ not in told}
        changes += await self._outboxes(silent)
        await self._feed(changes)
        committed = await self._write(
            [self._forward(one.item_id, b"commit", one.control, one.semantic_id) for one in work]
        )
        for one, (_, value, _) in zip(work, committed, strict=True):
            one.value = value if one.semantic_id else None

    async def verify(self) -> None:
        """Compares, whenever another server may answer than before, its outboxes with what was moved from them.

        Raises:
            RegistryOlder: A server has lost changes that are in the log, and with them acknowledged IDs.
            RegistryUnavailable: One cannot be reached.
        """
        generation = self._cluster.generation
        if generation != self._verified:
            if lost := await lost_outboxes(self._cluster, self._keys):
                self._history.lost_a_part(len(lost))
            self._verified = generation

    async def flush(self) -> None:
        """Returns when the log has every change that could be seen, those of workers that died too."""
        await self._history.begin()
        codes = list(self._keys.first_codes())
        reached = await self._cluster.read([("HGET", self._keys.outbox(code), b"n") for code in codes])
        (moved,) = await self._cluster.read([("HGETALL", self._keys.outboxes)])
        late = [code for code, n in zip(codes, reached, strict=True) if int(n or 0) > int(moved.get(code, 0))]
        if late:
            await self._feed(await self._outboxes(late))

    async def put_right(self, ids: Sequence[tuple[bytes, bytes, bool, bytes, int]]) -> None:
        """Lets codes know IDs as their items hold them, whatever was known; the last number is the item's version."""
        changes: list[_Changes] = []
        calls = []
        for item_id, semantic_id, live, change, version in ids:
            control = version.to_bytes(VERSION_BYTES)
            one = Work(item_id, control, None, b"")
            calls.append(self._reverse(one, semantic_id, b"right", semantic_id, change, b"%d" % live))
        await self._turn(calls, changes)
        await self._feed(changes)

    async def _turn(self, calls: Sequence[ScriptCall], changes: list[_Changes]) -> list[bytes]:
        """The IDs that these calls brought or took away; what they changed is added to `changes`."""
        ids = []
        for _, semantic_id, first, *told in await self._write(calls):
            ids.append(semantic_id)
            if told:
                changes.append(_Changes(self._keys.first_code(semantic_id), first, told))
        return ids

    def _replaced(self, one: Work) -> ScriptCall:
        return self._reverse(one, one.held, b"dead", one.held, b"R%b,%b," % (one.held, one.semantic_id))

    def _first_step(self, one: Work) -> ScriptCall:
        if one.operation == b"D":
            return self._reverse(one, one.held, b"dead", one.held, b"D%b," % one.held)
        if one.operation == b"B":
            return self._reverse(one, one.held, b"live", one.held)
        if one.operation in {b"I", b"F"}:
            return self._reverse(one, one.restored(self._keys)[0], b"put", *one.restored(self._keys))
        bases, places = one.places(self._keys)
        former = [semantic_id for semantic_id, _ in split_former(one.former, self._keys.layout.width)]
        return self._reverse(one, places[0], b"issue", bases, b"".join(places), *former)

    async def _feed(self, changes: Sequence[_Changes]) -> None:
        """Moves changes into the log; those before them that it misses, with them."""
        while changes:
            part, rest = _first_changes(changes)
            arguments: list[bytes] = []
            for code, first, told in part:
                arguments += (code, b"%d" % first, b"%d" % len(told), *told)
            keys = [self._keys.meta, self._keys.root, self._keys.changes, self._keys.outboxes]
            facts = [b"%d" % self._changes_kept, b"%d" % self._keys.layout.bytes_per_code, self._history.epoch]
            call = ScriptCall(_FEED, keys, [*facts, b"%d" % self._history.revision, *arguments])
            ((_, revision, *moved),) = await self._write([call])
            missing: set[bytes] = set()
            for (code, first, told), reached in zip(part, moved, strict=True):
                self._moved[code] = max(self._moved.get(code, 0), reached)
                if reached < first + len(told) - 1:
                    missing.add(code)
            self._history.reached(revision)
            self._revised(revision)
            found = await self._outboxes(missing)
            for code, first, _ in found:
                if first > self._moved[code] + 1:  # what comes before was removed once it was in the log
                    self._history.lost_a_part(1)
            changes = [*found, *rest]

    async def _outboxes(self, codes: Iterable[bytes]) -> list[_Changes]:
        """All that the outboxes of these first codes hold."""
        codes = list(codes)
        found = await self._cluster.read([("HGETALL", self._keys.outbox(code)) for code in codes])
        await self._cluster.call(partial(self._cluster.barrier, [self._keys.outbox(code) for code in codes]))
        changes = []
        for code, fields in zip(codes, found, strict=True):
            numbers = sorted(int(name) for name in fields if name.isdigit())
            if numbers:
                changes.append(_Changes(code, numbers[0], [fields[b"%d" % number] for number in numbers]))
        return changes

    # Calls

    def _forward(self, item_id: bytes, step: bytes, *arguments: bytes) -> ScriptCall:
        layout = self._keys.layout
        facts = (item_id, b"%d" % layout.width, b"%d" % layout.bytes_per_code)
        return ScriptCall(_FORWARD, [self._keys.forward(item_id)], [*facts, step, *arguments])

    def _reverse(self, one: Work, codes: bytes, step: bytes, *arguments: bytes) -> ScriptCall:
        layout = self._keys.layout
        code = self._keys.first_code(codes)
        keys = [self._keys.outbox(code), *self._keys.path(codes)]
        numbers = (one.version, layout.width, layout.bytes_per_code, self._max_suffix, self._moved.get(code, 0))
        return ScriptCall(_REVERSE, keys, [one.item_id, *(b"%d" % number for number in numbers), step, *arguments])

    async def _write(self, calls: Sequence[ScriptCall]) -> list[Any]:
        if not calls:
            return []
        replies = await self._cluster.call(partial(self._written, calls))
        if isinstance(replies, ResponseError):
            await self._history.refused(replies)
        return replies

    async def _written(self, calls: Sequence[ScriptCall]) -> list[Any] | ResponseError:
        """The scripts' replies; the error where one refused as the registry is older than what was acknowledged."""
        try:
            return await self._cluster.written(calls)
        except ResponseError as error:
            if says_older(error):
                return error
            raise


async def lost_outboxes(cluster: Cluster, keys: RecordKeys) -> dict[bytes, int]:
    """First codes whose IDs lie on a server that has lost a part of them, and how far their outboxes had come."""
    (fields,) = await cluster.read([("HGETALL", keys.outboxes)])
    moved = {code: int(number) for code, number in fields.items()}
    reached = await cluster.read([("HGET", keys.outbox(code), b"n") for code in moved])
    return {code: number for (code, number), n in zip(moved.items(), reached, strict=True) if int(n or 0) < number}


class Places(NamedTuple):
    """Where an item may be placed: its own codes, then alternatives, up to the first that has a suffix left.

    Attributes:
        number: How many.
        free: Whether one has a suffix left.
        bases: The highest suffix of each, 4 bytes each; 0 where there is none yet.
    """

    number: int
    free: bool
    bases: bytes

    @classmethod
    def of(cls, highest: Sequence[int], max_suffix: int) -> Places:
        """By the highest suffix under each of the places that are named; -1 where there is none yet."""
        number = next((i + 1 for i, last in enumerate(highest) if last < max_suffix), len(highest))
        bases = b"".join(max(last, 0).to_bytes(NUMBER_BYTES) for last in highest[:number])
        return cls(number, not highest or highest[number - 1] < max_suffix, bases)


NOWHERE = Places(0, False, b"")  # of an ID that is put back


class _Changes(NamedTuple):
    """Changes of the IDs of one first code, and the number of the first of them."""

    code: bytes
    first: int
    told: list[bytes]

    def ids(self, width: int) -> Iterator[bytes]:
        """The ID of each, by the width of packed codes."""
        for change in self.told:
            yield change[1 : change.index(b",", 1 + width)]


@dataclass
class Work:
    """What is being done with an item, as its control says, and what comes of it.

    Attributes:
        item_id: Its own key.
        control: What is being done, see `forward.lua`.
        value: The assignment before; afterwards the one that came of it, None where no suffix was left.
        former: The IDs that it held before.
        semantic_id: The ID that came of it; empty where no suffix was left.
    """

    item_id: bytes
    control: bytes
    value: bytes | None
    former: bytes
    semantic_id: bytes = b""

    def __post_init__(self) -> None:
        self.before = self.value or b""
        self.held = held_id(self.before) if self.before else b""

    @property
    def version(self) -> int:
        """Of the operation among those of its item."""
        return int.from_bytes(self.control[:VERSION_BYTES])

    @property
    def operation(self) -> bytes:
        """The letter of the operation, see `forward.lua`."""
        return self.control[4:5]

    @property
    def at(self) -> datetime:
        """When it was begun."""
        return at_time(int.from_bytes(self.control[5:9]))

    @property
    def touched(self) -> list[bytes]:
        """The IDs that the steps bring or take away."""
        return [id_ for id_ in (self.semantic_id, self.held) if id_]

    def places(self, keys: RecordKeys) -> tuple[bytes, list[bytes]]:
        """The highest suffix that was seen under each of its places, and the places as packed codes."""
        width, code_bytes = keys.layout.width, keys.layout.bytes_per_code
        rest = self.control[17:]
        count = (len(rest) - width + code_bytes) // (NUMBER_BYTES + code_bytes)
        bases, rest = rest[: count * NUMBER_BYTES], rest[count * NUMBER_BYTES :]
        return bases, _places(rest, keys)

    def restored(self, keys: RecordKeys) -> tuple[bytes, bytes]:
        """The ID that is put back, and the change that it is."""
        rest = self.control[9:]
        if self.operation == b"I":
            semantic_id = held_id(rest)
            return semantic_id, (b"d%b," if rest[0] & RETIRED else b"A%b,") % semantic_id
        semantic_id, successor = asked(b"F" + rest, keys.layout.width)
        return semantic_id, b"r%b,%b," % (semantic_id, successor)

    def reply(self, keys: RecordKeys) -> int | bytes | list[Any] | None:
        """What `record.lua` replies to the request this was begun for: as this left it, whatever came of it since."""
        if self.operation == b"D":
            return bytes([self.before[0] | RETIRED]) + self.control[5:9] + self.before[1:]
        if self.value is None:
            return None
        if self.operation == b"B":
            return self.control[9:]
        if held_at := dict(split_former(self.former, keys.layout.width)).get(self.semantic_id):
            return b"\0" + held_at + self.control[9:17] + self.semantic_id
        _, places = self.places(keys)
        codes, suffix = self.semantic_id[: keys.layout.width], int(self.semantic_id[keys.layout.width :])
        return suffix if codes == places[0] else [suffix, codes[-keys.layout.bytes_per_code :]]


def _codes_of(request: bytes, keys: RecordKeys) -> list[bytes]:
    """The places that a claim names, best first; none of a retirement."""
    return [] if request == b"D" else _places(request[9:], keys)


def _places(content: bytes, keys: RecordKeys) -> list[bytes]:
    """Of packed codes and alternatives for the last of them."""
    width, code_bytes = keys.layout.width, keys.layout.bytes_per_code
    codes = content[:width]
    last = [content[start : start + code_bytes] for start in range(width, len(content), code_bytes)]
    return [codes, *(codes[:-code_bytes] + code for code in last)]


def _first_changes(changes: Sequence[_Changes]) -> tuple[list[_Changes], list[_Changes]]:
    """As many as go into one call, and the rest."""
    room = CHANGES_PER_FEED
    part: list[_Changes] = []
    for place, (code, first, told) in enumerate(changes):
        if len(told) > room:
            if room:
                part.append(_Changes(code, first, told[:room]))
            return part, [_Changes(code, first + room, told[room:]), *changes[place + 1 :]]
        part.append(_Changes(code, first, told))
        room -= len(told)
    return part, []


def at_time(seconds: int) -> datetime:
    """Of a server's clock."""
    return datetime.fromtimestamp(seconds, UTC)
