"""A record on a single primary: a micro-batch is one call of one script, which runs alone on the server."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import ResponseError

from service.registry.assignment import DEAD, latest_time
from service.registry.history import RecordFacts, says_older
from service.registry.primary import Primary, Script
from service.registry.request_queue import REQUESTS_PER_CALL, Reply, Request, RequestQueue
from service.registry.run_length import RunLength

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from service.registry.keys import RecordKeys


def _script(name: str) -> Script:
    return Script(
        b"".join(Path(__file__).with_name(part).read_bytes() for part in ("lib.lua", "nodes.lua", "atomic.lua", name))
    )


_CLAIM, _ISSUE, _RESTORE = map(_script, ("record.lua", "issue.lua", "restore.lua"))
# Short enough to be sent each time.
_RECALL, _FIND = (Path(__file__).with_name(name).read_bytes() for name in ("recall.lua", "find.lua"))


class AtomicRecord:
    """Changes a record by atomic calls, and reads what items hold."""

    def __init__(self, primary: Primary, keys: RecordKeys, facts: RecordFacts, revised: Callable[[int], None]) -> None:
        """Of the record with these keys.

        Args:
            primary: Where it lies.
            keys: Its keys.
            facts: What else is known of it.
            revised: Is told each revision that was made here.
        """
        self._primary = primary
        self._keys = keys
        layout = keys.layout
        numbers = (keys.partition_buckets, layout.width, layout.bytes_per_code, facts.max_suffix, facts.changes_kept)
        self._history = facts.history
        self._facts = (*(b"%d" % number for number in numbers), facts.history.epoch)
        self._revised = revised
        self._queue = RequestQueue(partial(self._send, _CLAIM))
        self._issuing = RequestQueue(self._issue)
        self._run = RunLength()
        self._restoring = RequestQueue(partial(self._send, _RESTORE))
        self._recalling = RequestQueue(self._recall)

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        """The replies to these requests, in order, durable; what others ask at the same time is sent together.

        Raises:
            RegistryUnavailable: Nothing is acknowledged, though some may be done: ask again.
            RegistryOlder: The registry has lost what was acknowledged; nothing was done.
        """
        return await self._queue.submit(requests)

    async def issue(self, item_ids: Sequence[bytes], contents: Sequence[bytes]) -> list[int]:
        """The suffixes issued to those of these items that are new, see `issue.lua`, in order, durable.

        One run follows the other, so that others are served in between (see `RunLength`), and so that items of equal
        codes get their suffixes in order.

        Args:
            item_ids: Their keys; items of near codes should follow each other.
            contents: The digest and the packed codes of each.

        Raises:
            RegistryUnavailable: Nothing is acknowledged, though some may be issued.
            RegistryOlder: The registry has lost what was acknowledged; nothing was done.
        """
        suffixes: list[int] = []
        while len(suffixes) < len(item_ids):
            run = slice(len(suffixes), len(suffixes) + self._run.items)
            (issued,) = await self._issuing.submit([self._keys.new_items(item_ids[run], contents[run])])
            suffixes += issued
        return suffixes

    async def restore(self, requests: Sequence[Request]) -> list[Reply]:
        """The same of requests to put IDs back, see `restore.lua`.

        Raises:
            RegistryUnavailable: Nothing is acknowledged, though some may be done: ask again.
            RegistryOlder: The registry has lost what was acknowledged; nothing was done.
        """
        return await self._restoring.submit(requests)

    async def held(self, item_ids: Sequence[bytes]) -> list[bytes | None]:
        """What each item holds, as the record has it, durable.

        Raises:
            RegistryUnavailable: The server cannot be reached, or cannot confirm that what it answered is durable.
        """
        if not item_ids:  # as of IDs that nobody holds
            return []
        values = await self._recalling.submit(item_ids)
        await self._until_durable(values)
        return values

    async def histories(self, item_ids: Sequence[bytes]) -> list[tuple[bytes | None, bytes | None]]:
        """What each item holds, and with it what it held before; else as `held`."""
        if not item_ids:
            return []
        found = await self._recalling.submit([field for item_id in item_ids for field in (item_id, DEAD + item_id)])
        await self._until_durable(found[::2])
        return list(zip(found[::2], found[1::2], strict=True))

    async def holders(self, semantic_ids: Sequence[bytes]) -> list[bytes | None]:
        """What stands for each of these packed IDs, in order, see `lib.lua`; None for one never issued.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        return await self._find(semantic_ids)

    async def group_sizes(self, codes: Sequence[bytes]) -> list[int]:
        """How many suffixes have been issued to each of these packed codes, in order.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        return await self._find(codes)

    async def settle(self) -> None:
        """Returns when all that was read before is as durable as promised, by an empty call where that needs one."""
        if self._primary.unchecked:
            await self._primary.call(self._primary.recheck)
        if self._primary.waits:
            await self._queue.submit([])

    async def flush(self) -> None:
        """Returns when the log has every change that could be seen: at once, as each call writes both."""

    @property
    def idle(self) -> bool:
        """Whether no request waits or is on its way."""
        return all(queue.idle for queue in self._queues)

    async def drain(self) -> None:
        """Returns when no request waits or is on its way."""
        for queue in self._queues:
            await queue.drain()

    @property
    def _queues(self) -> tuple[RequestQueue[Any, Any], ...]:
        return self._queue, self._issuing, self._restoring, self._recalling

    async def _send(self, script: Script, requests: Sequence[Request]) -> list[Reply]:
        now, _, replies = await self._change(script, self._keys.requests(requests))
        at = datetime.fromtimestamp(now, UTC)
        return [Reply(reply, at) for reply in replies]

    async def _issue(self, runs: Sequence[bytes]) -> list[list[int]]:
        issued = []
        for run in runs:
            _, revision, suffixes = await self._change(_ISSUE, run)
            self._run.ran(revision, sum([suffix >= 0 for suffix in suffixes]))
            issued.append(suffixes)
        return issued

    async def _change(self, script: Script, requests: bytes) -> tuple[int, int, list[Any]]:
        """The time by the server's clock, the revision after it, and its replies to these requests."""
        await self._history.begin()
        arguments = [*self._facts, b"%d" % self._history.revision, requests]
        reply = await self._primary.call_unshielded(partial(self._evaluate, script, [self._keys.meta], arguments))
        if isinstance(reply, ResponseError):
            await self._history.refused(reply)
        now, revision, *replies = reply
        self._history.reached(revision)
        self._revised(revision)
        return now, revision, replies

    async def _find(self, packed: Sequence[bytes]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(packed), REQUESTS_PER_CALL):
            part = packed[start : start + REQUESTS_PER_CALL]
            (answers,) = await self._history.read([("EVAL", _FIND, 1, self._keys.meta, *self._facts[:3], *part)])
            found += answers
        return found

    async def _recall(self, fields: Sequence[bytes]) -> list[bytes | None]:
        keys = self._keys.forwards([field.lstrip(DEAD) for field in fields])
        (found,) = await self._history.read([("EVAL", _RECALL, len(fields), *keys, *fields)])
        return cast("list[bytes | None]", found)

    async def _evaluate(
        self, script: Script, keys: Sequence[bytes], arguments: Sequence[bytes]
    ) -> list[Any] | ResponseError:
        """The script's reply; its error where it refused as the registry is older than what was acknowledged."""
        try:
            return await self._primary.evaluate(script, keys, arguments)
        except ResponseError as error:
            if says_older(error):
                return error
            raise

    async def _until_durable(self, values: Iterable[bytes | None]) -> None:
        """Answering an assignment acknowledges it: one that may not be synced yet is waited for."""
        if self._primary.unchecked:
            await self._primary.call(self._primary.recheck)
        if not self._primary.waits:
            return
        latest = max(map(latest_time, filter(None, values)), default=-1)
        if 0 <= latest < self._primary.durable_before:
            (returned,) = await self._history.read([("HGET", self._keys.meta, b"returned")])
            latest = max(latest, int(returned or 0))
        if latest >= self._primary.durable_before:
            await self._queue.submit([])
