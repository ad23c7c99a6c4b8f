"""One server of the Redis protocol: its calls bounded in time, shielded and translated; its durability checked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.errors import RegistryRefused, RegistryUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONNECTIONS = 16
COMMANDS_PER_ROUND_TRIP = 1024
FIRST_RETRY_DELAY_S = 0.02


class Durability(StrEnum):
    """What has to have happened before an assignment is acknowledged."""

    MEMORY = "memory"
    """The server has it in memory; a crash of the server may lose it."""
    FSYNC = "fsync"
    """It is synced to the server's disk."""


class Script:
    """A Lua script: sent by its hash, in full only where the server does not know it."""

    def __init__(self, source: bytes) -> None:
        """Keeps the source and its SHA-1, by which the protocol names scripts."""
        self.source = source
        self.sha1 = hashlib.sha1(source, usedforsecurity=False).hexdigest()


class Primary:
    """The server: its calls bounded in time, shielded and translated; its durability checked.

    Attributes:
        waits: Whether an acknowledgement needs a WAITAOF, as the server's own policy syncs later.
        durable_before: Where `waits`, all that was assigned before this second of the server's clock is synced.
    """

    def __init__(self, url: str, durability: Durability | str, timeout_ms: int, retry_ms: int) -> None:
        self.address = _address(url)
        self.waits = False
        self.durable_before = 0
        self._durability = Durability(durability)
        self._timeout_ms = timeout_ms
        self._retry_s = retry_ms / 1000
        self._checking = asyncio.Lock()
        self._connections_made = 0
        self._connections_checked = -1
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
        self._connections_made += 1  # another server may answer at this address now

    async def close(self) -> None:
        """Waits for the calls under way, each bounded in time, and closes the connections."""
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
                if not _may_pass(error) or loop.time() + delay_s > deadline:
                    raise RegistryUnavailable(self._plainly(error)) from error
            await asyncio.sleep(delay_s)
            delay_s *= 2

    def _plainly(self, error: Exception) -> str:
        error = _cause(error)
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

    async def read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of commands that write nothing, however many, in order.

        Raises:
            RegistryUnavailable: One failed.
        """
        answers: list[Any] = []
        for start in range(0, len(commands), COMMANDS_PER_ROUND_TRIP):
            chunk = commands[start : start + COMMANDS_PER_ROUND_TRIP]
            answers += await self.call(partial(self.pipelined, chunk))
        return answers

    async def evaluate(self, script: Script, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[Any]:
        """The script's reply, once what it wrote and read is as durable as promised; inside `call` only.

        The reply's first element is the server's time in seconds.
        """
        waited = self.waits
        reply = await self._evaluate_once(script, keys, arguments)
        await self.recheck()
        if self.waits and not waited:  # the server that answered is a weaker one than we knew
            await self._evaluate_once(script, keys[:1], ())
        return reply

    async def _evaluate_once(self, script: Script, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[Any]:
        waits = self.waits
        rest = (len(keys), *keys, b"1" if waits else b"0", *arguments)
        try:
            return await self._synced("EVALSHA", script.sha1, *rest, waits=waits)
        except redis_errors.NoScriptError:  # a fresh server, or SCRIPT FLUSH
            return await self._synced("EVAL", script.source, *rest, waits=waits)

    async def _synced(self, *command: Any, waits: bool) -> list[Any]:
        if not waits:
            return cast("list[Any]", await self.command(*command))
        reply, synced = await self.pipelined([command, ("WAITAOF", 1, 0, self._timeout_ms)])
        if synced[0] < 1:
            raise RegistryUnavailable(
                f"The registry at {self.address} did not confirm the sync to disk within {self._timeout_ms} ms."
            )
        self.durable_before = max(self.durable_before, reply[0])
        return cast("list[Any]", reply)

    @property
    def unchecked(self) -> bool:
        """Whether a connection was made since the last check that succeeded."""
        return self._connections_checked != self._connections_made

    async def recheck(self) -> None:
        """Checks again where a new connection was made: another server may answer now. Inside `call` only.

        Raises:
            RegistryUnavailable: It cannot keep the promise.
        """
        try:
            await self.check()
        except RegistryRefused as error:
            raise RegistryUnavailable(str(error)) from error

    async def check(self) -> None:
        """Learns, once a connection, whether to wait for the sync, and refuses a server that would break the promise.

        Raises:
            RegistryRefused: The message names the setting.
        """
        async with self._checking:  # whoever comes meanwhile waits for what is found
            try:
                for _ in range(2):  # the first round may have made the connection that it then distrusts
                    if self.unchecked:
                        made = self._connections_made
                        await self._check()
                        self._connections_checked = made
            except redis_errors.RedisError as error:
                if isinstance(_cause(error), redis_errors.AuthenticationError):
                    raise RegistryRefused(self._plainly(error)) from error
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
        # Under no-appendfsync-on-rewrite even "always" answers before the sync while a rewrite runs.
        waits = config.get("appendfsync") != "always" or config.get("no-appendfsync-on-rewrite") == "yes"
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
        names = ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory", "maxmemory-policy")
        try:
            answer = await self.command("CONFIG GET", *names)
        except redis_errors.ResponseError as error:
            logger.info("CONFIG is not open to us (%s): each write is confirmed by WAITAOF", error)
            return {}
        return {_text(name): _text(value) for name, value in answer.items()}

    async def _information(self) -> dict[str, Any]:
        try:
            return await self._client.info("server")
        except redis_errors.ResponseError:
            return {}


def _cause(error: Exception) -> Exception:
    """What redis-py wrapped into a ConnectionError, where it is the server's own word, as on credentials."""
    return error.__cause__ if isinstance(error.__cause__, redis_errors.RedisError) else error


def _may_pass(error: Exception) -> bool:
    """Whether a short wait may help: the connection was dropped or refused, or the server loads its data."""
    error = _cause(error)
    if isinstance(error, redis_errors.AuthenticationError | TimeoutError):
        return False
    return isinstance(error, redis_errors.ConnectionError | OSError)


def _address(url: str) -> str:
    """The URL without what may be secret."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
