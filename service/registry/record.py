"""One namespace's assignments under one tokenizer.

    claim, retire --> queue (what waits is merged) --> one script call --> [WAITAOF] --> acknowledged

The key schema stands at the top of `lib.lua`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from service.errors import RegistryOlder
from service.registry.assignment import (
    DEAD,
    Assignment,
    Claim,
    ClaimResult,
    claimed,
    latest_time,
    read_assignment,
    read_former,
    write_semantic_id,
)
from service.registry.changes import ChangeLog
from service.registry.contents import Contents
from service.registry.primary import Primary, Script
from service.registry.request_queue import Reply, Request, RequestQueue
from service.registry.tree import LiveTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from service.errors import SuffixExhausted
    from service.registry.keys import RecordKeys
    from service.semantic_id import SemanticId

_SCRIPT = Script(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("lib.lua", "record.lua")))


class Record:
    """One namespace's assignments under one tokenizer."""

    def __init__(self, primary: Primary, keys: RecordKeys, *, max_suffix: int, changes_kept: int, epoch: bytes) -> None:
        """Use `Registry.record`."""
        self.layout = layout = keys.layout
        self.buckets = keys.buckets
        self.changes = ChangeLog(primary, keys, self.settle)
        self.tree = LiveTree(primary, keys)
        self.contents = Contents(primary, keys)
        self._primary = primary
        self._keys = keys
        facts = (keys.partition_buckets, layout.width, layout.bytes_per_code, max_suffix, changes_kept)
        self._facts = (*(b"%d" % fact for fact in facts), epoch)
        self._revision = 0  # the latest that this process has seen
        self._queue = RequestQueue(self._send)

    async def claim(self, claims: Sequence[Claim]) -> list[ClaimResult | SuffixExhausted]:
        """Gives each item its one Semantic ID: the one it holds, or the next free suffix of its codes.

        A known item keeps its ID whatever its codes, unless it asks to be reassigned; the record keeps its latest
        digest. A retired one gets back the ID it held. One that is reassigned to codes it had before gets back the ID
        that it had then. Acknowledged only after the durability asked for. A caller cancelled before its claims were
        sent has claimed nothing. Where a connection broke between an assignment and its answer, the repeated claim
        finds it: `created` is False then.

        Returns:
            An answer for each claim, in order; for one whose codes have no suffix left, that error, and what the item
            held stands.

        Raises:
            ValueError: Codes that the tokenizer does not have, or a digest that has not 8 bytes.
            RegistryUnavailable: Nothing is acknowledged, though some may be assigned: claim again.
        """
        replies = await self._submit((claim.item_id, claim.request(self.layout)) for claim in claims)
        return [claimed(claim, reply, self.layout) for claim, reply in zip(claims, replies, strict=True)]

    async def retire(self, item_ids: Sequence[str]) -> list[Assignment | None]:
        """Takes these items out of every listing; their IDs stay theirs and are never issued again.

        Returns:
            Each item's assignment with the time it was retired, now or before, in order; None for an item that has
            none.

        Raises:
            RegistryUnavailable: Nothing is acknowledged, though some may be retired: retire again.
        """
        replies = await self._submit((item_id, b"D") for item_id in item_ids)
        return [
            read_assignment(item_id, reply.value, self.layout) if isinstance(reply.value, bytes) else None
            for item_id, reply in zip(item_ids, replies, strict=True)
        ]

    async def by_item_ids(self, item_ids: Sequence[str]) -> list[Assignment | None]:
        """The assignments of these items, in order, retired ones too; None for an item that has none.

        Raises:
            RegistryUnavailable: The server cannot be reached, or cannot confirm that what it answered is durable.
        """
        fields = [item_id.encode() for item_id in item_ids]
        values = await self._primary.read([("HGET", self._keys.forward(field), field) for field in fields])
        found = [
            read_assignment(item_id, value, self.layout) if value else None
            for item_id, value in zip(item_ids, values, strict=True)
        ]
        await self._until_durable(value for value in values if value)
        return found

    async def by_semantic_ids(self, semantic_ids: Sequence[SemanticId]) -> list[Assignment | None]:
        """The assignments of these Semantic IDs, in order, retired and replaced ones too; None for one never issued.

        Raises:
            ValueError: Codes that the tokenizer does not have.
            RegistryUnavailable: As in `by_item_ids`.
        """
        fields = [write_semantic_id(semantic_id, self.layout) for semantic_id in semantic_ids]
        holders = await self._primary.read([("HGET", self._keys.reverse(field), field) for field in fields])
        asked = [
            (semantic_id, holder.removeprefix(DEAD))
            for semantic_id, holder in zip(semantic_ids, holders, strict=True)
            if holder
        ]
        # Former IDs lie beside the assignment: one round trip answers both.
        values = await self._primary.read([("HMGET", self._keys.forward(item), item, DEAD + item) for _, item in asked])
        held = iter([self._held(*pair, *value) for pair, value in zip(asked, values, strict=True)])
        await self._until_durable(value for value, _ in values)
        return [next(held) if holder else None for holder in holders]

    def _held(self, semantic_id: SemanticId, item_id: bytes, value: bytes, former: bytes | None) -> Assignment:
        """The assignment of an ID, from what the record keeps of its item."""
        current = read_assignment(item_id.decode(), value, self.layout)
        if current.semantic_id == semantic_id:
            return current
        assigned_at = read_former(former or b"", self.layout).get(semantic_id, current.assigned_at)
        return replace(current, semantic_id=semantic_id, assigned_at=assigned_at, replaced_by=current.semantic_id)

    async def group_sizes(self, groups: Sequence[Sequence[int]]) -> list[int]:
        """How many suffixes have been issued to each of these codes, in order.

        Raises:
            ValueError: Codes that the tokenizer does not have.
            RegistryUnavailable: The server cannot be reached.
        """
        packed = [self.layout.pack(codes) for codes in groups]
        pairs = await self._primary.read(
            [("HMGET", self._keys.reverse(codes), codes, codes + b"0") for codes in packed]
        )
        return [int(highest) + 1 if highest else int(first is not None) for highest, first in pairs]

    async def count(self) -> int:
        """The number of live assignments.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        return int((await self._primary.read([("HGET", self._keys.meta, b"count")]))[0] or 0)

    async def settle(self) -> None:
        """Returns when all that was read before is as durable as promised, by an empty call where that needs one."""
        if self._primary.unchecked:
            await self._primary.call(self._primary.recheck)
        if self._primary.waits:
            await self._queue.submit([])

    @property
    def idle(self) -> bool:
        """Whether no claim waits or is on its way."""
        return self._queue.idle

    async def drain(self) -> None:
        """Returns when no claim waits or is on its way."""
        await self._queue.drain()

    async def _submit(self, requests: Iterable[tuple[str, bytes]]) -> list[Reply]:
        encoded = [(item_id.encode(), request) for item_id, request in requests]
        if not encoded:
            return []
        return await self._queue.submit(
            [Request(self._keys.forward(item_id), item_id, request) for item_id, request in encoded]
        )

    async def _send(self, requests: Sequence[Request]) -> list[Reply]:
        keys: list[bytes] = [self._keys.meta]
        arguments: list[bytes] = [*self._facts, b"%d" % self._revision]
        for forward_key, item_id, request in requests:
            keys.append(forward_key)
            arguments += (item_id, request)
        now, revision, *replies = await self._primary.call(partial(self._evaluate, keys, arguments))
        if revision:
            self._revision = max(self._revision, revision)
            self.changes.revised(revision)
        at = datetime.fromtimestamp(now, UTC)
        return [Reply(reply, at) for reply in replies]

    async def _evaluate(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[Any]:
        try:
            return await self._primary.evaluate(_SCRIPT, keys, arguments)
        except ResponseError as error:
            if str(error).startswith("OLDER"):
                epoch, revision = str(error).split(" ")[1:]
                found = f"revision {revision} of epoch {epoch}" if epoch else "nothing"
                msg = f"The record {self._keys.name} was at revision {self._revision}; the registry has {found}."
                raise RegistryOlder(msg) from error
            raise

    async def _until_durable(self, values: Iterable[bytes]) -> None:
        """Answering an assignment acknowledges it: one that may not be synced yet is waited for."""
        if self._primary.unchecked:
            await self._primary.call(self._primary.recheck)
        latest = max(map(latest_time, values), default=-1)
        if self._primary.waits and 0 <= latest < self._primary.durable_before:
            (returned,) = await self._primary.read([("HGET", self._keys.meta, b"returned")])
            latest = max(latest, int(returned or 0))
        if self._primary.waits and latest >= self._primary.durable_before:
            await self._queue.submit([])
