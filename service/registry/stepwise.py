"""A record on a cluster: the same promises by idempotent steps, each in one slot, which any worker can finish.

    begin (item) --> issue, live, dead (codes) --> feed (log) --> commit (item)

The item comes first: its control says what is being done with it, one thing at a time. Then the codes: an ID is issued
to it, brought or taken away, and the change lies in an outbox beside it. Then the log takes the changes from the
outboxes, each once. At last the item holds what came of it. Whoever finds a control that nobody finished, takes the
same steps; those that were taken already change nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from service.registry.assignment import CONTROL, DEAD, VERSION_BYTES, read_holder
from service.registry.places import asking_holders, asking_sizes, read_holders, read_sizes
from service.registry.request_queue import Reply, Request, RequestQueue
from service.registry.restoring import asked, refused
from service.registry.steps import NOWHERE, Steps, Work, at_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from service.registry.cluster import Cluster
    from service.registry.history import RecordFacts
    from service.registry.keys import RecordKeys

    _Attempt = Callable[[dict[int, Request]], Awaitable[dict[int, Reply]]]


class SteppedRecord:
    """Changes a record step by step, and reads what items hold."""

    def __init__(self, cluster: Cluster, keys: RecordKeys, facts: RecordFacts, revised: Callable[[int], None]) -> None:
        """Of the record with these keys; see `AtomicRecord`."""
        self._cluster = cluster
        self._keys = keys
        self._history = facts.history
        self._steps = Steps(cluster, keys, facts, revised)
        self._queue = RequestQueue(partial(self._send, self._attempt))
        self._restoring = RequestQueue(partial(self._send, self._attempt_to_restore))

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        """As `AtomicRecord.submit`."""
        return await self._queue.submit(requests)

    async def issue(self, item_ids: Sequence[bytes], contents: Sequence[bytes]) -> list[int]:
        """As `AtomicRecord.issue`, but that items of equal codes get their suffixes in any order."""
        held = await self.held(item_ids)
        new = [place for place, value in enumerate(held) if value is None]
        replies = await self._queue.submit([Request(item_ids[place], b"K" + contents[place]) for place in new])
        suffixes = [-1] * len(item_ids)
        for place, reply in zip(new, replies, strict=True):
            if isinstance(reply.value, int):
                suffixes[place] = reply.value
        return suffixes

    async def restore(self, requests: Sequence[Request]) -> list[Reply]:
        """As `AtomicRecord.restore`."""
        return await self._restoring.submit(requests)

    async def held(self, item_ids: Sequence[bytes]) -> list[bytes | None]:
        """As `AtomicRecord.held`."""
        return [value for value, _ in await self.histories(item_ids)]

    async def histories(self, item_ids: Sequence[bytes]) -> list[tuple[bytes | None, bytes | None]]:
        """As `AtomicRecord.histories`; what is being done with an item is finished first.

        What was committed can be read: were the commit lost, its durable steps before would lead to it again.
        """
        reads = [("HMGET", self._keys.forward(item), item, DEAD + item, CONTROL + item) for item in item_ids]
        found = await self._history.read(reads)
        open_items = {
            item: Work(item, control, value, former or b"")
            for item, (value, former, control) in zip(item_ids, found, strict=True)
            if control and len(control) > VERSION_BYTES
        }
        if open_items:
            await self._steps.finish(open_items.values())
            found = await self._history.read(reads)
        return [(value, former) for value, former, _ in found]

    async def holders(self, semantic_ids: Sequence[bytes]) -> list[bytes | None]:
        """As `AtomicRecord.holders`."""
        return read_holders(await self._history.read(asking_holders(semantic_ids, self._keys)), self._keys)

    async def group_sizes(self, codes: Sequence[bytes]) -> list[int]:
        """As `AtomicRecord.group_sizes`."""
        return read_sizes(await self._history.read(asking_sizes(codes, self._keys)), self._keys)

    async def put_right(self, ids: Sequence[tuple[bytes, bytes, bool, bytes]]) -> None:
        """Lets codes know IDs as items hold them: the item, its ID, whether it is live, the change that says so."""
        controls = await self._history.read([("HGET", self._keys.forward(item), CONTROL + item) for item, *_ in ids])
        versions = [int.from_bytes((control or b"")[:VERSION_BYTES]) for control in controls]
        await self._steps.put_right([(*one, version) for one, version in zip(ids, versions, strict=True)])

    async def settle(self) -> None:
        """As `AtomicRecord.settle`, of what was read of the log."""
        await self._cluster.call(partial(self._cluster.barrier, [self._keys.meta]))

    async def flush(self) -> None:
        """Returns when the log has every change that could be seen, those of workers that died too."""
        await self._steps.flush()

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
        await self._steps.verify()
        replies: dict[int, Reply] = {}
        while remaining := [place for place in range(len(requests)) if place not in replies]:
            replies |= await attempt({place: requests[place] for place in remaining})
        return [replies[place] for place in range(len(requests))]

    async def _attempt(self, requests: dict[int, Request]) -> dict[int, Reply]:
        """The replies to those that could be begun, or needed nothing; an item that was found begun has to wait."""
        places = dict(zip(requests, await self._steps.places(list(requests.values())), strict=True))
        begun = await self._steps.begin([(request, places[place]) for place, request in requests.items()])
        work: dict[tuple[bytes, bytes], Work] = {}  # of an item there may be two, one after the other
        replies: dict[int, Reply] = {}
        own: dict[int, Work] = {}
        for (place, request), (now, control, mine, value, former) in zip(requests.items(), begun, strict=True):
            if not control:
                replies[place] = Reply(value, at_time(now))
                continue
            one = work.setdefault((request.item_id, control), Work(request.item_id, control, value, former))
            if mine:
                own[place] = one
        await self._steps.finish(work.values())
        for place, one in own.items():
            if one.value is not None or not places[place].free:
                replies[place] = Reply(one.reply(self._keys), one.at)
        return replies

    async def _attempt_to_restore(self, requests: dict[int, Request]) -> dict[int, Reply]:
        """The same of requests to put IDs back."""
        begun = await self._steps.begin([(request, NOWHERE) for request in requests.values()])
        work: dict[tuple[bytes, bytes], Work] = {}  # of an item there may be two, one after the other
        replies: dict[int, Reply] = {}
        own: dict[int, Work] = {}
        idle: dict[int, tuple[datetime, bytes | None, bytes]] = {}
        for (place, request), (now, control, mine, value, former) in zip(requests.items(), begun, strict=True):
            if not control:
                idle[place] = at_time(now), value, former
                continue
            one = work.setdefault((request.item_id, control), Work(request.item_id, control, value, former))
            if mine:
                own[place] = one
        await self._steps.finish(work.values())
        for place, one in own.items():
            if one.semantic_id:
                replies[place] = Reply(1, one.at)
            else:
                idle[place] = one.at, None, b""
        width = self._keys.layout.width
        ids = [asked(requests[place].request, width)[0] for place in idle]
        holders = read_holders(await self._cluster.read(asking_holders(ids, self._keys)), self._keys)
        for (place, (at, value, former)), holder in zip(idle.items(), holders, strict=True):
            whose = read_holder(holder)[0] if holder else None
            replies[place] = Reply(refused(requests[place], value, former, whose, width), at)
        return replies
