"""The durable record of which item holds which Semantic ID.

    claim --> queue (what waits is merged) --> one script call --> [WAITAOF] --> acknowledged

The key schema stands at the top of `registry.lua`. Redis errors end here: callers see `RegistryUnavailable` when
waiting may help and `RegistryRefused` at start when a setting has to change.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from zlib import crc32

from service.errors import RegistryRefused, RegistryUnavailable
from service.primary import Durability, Primary, Script
from service.semantic_id import CodeLayout, SemanticId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence


SCHEMA = 1
DEFAULT_BUCKETS = 16_384
DIGEST_BYTES = 8
CLAIMS_PER_CALL = 1024
RECORDS_KEPT = 1024
CALLS_IN_FLIGHT = 2  # one is on the server while the next is put together
CONTENT_CHANGED = 0b1

_SCRIPT = Script(Path(__file__).with_name("registry.lua").read_bytes())


class Claim(NamedTuple):
    """An item that wants its Semantic ID.

    Attributes:
        item_id: The item's own opaque key.
        codes: The codes of its content, one a level.
        digest: 8 bytes of its content's digest.
    """

    item_id: str
    codes: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Assignment:
    """The durable record item id <-> Semantic ID.

    Attributes:
        item_id: The item's own opaque key.
        semantic_id: The ID it holds, for good.
        assigned_at: When it was assigned, by the server's clock, in whole seconds, UTC.
        digest: 8 bytes of the digest of its latest content.
        content_changed: Whether its latest content has other codes than its ID.
    """

    item_id: str
    semantic_id: SemanticId
    assigned_at: datetime
    digest: bytes
    content_changed: bool


class ClaimResult(NamedTuple):
    """The answer to a claim: what the item holds, and whether it holds it only since now."""

    assignment: Assignment
    created: bool


class Registry:
    """A server of the Redis protocol, and the records in it."""

    def __init__(self, primary: Primary, buckets: int) -> None:
        """Use `connect`."""
        self._primary = primary
        self._buckets = buckets
        self._records: dict[tuple[str, str, tuple[int, ...]], Record] = {}

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
        self, namespace: str, fingerprint: str, codebook_sizes: Sequence[int], *, create: bool = True
    ) -> Record:
        """The record of one namespace under one tokenizer.

        Args:
            namespace: An independent catalogue.
            fingerprint: The tokenizer's.
            codebook_sizes: The number of codewords of each of its levels.
            create: Whether a record that does not exist yet is made; reading alone should leave nothing behind.

        Raises:
            ValueError: The namespace, the fingerprint or the sizes cannot name a record.
            RegistryRefused: The record in the server was made with other codebook sizes or by another schema.
            RegistryUnavailable: The server cannot be reached.
        """
        layout = CodeLayout(codebook_sizes)
        name = (namespace, fingerprint, layout.codebook_sizes)
        if name in self._records:
            return self._records[name]
        prefix = _prefix(namespace, fingerprint)
        buckets = await self._primary.call(partial(self._buckets_of, prefix, layout, create=create))
        record = Record(self._primary, prefix, layout, buckets or self._buckets)
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

    def __init__(self, primary: Primary, prefix: bytes, layout: CodeLayout, buckets: int) -> None:
        """Use `Registry.record`."""
        self.layout = layout
        self.buckets = buckets
        self._primary = primary
        self._meta = prefix + b"meta"
        self._forward = prefix + b"f:"
        self._reverse = prefix + b"r:"
        self._queue = _ClaimQueue(self._send)

    async def claim(self, claims: Sequence[Claim]) -> list[ClaimResult]:
        """Gives each item its one Semantic ID: the one it holds, or the next free suffix of its codes.

        A known item keeps its ID whatever its codes; the record keeps its latest digest. Acknowledged only after the
        durability asked for. A caller cancelled before its claims were sent has claimed nothing. Where a connection
        broke between an assignment and its answer, the repeated claim finds it: `created` is False then.

        Returns:
            An answer for each claim, in order.

        Raises:
            ValueError: Codes that the tokenizer does not have, or a digest that has not 8 bytes.
            RegistryUnavailable: Nothing is acknowledged, though some may be assigned: claim again.
        """
        packed = [self._packed(claim) for claim in claims]
        chunks = [packed[start : start + CLAIMS_PER_CALL] for start in range(0, len(packed), CLAIMS_PER_CALL)]
        answers = await asyncio.gather(*map(self._queue.submit, chunks))
        return [result for answer in answers for result in answer]

    async def by_item_ids(self, item_ids: Sequence[str]) -> list[Assignment | None]:
        """The assignments of these items, in order; None for an item that has none.

        Raises:
            RegistryUnavailable: The server cannot be reached, or cannot confirm that what it answered is durable.
        """
        fields = [item_id.encode() for item_id in item_ids]
        values = await self._read([("HGET", self._forward_key(field), field) for field in fields])
        found = [self._assignment(*pair) if pair[1] else None for pair in zip(item_ids, values, strict=True)]
        await self._until_durable(value for value in values if value)
        return found

    async def by_semantic_ids(self, semantic_ids: Sequence[SemanticId]) -> list[Assignment | None]:
        """The assignments of these Semantic IDs, in order; None where no item holds the ID.

        Raises:
            ValueError: Codes that the tokenizer does not have.
            RegistryUnavailable: As in `by_item_ids`.
        """
        commands = []
        for semantic_id in semantic_ids:
            codes = self.layout.pack(semantic_id.codes)
            commands.append(("HGET", self._reverse_key(codes), codes + b"%d" % semantic_id.suffix))
        holders = [value and value.decode() for value in await self._read(commands)]
        held = iter(await self.by_item_ids([holder for holder in holders if holder is not None]))
        return [None if holder is None else next(held) for holder in holders]

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
        """The number of assignments.

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
        return self._reverse + b"%d" % (crc32(self.layout.inner_prefix(codes)) % self.buckets)

    def _packed(self, claim: Claim) -> _PackedClaim:
        if len(claim.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(claim.digest)}")
        item_id, codes = claim.item_id.encode(), self.layout.pack(claim.codes)
        return _PackedClaim(claim, self._forward_key(item_id), self._reverse_key(codes), item_id, claim.digest + codes)

    async def _send(self, claims: Sequence[_PackedClaim]) -> list[ClaimResult]:
        keys: list[bytes] = [self._meta]
        arguments: list[bytes] = []
        for claim in claims:
            keys += (claim.forward_key, claim.reverse_key)
            arguments += (claim.item_id, claim.content)
        now, *replies = await self._primary.call(lambda: self._primary.evaluate(_SCRIPT, keys, arguments))
        assigned_at = datetime.fromtimestamp(now, UTC)
        return [self._result(packed.claim, reply, assigned_at) for packed, reply in zip(claims, replies, strict=True)]

    def _result(self, claim: Claim, reply: int | bytes, assigned_at: datetime) -> ClaimResult:
        if isinstance(reply, bytes):
            return ClaimResult(self._assignment(claim.item_id, reply), created=False)
        semantic_id = SemanticId(tuple(claim.codes), reply)
        return ClaimResult(Assignment(claim.item_id, semantic_id, assigned_at, claim.digest, False), created=True)

    def _assignment(self, item_id: str, value: bytes) -> Assignment:
        """What `registry.lua` wrote: state 1 | assigned_at 4 | digest 8 | codes | suffix in decimal."""
        end = 13 + self.layout.width
        return Assignment(
            item_id,
            SemanticId(self.layout.unpack(value[13:end]), int(value[end:])),
            datetime.fromtimestamp(_assigned_at(value), UTC),
            value[5:13],
            bool(value[0] & CONTENT_CHANGED),
        )

    async def _read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        answers: list[Any] = []
        for start in range(0, len(commands), CLAIMS_PER_CALL):
            chunk = commands[start : start + CLAIMS_PER_CALL]
            answers += await self._primary.call(partial(self._primary.pipelined, chunk))
        return answers

    async def _until_durable(self, values: Iterable[bytes]) -> None:
        """Answering an assignment acknowledges it: one that may not be synced yet is waited for, by an empty claim."""
        if self._primary.unchecked:
            await self._primary.call(self._primary.recheck)
        if self._primary.waits and max(map(_assigned_at, values), default=-1) >= self._primary.durable_before:
            await self._queue.submit([])


class _PackedClaim(NamedTuple):
    claim: Claim
    forward_key: bytes
    reverse_key: bytes
    item_id: bytes
    content: bytes


class _Waiting(NamedTuple):
    claims: Sequence[_PackedClaim]
    answer: asyncio.Future[list[ClaimResult]]


class _ClaimQueue:
    """Merges what callers claim while a call is on its way into the next one; no timer.

    The calls run in tasks of their own, so that a caller who is cancelled cancels only its own waiting.
    """

    def __init__(self, send: Callable[[Sequence[_PackedClaim]], Awaitable[list[ClaimResult]]]) -> None:
        self._send = send
        self._pending: deque[_Waiting] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    async def submit(self, claims: Sequence[_PackedClaim]) -> list[ClaimResult]:
        """The answers to these claims, which are sent together, at most `CLAIMS_PER_CALL` of them."""
        answer: asyncio.Future[list[ClaimResult]] = asyncio.get_running_loop().create_future()
        self._pending.append(_Waiting(claims, answer))
        if len(self._senders) < CALLS_IN_FLIGHT:
            sender = asyncio.create_task(self._send_pending(), name="registry-claims")
            self._senders.add(sender)
        return await answer

    @property
    def idle(self) -> bool:
        return not self._senders

    async def drain(self) -> None:
        while self._senders:
            await asyncio.wait(self._senders)

    async def _send_pending(self) -> None:
        try:
            while batch := self._next_batch():
                await self._send_batch(batch)
        finally:
            # Here and not in a done callback, which would run later: `submit` could count a sender that has ended.
            self._senders.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _send_batch(self, batch: Sequence[_Waiting]) -> None:
        try:
            results = await self._send([claim for waiting in batch for claim in waiting.claims])
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            _fail(batch, error)
        except asyncio.CancelledError:
            _fail(batch, RegistryUnavailable("The service is shutting down."))
            raise
        else:
            _answer(batch, results)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        room = CLAIMS_PER_CALL
        while self._pending and len(self._pending[0].claims) <= room:
            waiting = self._pending.popleft()
            if not waiting.answer.done():  # else its caller has left
                batch.append(waiting)
                room -= len(waiting.claims)
        return batch


def _answer(batch: Sequence[_Waiting], results: Sequence[ClaimResult]) -> None:
    start = 0
    for claims, answer in batch:
        if not answer.done():
            answer.set_result(list(results[start : start + len(claims)]))
        start += len(claims)


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)


def _prefix(namespace: str, fingerprint: str) -> bytes:
    if not namespace or not fingerprint or ":" in fingerprint or set("{}") & set(namespace + fingerprint):
        # Braces would be a hash tag; with a colon in the fingerprint two records could share keys.
        raise ValueError(f"these cannot name a record: namespace {namespace!r}, fingerprint {fingerprint!r}")
    return f"sid:{namespace}:{fingerprint}:".encode()


def _assigned_at(value: bytes) -> int:
    return int.from_bytes(value[1:5])
