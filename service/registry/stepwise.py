"""A record on a cluster: the same promises by idempotent steps, each in one slot, which any worker can finish.

    begin (item) --> issue, live, dead (codes) --> feed (log) --> commit (item)

The item comes first: its control says what is being done with it, one thing at a time. Then the codes: an ID is issued
to it, brought or taken away, and the change lies in an outbox beside it. Then the log takes the changes from the
outboxes, each once. At last the item holds what came of it. Whoever finds a control that nobody finished, takes the
same steps; those that were taken already change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import ResponseError

from service.registry.assignment import CONTROL, DEAD, RETIRED, VERSION_BYTES, held_id, read_holder, split_former
from service.registry.history import RecordFacts, says_older
from service.registry.primary import Script, ScriptCall
from service.registry.request_queue import Reply, Request, RequestQueue
from service.registry.restoring import asked, refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from service.registry.cluster import Cluster
    from service.registry.keys import RecordKeys

    _Attempt = Callable[[dict[int, Request]], Awaitable[dict[int, Reply]]]

CHANGES_PER_FEED = 2048
NUMBER_BYTES = 4


def _script(name: str) -> Script:
    return Script(b"".join(Path(__file__).with_name(part).read_bytes() for part in ("lib.lua", name)))


_FORWARD, _REVERSE, _FEED = _script("forward.lua"), _script("reverse.lua"), _script("feed.lua")


class SteppedRecord:
    """Changes a record step by step, and reads what items hold."""

    def __init__(self, cluster: Cluster, keys: RecordKeys, facts: RecordFacts, revised: Callable[[int], None]) -> None:
        """Of the record with these keys; see `AtomicRecord`."""
        self._cluster = cluster
        self._keys = keys
        self._max_suffix = facts.max_suffix
        self._changes_kept = facts.changes_kept
        self._history = facts.history
        self._revised = revised
        self._moved: dict[bytes, int] = {}  # by first code: how far its outbox is known to have been moved
        self._queue = RequestQueue(partial(self._send, self._attempt))
        self._restoring = RequestQueue(partial(self._send, self._attempt_to_restore))

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        """As `AtomicRecord.submit`."""
        return await self._queue.submit(requests)

    async def restore(self, requests: Sequence[Request]) -> list[Reply]:
        """As `AtomicRecord.restore`."""
        return await self._restoring.submit(requests)

    async def held(self, item_ids: Sequence[bytes]) -> list[tuple[bytes | None, bytes | None]]:
        """As `AtomicRecord.held`; what is being done with an item is finished first.

        What was committed can be read: were the commit lost, its durable steps before would lead to it again.
        """
        reads = [("HMGET", self._keys.forward(item), item, DEAD + item, CONTROL + item) for item in item_ids]
        found = await self._history.read(reads)
        open_items = {
            item: _Work(item, control, value, former or b"")
            for item, (value, former, control) in zip(item_ids, found, strict=True)
            if control and len(control) > VERSION_BYTES
        }
        if open_items:
            await self._finish(open_items.values())
            found = await self._history.read(reads)
        return [(value, former) for value, former, _ in found]

    async def settle(self) -> None:
        """As `AtomicRecord.settle`, of what was read of the log."""
        await self._cluster.call(partial(self._cluster.barrier, self._keys.meta))

    async def flush(self) -> None:
        """Returns when the log has every change that could be seen, those of workers that died too."""
        codes = list(self._keys.first_codes())
        reached = await self._cluster.read([("HGET", self._keys.outbox(code), b"n") for code in codes])
        (moved,) = await self._cluster.read([("HGETALL", self._keys.outboxes)])
        late = [code for code, n in zip(codes, reached, strict=True) if int(n or 0) > int(moved.get(code, 0))]
        if late:
            await self._feed(await self._outboxes(late))

    @property
    def idle(self) -> bool:
        """Whether no request waits or is on its way."""
        return self._queue.idle and self._restoring.idle

    async def drain(self) -> None:
        """Returns when no request waits or is on its way."""
        await self._queue.drain()
        await self._restoring.drain()

    async def _send(self, attempt: _Attempt, requests: Sequence[Request]) -> list[Reply]:
        await self._history.begin()
        replies: dict[int, Reply] = {}
        while remaining := [place for place in range(len(requests)) if place not in replies]:
            replies |= await attempt({place: requests[place] for place in remaining})
        return [replies[place] for place in range(len(requests))]

    async def _attempt(self, requests: dict[int, Request]) -> dict[int, Reply]:
        """The replies to those that could be begun, or needed nothing; an item that was found begun has to wait."""
        asked = dict(zip(requests, await self._places(list(requests.values())), strict=True))
        begun = await self._begin([(request, asked[place]) for place, request in requests.items()])
        work: dict[bytes, _Work] = {}
        replies: dict[int, Reply] = {}
        own: dict[int, _Work] = {}
        for (place, request), (now, control, mine, value, former) in zip(requests.items(), begun, strict=True):
            if not control:
                replies[place] = Reply(value, _time(now))
                continue
            one = work.setdefault(request.item_id, _Work(request.item_id, control, value, former))
            if mine:
                own[place] = one
        await self._finish(work.values())
        for place, one in own.items():
            if one.value is not None or not asked[place].free:
                replies[place] = Reply(one.reply(self._keys), one.at)
        return replies

    async def _attempt_to_restore(self, requests: dict[int, Request]) -> dict[int, Reply]:
        """The same of requests to put IDs back."""
        begun = await self._write(
            [self._forward(item_id, b"begin", request, b"", b"0") for item_id, request in requests.values()]
        )
        work: dict[bytes, _Work] = {}
        replies: dict[int, Reply] = {}
        own: dict[int, _Work] = {}
        idle: dict[int, tuple[datetime, bytes | None, bytes]] = {}
        for (place, request), (now, control, mine, value, former) in zip(requests.items(), begun, strict=True):
            if not control:
                idle[place] = _time(now), value, former
                continue
            one = work.setdefault(request.item_id, _Work(request.item_id, control, value, former))
            if mine:
                own[place] = one
        await self._finish(work.values())
        for place, one in own.items():
            if one.semantic_id:
                replies[place] = Reply(1, one.at)
            else:
                idle[place] = one.at, None, b""
        width = self._keys.layout.width
        ids = [asked(requests[place].request, width)[0] for place in idle]
        holders = await self._cluster.read([("HGET", self._keys.reverse(id_), id_) for id_ in ids])
        for (place, (at, value, former)), holder in zip(idle.items(), holders, strict=True):
            whose = read_holder(holder)[0] if holder else None
            replies[place] = Reply(refused(requests[place], value, former, whose, width), at)
        return replies

    # The steps

    async def _places(self, requests: Sequence[Request]) -> list[_Places]:
        """Where each request's item may be placed, and how far the suffixes went there before it was begun."""
        lists = [_codes_of(request.request, self._keys) for request in requests]
        flat = list(dict.fromkeys(codes for places in lists for codes in places))
        found = await self._cluster.read([("HMGET", self._keys.reverse(codes), codes, codes + b"0") for codes in flat])
        highest = {
            codes: int(last) if last else (0 if first else -1) for codes, (last, first) in zip(flat, found, strict=True)
        }
        return [_Places.of([highest[codes] for codes in places], self._max_suffix) for places in lists]

    async def _begin(self, requests: Sequence[tuple[Request, _Places]]) -> list[Any]:
        return await self._write(
            [
                self._forward(item_id, b"begin", request, places.bases, b"%d" % places.number)
                for (item_id, request), places in requests
            ]
        )

    async def _finish(self, items: Iterable[_Work]) -> None:
        """Takes the remaining steps of these items."""
        work = list(items)
        if not work:
            return
        changes: list[_Changes] = []
        for one, issued in zip(work, await self._turn([self._first_step(one) for one in work], changes), strict=True):
            one.semantic_id = issued
        replaced = [one for one in work if one.operation == b"R" and one.semantic_id]
        await self._turn([self._replaced(one) for one in replaced], changes)
        # What others changed who took these steps before may not be in the log yet: it is wanted too.
        told = {change.code for change in changes}
        changes += await self._outboxes({self._keys.first_code(id_) for one in work for id_ in one.touched} - told)
        await self._feed(changes)
        committed = await self._write(
            [self._forward(one.item_id, b"commit", one.control, one.semantic_id) for one in work]
        )
        for one, (_, value, _) in zip(work, committed, strict=True):
            one.value = value if one.semantic_id else None

    async def _turn(self, calls: Sequence[ScriptCall], changes: list[_Changes]) -> list[bytes]:
        """The IDs that these calls brought or took away; what they changed is added to `changes`."""
        ids = []
        for _, semantic_id, first, *told in await self._write(calls):
            ids.append(semantic_id)
            if told:
                changes.append(_Changes(self._keys.first_code(semantic_id), first, told))
        return ids

    def _replaced(self, one: _Work) -> ScriptCall:
        return self._reverse(one, one.held, b"dead", one.held, b"R%b,%b," % (one.held, one.semantic_id))

    def _first_step(self, one: _Work) -> ScriptCall:
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
            changes = [*await self._outboxes(missing), *rest]

    async def _outboxes(self, codes: Iterable[bytes]) -> list[_Changes]:
        """All that the outboxes of these first codes hold."""
        codes = list(codes)
        found = await self._cluster.read([("HGETALL", self._keys.outbox(code)) for code in codes])
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

    def _reverse(self, one: _Work, codes: bytes, step: bytes, *arguments: bytes) -> ScriptCall:
        layout = self._keys.layout
        code = self._keys.first_code(codes)
        inner = [
            self._keys.under(codes[: depth * layout.bytes_per_code])
            for depth in range(1, len(layout.codebook_sizes) - 1)
        ]
        keys = [self._keys.outbox(code), self._keys.reverse(codes[: layout.width]), *inner]
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


class _Places(NamedTuple):
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
    def of(cls, highest: Sequence[int], max_suffix: int) -> _Places:
        number = next((i + 1 for i, last in enumerate(highest) if last < max_suffix), len(highest))
        bases = b"".join(max(last, 0).to_bytes(NUMBER_BYTES) for last in highest[:number])
        return cls(number, not highest or highest[number - 1] < max_suffix, bases)


class _Changes(NamedTuple):
    """Changes of the IDs of one first code, and the number of the first of them."""

    code: bytes
    first: int
    told: list[bytes]


@dataclass
class _Work:
    """What is being done with an item.

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
        self.held = held_id(self.value) if self.value else b""

    @property
    def version(self) -> int:
        return int.from_bytes(self.control[:VERSION_BYTES])

    @property
    def operation(self) -> bytes:
        return self.control[4:5]

    @property
    def at(self) -> datetime:
        return _time(int.from_bytes(self.control[5:9]))

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
        """What `record.lua` replies to the request that this was begun for."""
        issued = self.operation in {b"A", b"R"}
        former = [semantic_id for semantic_id, _ in split_former(self.former, keys.layout.width)]
        if self.value is None or not issued or self.semantic_id in former:
            return self.value
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


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
