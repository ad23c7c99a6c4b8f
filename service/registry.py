"""The durable record of which item holds which Semantic ID.

    claim, retire --> queue (what waits is merged) --> one script call --> [WAITAOF] --> acknowledged

The key schema stands at the top of `registry.lua`. Redis errors end here: callers see `RegistryUnavailable` when
waiting may help and `RegistryRefused` at start when a setting has to change.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from service.assignment import (
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
from service.errors import RegistryRefused, SuffixExhausted
from service.primary import Durability, Primary, Script
from service.registry_queue import REQUESTS_PER_CALL, Reply, Request, RequestQueue
from service.semantic_id import MAX_SUFFIX, CodeLayout, SemanticId, hash_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Assignment", "Claim", "ClaimResult", "Durability", "Record", "Registry"]

SCHEMA = 2
DEFAULT_BUCKETS = 16_384
RECORDS_KEPT = 1024

_SCRIPT = Script(Path(__file__).with_name("registry.lua").read_bytes())


class Registry:
    """A server of the Redis protocol, and the records in it."""

    def __init__(self, primary: Primary, buckets: int) -> None:
        """Use `connect`."""
        self._primary = primary
        self._buckets = buckets
        self._records: dict[tuple[str, str, tuple[int, ...], int], Record] = {}

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        durability: Durability | str = Durability.FSYNC,
        timeout_ms: int = 2000,
        retry_ms: int = 1000,
        buckets: int = DEFAULT_BUCKETS,
    ) -> Registry:
        """Connects, and checks that the server can keep what `durability` promises.

        Args:
            url: `redis://`, `rediss://` or `unix://`.
            durability: What an acknowledgement waits for.
            timeout_ms: How long one call may take.
            retry_ms: How long a dropped or refused connection is tried again, as after a restart of the server.
            buckets: The number of buckets of a new record; one that exists keeps its own.

        Raises:
            RegistryRefused: The server cannot keep the promise; the message names the setting to change.
            RegistryUnavailable: The server cannot be reached, or does not serve yet.
        """
        if not 1 <= buckets <= 2**32:
            raise RegistryRefused(f"A record has 1 to 2**32 buckets, not {buckets}.")
        primary = Primary(url, durability, timeout_ms, retry_ms)
        try:
            await primary.call(primary.check)
        except BaseException:
            await primary.close()
            raise
        return cls(primary, buckets)

    async def ping(self) -> None:
        """Returns where the server answers and serves.

        Raises:
            RegistryUnavailable: It does not.
        """
        await self._primary.call(lambda: self._primary.command("PING"), retried=False)

    async def close(self) -> None:
        """Sends what still waits, then closes the connections."""
        for record in self._records.values():
            await record.drain()
        await self._primary.close()

    async def record(
        self,
        namespace: str,
        fingerprint: str,
        codebook_sizes: Sequence[int],
        *,
        max_suffix: int | None = None,
        create: bool = True,
    ) -> Record:
        """The record of one namespace under one tokenizer.

        Args:
            namespace: An independent catalogue.
            fingerprint: The tokenizer's.
            codebook_sizes: The number of codewords of each of its levels.
            max_suffix: The highest suffix that it may issue; without bound where None.
            create: Whether a record that does not exist yet is made; reading alone should leave nothing behind.

        Raises:
            ValueError: The namespace, the fingerprint or the sizes cannot name a record.
            RegistryRefused: The record in the server was made with other codebook sizes or by another schema.
            RegistryUnavailable: The server cannot be reached.
        """
        layout = CodeLayout(codebook_sizes)
        highest = MAX_SUFFIX if max_suffix is None else max_suffix
        name = (namespace, fingerprint, layout.codebook_sizes, highest)
        if name in self._records:
            return self._records[name]
        prefix = _prefix(namespace, fingerprint)
        buckets = await self._primary.call(partial(self._buckets_of, prefix, layout, create=create))
        record = Record(self._primary, prefix, layout, buckets or self._buckets, highest)
        if buckets is None:
            return record  # where nothing will be found
        self._forget_idle_records()
        # Another caller may have been faster, and both must share one queue to be merged.
        return self._records.setdefault(name, record)

    def _forget_idle_records(self) -> None:
        """Keeps memory bounded however many namespaces are named; a record is cheap to make again."""
        if len(self._records) >= RECORDS_KEPT:
            self._records = {name: record for name, record in self._records.items() if not record.idle}

    async def _buckets_of(self, prefix: bytes, layout: CodeLayout, *, create: bool) -> int | None:
        """The record's number of buckets, after comparing its other facts with ours; None where there is no record."""
        ours = {
            "schema": str(SCHEMA),
            "codebook_sizes": ",".join(map(str, layout.codebook_sizes)),
            "buckets": str(self._buckets),
        }
        key = prefix + b"meta"
        read = ("HMGET", key, *ours)
        theirs = await self._primary.command(*read)
        if None in theirs:
            if not create:
                return None
            # Each fact is set once; who comes second reads what the first wrote.
            set_once = [("HSETNX", key, name, value) for name, value in ours.items()]
            theirs = (await self._primary.pipelined([*set_once, read]))[-1]
        schema, codebook_sizes, buckets = (value.decode() for value in theirs)
        if (schema, codebook_sizes) != (ours["schema"], ours["codebook_sizes"]):
            raise RegistryRefused(
                f"The record {prefix.decode()} has schema {schema} and codebooks {codebook_sizes}, this service schema "
                f"{ours['schema']} and codebooks {ours['codebook_sizes']}: another tokenizer or version made it."
            )
        return int(buckets)


class Record:
    """One namespace's assignments under one tokenizer."""

    def __init__(self, primary: Primary, prefix: bytes, layout: CodeLayout, buckets: int, max_suffix: int) -> None:
        """Use `Registry.record`."""
        self.layout = layout
        self.buckets = buckets
        self._primary = primary
        self._meta = prefix + b"meta"
        self._forward = prefix + b"f:"
        self._reverse = prefix + b"r:"
        self._facts = tuple(b"%d" % fact for fact in (buckets, layout.width, layout.bytes_per_code, max_suffix))
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
        values = await self._read([("HGET", self._forward_key(field), field) for field in fields])
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
        holders = await self._read([("HGET", self._reverse_key(field), field) for field in fields])
        asked = [
            (semantic_id, holder.removeprefix(DEAD))
            for semantic_id, holder in zip(semantic_ids, holders, strict=True)
            if holder
        ]
        # Former IDs lie beside the assignment: one round trip answers both.
        values = await self._read([("HMGET", self._forward_key(item), item, DEAD + item) for _, item in asked])
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
        pairs = await self._read([("HMGET", self._reverse_key(codes), codes, codes + b"0") for codes in packed])
        return [int(highest) + 1 if highest else int(first is not None) for highest, first in pairs]

    async def count(self) -> int:
        """The number of live assignments.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        return int((await self._read([("HGET", self._meta, b"count")]))[0] or 0)

    @property
    def idle(self) -> bool:
        """Whether no claim waits or is on its way."""
        return self._queue.idle

    async def drain(self) -> None:
        """Returns when no claim waits or is on its way."""
        await self._queue.drain()

    def _forward_key(self, item_id: bytes) -> bytes:
        return self._forward + b"%d" % (crc32(item_id) % self.buckets)

    def _reverse_key(self, codes: bytes) -> bytes:
        """Of packed codes, or of what begins with them."""
        return self._reverse + b"%d" % (hash_prefix(self.layout.inner_prefix(codes)) % self.buckets)

    async def _submit(self, requests: Iterable[tuple[str, bytes]]) -> list[Reply]:
        encoded = [(item_id.encode(), request) for item_id, request in requests]
        if not encoded:
            return []
        return await self._queue.submit(
            [Request(self._forward_key(item_id), item_id, request) for item_id, request in encoded]
        )

    async def _send(self, requests: Sequence[Request]) -> list[Reply]:
        keys: list[bytes] = [self._meta]
        arguments: list[bytes] = [*self._facts]
        for forward_key, item_id, request in requests:
            keys.append(forward_key)
            arguments += (item_id, request)
        now, *replies = await self._primary.call(lambda: self._primary.evaluate(_SCRIPT, keys, arguments))
        at = datetime.fromtimestamp(now, UTC)
        return [Reply(reply, at) for reply in replies]

    async def _read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        answers: list[Any] = []
        for start in range(0, len(commands), REQUESTS_PER_CALL):
            chunk = commands[start : start + REQUESTS_PER_CALL]
            answers += await self._primary.call(partial(self._primary.pipelined, chunk))
        return answers

    async def _until_durable(self, values: Iterable[bytes]) -> None:
        """Answering an assignment acknowledges it: one that may not be synced yet is waited for, by an empty call."""
        if self._primary.unchecked:
            await self._primary.call(self._primary.recheck)
        if self._primary.waits and max(map(latest_time, values), default=-1) >= self._primary.durable_before:
            await self._queue.submit([])


def _prefix(namespace: str, fingerprint: str) -> bytes:
    if not namespace or not fingerprint or ":" in fingerprint or set("{}") & set(namespace + fingerprint):
        # Braces would be a hash tag; with a colon in the fingerprint two records could share keys.
        raise ValueError(f"these cannot name a record: namespace {namespace!r}, fingerprint {fingerprint!r}")
    return f"sid:{namespace}:{fingerprint}:".encode()
