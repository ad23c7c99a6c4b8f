"""The durable record of which item holds which Semantic ID.

    claim --> queue (what waits is merged) --> one script call --> [WAITAOF] --> acknowledged

The key schema stands at the top of `registry.lua`. Redis errors end here: callers see `RegistryUnavailable` when
waiting may help and `RegistryRefused` at start when a setting has to change.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit
from zlib import crc32

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.errors import RegistryRefused, RegistryUnavailable
from service.semantic_id import CodeLayout, SemanticId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMA = 1
DEFAULT_BUCKETS = 16_384
DIGEST_BYTES = 8
CLAIMS_PER_CALL = 1024
CALLS_IN_FLIGHT = 2  # one is on the server while the next is put together
CONNECTIONS = 16
FIRST_RETRY_DELAY_S = 0.02
CONTENT_CHANGED = 0b1

_SCRIPT = Path(__file__).with_name("registry.lua").read_bytes()
_SCRIPT_SHA1 = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()


class Durability(StrEnum):
    """What has to have happened before an assignment is acknowledged."""

    MEMORY = "memory"
    """The server has it in memory; a crash of the server may lose it."""
    FSYNC = "fsync"
    """It is synced to the server's disk."""


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

    def __init__(self, primary: _Primary, buckets: int) -> None:
        """Use `connect`."""
        self._primary = primary
        self._buckets = buckets
        self._records: dict[tuple[str, str], Record] = {}

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        durability: Durability = Durability.FSYNC,
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
        primary = _Primary(url, durability, timeout_ms, retry_ms)
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

    async def record(self, namespace: str, fingerprint: str, codebook_sizes: Sequence[int]) -> Record:
        """The record of one namespace under one tokenizer, made where there is none yet.

        Raises:
            ValueError: The namespace, the fingerprint or the sizes cannot name a record.
            RegistryRefused: The record in the server was made with other codebook sizes or by another schema.
            RegistryUnavailable: The server cannot be reached.
        """
        layout = CodeLayout(codebook_sizes)
        known = self._records.get((namespace, fingerprint))
        if known is not None and known.layout.codebook_sizes == layout.codebook_sizes:
            return known
        prefix = _prefix(namespace, fingerprint)
        buckets = await self._primary.call(lambda: self._buckets_of(prefix, layout))
        record = Record(self._primary, prefix, layout, buckets)
        # Another caller may have been faster; both must share one queue.
        return self._records.setdefault((namespace, fingerprint), record)

    async def _buckets_of(self, prefix: bytes, layout: CodeLayout) -> int:
        """Writes the record's facts where they are missing, reads them back, and compares."""
        ours = {
            b"schema": b"%d" % SCHEMA,
            b"codebook_sizes": ",".join(map(str, layout.codebook_sizes)).encode(),
            b"buckets": b"%d" % self._buckets,
        }
        key = prefix + b"meta"
        theirs = await self._primary.pipelined([("HMGET", key, *ours)])
        if None in theirs[0]:
            missing = [("HSETNX", key, name, value) for name, value in ours.items()]
            theirs = (await self._primary.pipelined([*missing, ("HMGET", key, *ours)]))[-1:]
        for (name, value), found in zip(ours.items(), theirs[0], strict=True):
            if name != b"buckets" and found != value:
                raise RegistryRefused(
                    f"The record {prefix.decode()} has {name.decode()} {found.decode()}, and this service "
                    f"{value.decode()}: it was made by another tokenizer or version."
                )
        return int(theirs[0][2])


class Record:
    """One namespace's assignments under one tokenizer."""

    def __init__(self, primary: _Primary, prefix: bytes, layout: CodeLayout, buckets: int) -> None:
        """Use `Registry.record`."""
        self.layout = layout
        self.buckets = buckets
        self._primary = primary
        self._meta = prefix + b"meta"
        self._forward = prefix + b"f:%d"
        self._reverse = prefix + b"r:%d"
        self._queue = _ClaimQueue(self._send)

    async def claim(self, claims: Sequence[Claim]) -> list[ClaimResult]:
        """Gives each item its one Semantic ID: the one it holds, or the next free suffix of its codes.

        A known item keeps its ID whatever its codes; the record keeps its latest digest. Acknowledged only after the
        durability asked for. A caller cancelled before its claims were sent has claimed nothing.

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

    async def drain(self) -> None:
        """Returns when no claim waits or is on its way."""
        await self._queue.drain()

    def _forward_key(self, item_id: bytes) -> bytes:
        return self._forward % (crc32(item_id) % self.buckets)

    def _reverse_key(self, codes: bytes) -> bytes:
        return self._reverse % (crc32(self.layout.inner_prefix(codes)) % self.buckets)

    def _packed(self, claim: Claim) -> _PackedClaim:
        if len(claim.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(claim.digest)}")
        item_id, codes = claim.item_id.encode(), self.layout.pack(claim.codes)
        return _PackedClaim(claim, self._forward_key(item_id), self._reverse_key(codes), item_id, claim.digest + codes)

    async def _send(self, claims: Sequence[_PackedClaim]) -> list[ClaimResult]:
        keys, arguments = [self._meta], [b"1" if self._primary.waits else b"0"]
        for claim in claims:
            keys += (claim.forward_key, claim.reverse_key)
            arguments += (claim.item_id, claim.content)
        now, *replies = await self._primary.call(lambda: self._primary.evaluate(keys, arguments))
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


class _Primary:
    """The server: its calls bounded in time, shielded and translated; its durability checked.

    Attributes:
        waits: Whether an acknowledgement needs a WAITAOF, as the server's own policy syncs later.
        durable_before: Where `waits`, all that was assigned before this second of the server's clock is synced.
    """

    def __init__(self, url: str, durability: Durability, timeout_ms: int, retry_ms: int) -> None:
        self.address = _address(url)
        self.waits = False
        self.durable_before = 0
        self._durability = Durability(durability)
        self._timeout_ms = timeout_ms
        self._retry_s = retry_ms / 1000
        self._unchecked = True
        self._tasks: set[asyncio.Task[Any]] = set()
        self._client: Redis = Redis.from_pool(self._pool(url))

    def _pool(self, url: str) -> BlockingConnectionPool:
        timeout_s = self._timeout_ms / 1000
        options: dict[str, Any] = {
            "max_connections": CONNECTIONS,
            "timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "socket_timeout": timeout_s + 0.5,  # WAITAOF answers within timeout_ms
            "retry": Retry(NoBackoff(), 0),  # `call` retries, within one bound
            "redis_connect_func": self._on_connect,
            "protocol": 2,
        }
        try:
            pool = BlockingConnectionPool.from_url(url, **options)
        except (ValueError, TypeError) as error:
            raise RegistryRefused(f"SID_REDIS_URL is not a redis://, rediss:// or unix:// URL: {error}") from error
        pool.connection_kwargs["decode_responses"] = False  # keys and values are bytes, whatever the URL asks for
        return pool

    async def _on_connect(self, connection: Any) -> None:
        await connection.on_connect()
        self._unchecked = True  # another server may answer at this address now

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await self._client.connection_pool.disconnect()

    async def call(self, operation: Callable[[], Awaitable[T]], *, retried: bool = True) -> T:
        """Runs an idempotent operation; its caller's cancellation does not reach it.

        A command cancelled between its sending and its reply would leave the reply to the connection's next user.

        Raises:
            RegistryUnavailable: It failed.
        """
        task = asyncio.ensure_future(self._retried(operation, self._retry_s if retried else 0.0))
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left: then nobody else looks

    async def _retried(self, operation: Callable[[], Awaitable[T]], retry_s: float) -> T:
        loop = asyncio.get_running_loop()
        deadline, delay_s = loop.time() + retry_s, FIRST_RETRY_DELAY_S
        while True:
            try:
                return await operation()
            except (redis_errors.RedisError, OSError) as error:
                dropped = isinstance(error, redis_errors.ConnectionError | OSError) and not isinstance(
                    error, redis_errors.AuthenticationError | TimeoutError
                )
                if not dropped or loop.time() + delay_s > deadline:
                    raise RegistryUnavailable(self._plainly(error)) from error
            await asyncio.sleep(delay_s)
            delay_s *= 2

    def _plainly(self, error: Exception) -> str:
        words = {
            redis_errors.BusyLoadingError: "is loading its data",
            redis_errors.AuthenticationError: f"does not accept the credentials ({error})",
            redis_errors.TimeoutError: f"did not answer within {self._timeout_ms} ms",
            redis_errors.ConnectionError: f"cannot be reached ({error})",
            redis_errors.OutOfMemoryError: "has no memory left (maxmemory)",
            redis_errors.ReadOnlyError: "is a read-only replica",
        }
        for kind, what in words.items():
            if isinstance(error, kind):
                return f"The registry at {self.address} {what}."
        return f"The registry at {self.address} failed: {error}"

    async def command(self, *parts: Any) -> Any:
        """One command's answer; inside `call` only."""
        return await self._client.execute_command(*parts)  # type: ignore[no-untyped-call]

    async def pipelined(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """These commands' answers, in one round trip; inside `call` only."""
        if len(commands) == 1:
            return [await self.command(*commands[0])]
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        # Raised below: redis-py's own raising writes whole commands, contents and all, into the message.
        answers = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def evaluate(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[Any]:
        """The script's reply, once what it wrote and read is as durable as promised."""
        rest = (len(keys), *keys, *arguments)
        try:
            reply = await self._evaluate_once("EVALSHA", _SCRIPT_SHA1, *rest)
        except redis_errors.NoScriptError:  # a fresh server, or SCRIPT FLUSH
            reply = await self._evaluate_once("EVAL", _SCRIPT, *rest)
        if self._unchecked:
            try:
                await self.check()
            except RegistryRefused as error:
                raise RegistryUnavailable(str(error)) from error
        return reply

    async def _evaluate_once(self, *command: Any) -> list[Any]:
        if not self.waits:
            return cast("list[Any]", await self.command(*command))
        reply, synced = await self.pipelined([command, ("WAITAOF", 1, 0, self._timeout_ms)])
        if synced[0] < 1:
            raise RegistryUnavailable(
                f"The registry at {self.address} did not confirm the sync to disk within {self._timeout_ms} ms."
            )
        self.durable_before = max(self.durable_before, reply[0])
        return cast("list[Any]", reply)

    async def check(self) -> None:
        """Learns whether to wait for the sync, and refuses a server that would break the promise.

        Raises:
            RegistryRefused: The message names the setting.
        """
        self._unchecked = False
        try:
            await self._check()
        except redis_errors.AuthenticationError as error:
            raise RegistryRefused(self._plainly(error)) from error
        except BaseException:
            self._unchecked = True
            raise

    async def _check(self) -> None:
        config = await self._config()
        if config.get("maxmemory", "0") != "0" and config.get("maxmemory-policy", "").startswith("allkeys"):
            raise RegistryRefused(
                f"The registry at {self.address} evicts keys when its memory is full, and with them acknowledged "
                f"Semantic IDs: set its maxmemory-policy ({config['maxmemory-policy']}) to noeviction."
            )
        server = await self._information()
        if server.get("redis_mode") == "cluster":
            raise RegistryRefused(f"The registry at {self.address} is a cluster; this version needs a single primary.")
        if self._durability is Durability.FSYNC:
            await self._check_sync(config, server)

    async def _check_sync(self, config: dict[str, str], server: dict[str, Any]) -> None:
        if config.get("appendonly") == "no":
            raise RegistryRefused(
                f"The registry at {self.address} has no append-only file: turn it on (appendonly yes), or weaken "
                "the promise with SID_DURABILITY=memory."
            )
        if config.get("appendfsync") == "no":
            raise RegistryRefused(
                f"The registry at {self.address} never syncs (appendfsync no): set it to always or everysec, or weaken "
                "the promise with SID_DURABILITY=memory."
            )
        waits = config.get("appendfsync") != "always"
        if waits:
            try:
                await self.command("WAITAOF", 1, 0, self._timeout_ms)
            except redis_errors.ResponseError as error:
                raise RegistryRefused(
                    f"The registry at {self.address} (version {server.get('redis_version', 'unknown')}) cannot confirm "
                    f"that a write is on disk ({error}): set its appendonly yes and appendfsync always, use Valkey or "
                    "Redis 7.2 or later, or weaken the promise with SID_DURABILITY=memory."
                ) from error
        self.waits = waits
        self.durable_before = 0

    async def _config(self) -> dict[str, str]:
        """The settings that matter; empty where CONFIG is forbidden, as with hosted servers."""
        names = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
        try:
            answer = await self.command("CONFIG GET", *names)
        except redis_errors.ResponseError as error:
            logger.info("CONFIG is not open to us (%s): each write is confirmed by WAITAOF", error)
            return {}
        return {_text(name): _text(value) for name, value in answer.items()}

    async def _information(self) -> dict[str, Any]:
        try:
            return cast("dict[str, Any]", await self._client.info("server"))
        except redis_errors.ResponseError:
            return {}


def _prefix(namespace: str, fingerprint: str) -> bytes:
    if not namespace or not fingerprint or ":" in fingerprint or set("{}") & set(namespace + fingerprint):
        # Braces would be a hash tag; with a colon in the fingerprint two records could share keys.
        raise ValueError(f"these cannot name a record: namespace {namespace!r}, fingerprint {fingerprint!r}")
    return f"sid:{namespace}:{fingerprint}:".encode()


def _assigned_at(value: bytes) -> int:
    return int.from_bytes(value[1:5])


def _address(url: str) -> str:
    """The URL without what may be secret."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
