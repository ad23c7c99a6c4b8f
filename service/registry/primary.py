"""One server of the Redis protocol: its calls bounded in time, shielded and translated; its durability checked."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from redis import exceptions as redis_errors

from service.errors import RegistryRefused, RegistryUnavailable
from service.registry.calls import Calls, cause, demoted
from service.registry.connections import open_connections
from service.registry.durability import PROBE, Durability, Promise, Wait
from service.registry.exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

COMMANDS_PER_ROUND_TRIP = 1024
FIRST_RETRY_DELAY_S = 0.02


class Script:
    """A Lua script: sent by its hash, in full only where the server does not know it."""

    def __init__(self, source: bytes) -> None:
        """Keeps the source and its SHA-1, by which the protocol names scripts."""
        self.source = source
        self.sha1 = hashlib.sha1(source, usedforsecurity=False).hexdigest()


class ScriptCall(NamedTuple):
    """A script's keys and arguments.

    Each script takes one argument more, before these: "1" where it has to write even if nothing is new, so that a wait
    behind it covers what it read. Its reply begins with the server's time in seconds.
    """

    script: Script
    keys: Sequence[bytes]
    arguments: Sequence[bytes]

    def command(self, *, in_full: bool, waits: bool) -> tuple[Any, ...]:
        """The command that runs it."""
        name = ("EVAL", self.script.source) if in_full else ("EVALSHA", self.script.sha1)
        return (*name, len(self.keys), *self.keys, b"1" if waits else b"0", *self.arguments)


class Primary(Calls):
    """The server: its calls bounded in time, shielded and translated; its durability checked.

    Attributes:
        address: Where it is, for messages: nothing secret.
        connections_made: How many there were so far: behind a new one, another server may answer.
        durable_before: Where it `waits`, all that was assigned before this second of the server's clock is durable.
    """

    def __init__(
        self,
        url: str,
        durability: Durability | str,
        timeout_ms: int,
        retry_ms: int,
        *,
        replicas: int = 1,
        cluster_node: bool = False,
    ) -> None:
        """Describes the server; nothing is sent yet.

        Args:
            url: See `connections`.
            durability: What an acknowledgement waits for.
            timeout_ms: How long one round trip may take; a wait behind it may take as long again.
            retry_ms: How long a dropped or refused connection is tried again.
            replicas: How many replicas have to have received what is acknowledged, under `replicated`.
            cluster_node: Whether the server may be a cluster's.

        Raises:
            RegistryRefused: The URL cannot be read.
        """
        super().__init__(timeout_ms, retry_ms)
        self.durable_before = 0
        self._promise = Promise(Durability(durability), replicas, timeout_ms, cluster_node)
        self._wait = Wait()
        self._honest: set[str] = set()
        self._checking = asyncio.Lock()
        self.connections_made = 0
        self._connections_checked = -1
        pool, self.address = open_connections(url, timeout_ms, self._on_connect)
        self._exchange = Exchange(pool)

    @property
    def waits(self) -> bool:
        """Whether an acknowledgement needs a wait behind the write: for the server's sync, or for replicas."""
        return self._wait.needed

    async def _on_connect(self, _connection: Any) -> None:
        self.connections_made += 1  # another server may answer at this address now

    async def close(self) -> None:
        """Waits for the calls under way, each bounded in time, and closes the connections."""
        await self.finish_calls()
        await self._exchange.close()

    async def matching(self, pattern: bytes) -> list[bytes]:
        """The keys that match a pattern; some may come twice. Inside `call` only."""
        found: list[bytes] = []
        cursor: Any = None
        while cursor is None or int(cursor):
            cursor, keys = await self.command("SCAN", cursor or 0, "MATCH", pattern, "COUNT", 10_000)
            found += keys
        return found

    async def ping(self) -> None:
        """Returns where the server takes a write, as durable as promised; inside `call` only."""
        await self.written([("SET", PROBE, b"1")])

    async def recover(self, _error: Exception) -> None:
        """Drops the connections to a server that is no longer the primary."""
        if demoted(_error):  # those that only read would be answered by it for ever
            await self._exchange.disconnect()

    async def command(self, *parts: Any) -> Any:
        """One command's answer; inside `call` only."""
        return (await self.pipelined([parts]))[0]

    async def pipelined(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """These commands' answers, in one round trip; inside `call` only."""
        return _none_failed(await self._exchange.commands(commands))

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
        """A script's reply, once what it wrote and read is as durable as promised; inside `call` only."""
        (reply,) = await self.written([ScriptCall(script, keys, arguments)])
        return cast("list[Any]", reply)

    async def written(self, commands: Sequence[ScriptCall | tuple[Any, ...]]) -> list[Any]:
        """The replies to these, in one round trip, once all of them are as durable as promised; inside `call` only.

        They must be idempotent and independent of each other: a script that the server does not know is sent again, in
        full, after the others. A plain command has to write, or nothing is waited for.

        Raises:
            RegistryUnavailable: They may have been written, but this was not confirmed.
        """
        waited = self._wait
        replies = await self._written_once(commands)
        await self.recheck()
        if self.waits and self._wait != waited:  # the server that answered is a weaker one than we knew
            await self._written_once(commands)
        return replies

    async def _written_once(self, commands: Sequence[ScriptCall | tuple[Any, ...]]) -> list[Any]:
        wait, made = self._wait, self.connections_made
        replies = await self._waited(commands, wait)
        unknown = [place for place, reply in enumerate(replies) if isinstance(reply, redis_errors.NoScriptError)]
        if unknown:  # a fresh server, or SCRIPT FLUSH
            if len(unknown) < len(commands) and self.connections_made != made:
                raise redis_errors.ConnectionError("another server may answer now")  # and have only a part of them
            again = await self._waited([commands[place] for place in unknown], wait, in_full=True)
            for place, reply in zip(unknown, again, strict=True):
                replies[place] = reply
        _none_failed(replies)
        if self.connections_made == made:  # else another server may answer by now, of which this says nothing
            for command, reply in zip(commands, replies, strict=True):
                if wait.needed and isinstance(command, ScriptCall):
                    self.durable_before = max(self.durable_before, reply[0])
        return replies

    async def _waited(
        self, commands: Sequence[ScriptCall | tuple[Any, ...]], wait: Wait, *, in_full: bool = False
    ) -> list[Any]:
        """The replies after one wait for all that was written; in the place of an unknown script's, its error."""
        sent: list[tuple[Any, ...]] = []
        known: set[Script] = set()
        for command in commands:
            if isinstance(command, ScriptCall):
                full = in_full and command.script not in known  # those that follow find it known
                known.add(command.script)
                sent.append(command.command(in_full=full, waits=wait.needed))
            else:
                sent.append(command)
        answers = await self._exchange.commands([*sent, *wait.commands(self._timeout_ms)])
        replies, confirmed = answers[: len(sent)], answers[len(sent) :]
        _none_failed([reply for reply in replies if not isinstance(reply, redis_errors.NoScriptError)])
        if all(isinstance(reply, redis_errors.NoScriptError) for reply in replies):
            return replies  # nothing was written
        shortfall = wait.shortfall(_none_failed(confirmed))
        if shortfall is not None:
            raise RegistryUnavailable(f"The registry at {self.address} {shortfall} within {self._timeout_ms} ms.")
        return replies

    @property
    def unchecked(self) -> bool:
        """Whether a connection was made since the last check that succeeded."""
        return self._connections_checked != self.connections_made

    async def recheck(self) -> None:
        """Checks again where a new connection was made: another server may answer now. Inside `call` only.

        Raises:
            RegistryUnavailable: It cannot keep the promise.
        """
        if not self.unchecked:
            return
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
                        made = self.connections_made
                        await self._check()
                        self._connections_checked = made
            except redis_errors.RedisError as error:
                if isinstance(cause(error), redis_errors.AuthenticationError):
                    raise RegistryRefused(self.plainly(error)) from error
                raise

    async def _check(self) -> None:
        self._wait = await self._promise.examine(self.address, self.command, self.pipelined, self._honest)
        self.durable_before = 0


def _none_failed(answers: list[Any]) -> list[Any]:
    """The answers; the first error among them is raised."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
