r"""One namespace's assignments under one tokenizer.

    claim, retire --> queue (what waits is merged) --> atomic: one script call  --> [wait] --> acknowledged
                                                   \-> stepwise, on a cluster  -/

The key schema stands at the top of `lib.lua`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from service.errors import RegistryOlder
from service.registry.assignment import (
    Assignment,
    Claim,
    ClaimResult,
    claimed,
    read_assignment,
    read_former,
    read_holder,
    write_semantic_id,
)
from service.registry.assignment_columns import Held, pack, read_held, row_bytes, write_contents
from service.registry.atomic import AtomicRecord
from service.registry.changes import ChangeLog
from service.registry.cluster import Cluster, Server
from service.registry.contents import Contents
from service.registry.displays import Displays
from service.registry.history import RecordFacts
from service.registry.mending import Mended, Mending
from service.registry.request_queue import Reply, Request
from service.registry.restoring import Restored, restored, restoring
from service.registry.stepwise import SteppedRecord
from service.registry.tree import LiveTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from service.errors import SuffixExhausted
    from service.registry.history import History
    from service.registry.keys import RecordKeys
    from service.semantic_id import SemanticId


class Record:
    """One namespace's assignments under one tokenizer."""

    def __init__(
        self,
        server: Server,
        keys: RecordKeys,
        history: History,
        *,
        max_suffix: int,
        changes_kept: int,
        display_bytes: int = 0,
    ) -> None:
        """Use `Registry.record`."""
        self.history = history
        self.layout = keys.layout
        self.buckets = keys.buckets
        self.changes = ChangeLog(history, keys, self.settle, self._holders)
        self.tree = LiveTree(history, keys, self.flush)
        self._server = server
        self._keys = keys
        facts = RecordFacts(max_suffix, changes_kept, history)
        self._items: AtomicRecord | SteppedRecord
        if isinstance(server, Cluster):
            self._items = SteppedRecord(server, keys, facts, self.changes.revised)
        else:
            self._items = AtomicRecord(server, keys, facts, self.changes.revised)
        self.contents = Contents(history, keys, self._items.histories)
        self.displays = Displays(server, history, keys, max_bytes=display_bytes)

    @property
    def claims_at_once(self) -> bool:
        """Whether a claim is one call, whoever is known; on a cluster it takes several steps."""
        return isinstance(self._items, AtomicRecord)

    async def claim(self, claims: Sequence[Claim]) -> list[ClaimResult | SuffixExhausted]:
        """Gives each item its one Semantic ID: the one it holds, or the next free suffix of its codes.

        A known item keeps its ID whatever its codes, unless it asks to be reassigned and its ID was not given to just
        this content; the record keeps its latest digest. A retired one gets back the ID it held. One that is reassigned
        to codes it had before gets back the ID that it had then. Acknowledged only after the durability asked for. A
        caller cancelled before its claims were sent has claimed nothing. Where a connection broke between an assignment
        and its answer, the repeated claim finds it: `created` is False then.

        Returns:
            An answer for each claim, in order; for one whose codes have no suffix left, that error, and what the item
            held stands.

        Raises:
            ValueError: Codes that the tokenizer does not have, or a digest that has not 8 bytes.
            RegistryUnavailable: Nothing is acknowledged, though some may be assigned: claim again.
        """
        replies = await self._submit((claim.item_id, claim.request(self.layout)) for claim in claims)
        return [claimed(claim, reply, self.layout) for claim, reply in zip(claims, replies, strict=True)]

    async def held(self, item_ids: Sequence[bytes]) -> Held:
        """What these items hold, in order, as columns.

        Raises:
            RegistryUnavailable: As in `by_item_ids`.
        """
        return read_held(await self._items.held(item_ids), self.layout)

    async def claim_columns(
        self, item_ids: Sequence[bytes], digests: NDArray[np.uint64], codes: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Gives each item that is new its ID, like `claim`: tens of thousands at once, while others are served.

        What is known already stays as it is. On a single primary, items of equal codes get their suffixes in order.

        Args:
            item_ids: B of them; the first of equal ones is new, by the order of their codes.
            digests: (B,).
            codes: (B, L).

        Returns:
            The suffix (B,) of each ID that was issued now; -1 where the item had one already, or its codes have none
            left: claim those by themselves, which says what they hold.

        Raises:
            ValueError: Codes that the tokenizer does not have.
            RegistryUnavailable: As in `claim`.
        """
        contents = write_contents(digests, codes, self.layout)
        order = np.lexsort(codes.T[::-1])
        places = order.tolist()
        suffixes = np.empty(len(places), np.int64)
        suffixes[order] = await self._items.issue([item_ids[i] for i in places], [contents[i] for i in places])
        return suffixes

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

    async def restore(self, assignments: Sequence[Assignment]) -> list[Restored]:
        """Puts IDs back that were assigned elsewhere under this tokenizer, with their times.

        What the record holds stands: an ID that is its item's already is left as it is, and none is renamed. An item's
        present ID has to come before those that it held before. Acknowledged like a claim.

        Returns:
            What became of each, in order.

        Raises:
            ValueError: Codes that the tokenizer does not have, a digest that has not 8 bytes, or a time out of range.
            RegistryUnavailable: Nothing is acknowledged, though some may be restored: restore again.
        """
        if not assignments:
            return []
        replies = await self._items.restore([restoring(assignment, self.layout) for assignment in assignments])
        return [restored(pair[0], pair[1], self.layout) for pair in zip(assignments, replies, strict=True)]

    async def by_item_ids(self, item_ids: Sequence[str]) -> list[Assignment | None]:
        """The assignments of these items, in order, retired ones too; None for an item that has none.

        Raises:
            RegistryUnavailable: The server cannot be reached, or cannot confirm that what it answered is durable.
        """
        held = await self._items.held([item_id.encode() for item_id in item_ids])
        return [
            read_assignment(item_id, value, self.layout) if value else None
            for item_id, value in zip(item_ids, held, strict=True)
        ]

    async def by_semantic_ids(self, semantic_ids: Sequence[SemanticId]) -> list[Assignment | None]:
        """The assignments of these Semantic IDs, in order, retired and replaced ones too; None for one never issued.

        Raises:
            ValueError: Codes that the tokenizer does not have.
            RegistryUnavailable: As in `by_item_ids`.
        """
        fields = [write_semantic_id(semantic_id, self.layout) for semantic_id in semantic_ids]
        holders = await self._holders(fields)
        asked = [
            (semantic_id, read_holder(holder)[0])
            for semantic_id, holder in zip(semantic_ids, holders, strict=True)
            if holder
        ]
        held = await self._items.histories([item_id for _, item_id in asked])
        found = iter([self._assignment(*pair, *values) for pair, values in zip(asked, held, strict=True)])
        return [next(found) if holder else None for holder in holders]

    def _assignment(
        self, semantic_id: SemanticId, item_id: bytes, value: bytes | None, former: bytes | None
    ) -> Assignment:
        """The assignment of an ID, from what the record keeps of its item."""
        if value is None:
            raise RegistryOlder(f"The record {self._keys.name} names an item for {semantic_id}, which holds nothing.")
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
        return await self._items.group_sizes([self.layout.pack(codes) for codes in groups])

    async def group_size_columns(self, codes: NDArray[np.int32]) -> NDArray[np.int64]:
        """The same of codes (B, L), tens of thousands at once: (B,).

        Raises:
            ValueError, RegistryUnavailable: As in `group_sizes`.
        """
        return np.array(await self._items.group_sizes(row_bytes(pack(codes, self.layout))), np.int64)

    async def count(self) -> int:
        """The number of live assignments.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        return int((await self.history.read([("HGET", self._keys.meta, b"count")]))[0] or 0)

    async def settle(self) -> None:
        """Returns when all that was read before is as durable as promised."""
        await self._items.settle()

    async def mend(self) -> Mended | None:
        """Makes the record whole again where it lies on several servers, of which some lost a part; else None.

        No service may write to it meanwhile.

        Raises:
            RegistryUnavailable: A server cannot be reached; mend again.
        """
        if isinstance(self._items, SteppedRecord) and isinstance(self._server, Cluster):
            return await Mending(self._server, self._keys, self._items, self.contents, self.tree).mend()
        return None

    async def flush(self) -> None:
        """Returns when the log has every change that could be seen."""
        await self._items.flush()

    @property
    def idle(self) -> bool:
        """Whether no claim waits or is on its way."""
        return self._items.idle and self.displays.idle

    async def drain(self) -> None:
        """Returns when no claim waits or is on its way."""
        await self._items.drain()
        await self.displays.drain()

    async def _holders(self, semantic_ids: Sequence[bytes]) -> list[bytes | None]:
        """What stands for each of these packed IDs."""
        return await self._items.holders(semantic_ids)

    async def _submit(self, requests: Iterable[tuple[str, bytes]]) -> list[Reply]:
        encoded = [Request(item_id.encode(), request) for item_id, request in requests]
        return await self._items.submit(encoded) if encoded else []
