"""Commands out, replies in, on connections that are kept.

redis-py makes the connections (address, TLS, credentials, sentinels) and reads their protocol. What its client does
around each command, though, takes longer than a small one itself: a pool behind a condition, a task and a timer for the
writing, events and figures that nobody listens to. Here a call takes a connection, writes all its commands at once,
reads all replies, and puts the connection back.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors
from redis.asyncio import Redis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.connection import AbstractConnection


class Exchange:
    """Sends commands to one server, each call on a connection of its own."""

    def __init__(self, pool: BlockingConnectionPool) -> None:
        """Makes no connection yet.

        Args:
            pool: Where connections come from, how many there may be, and how long a call waits for one where all are
                taken; they stay in its care, and with this.
        """
        self._pool = pool
        self._free = asyncio.Semaphore(pool.max_connections)
        self._kept: list[AbstractConnection] = []
        self._readers = Redis(connection_pool=pool).response_callbacks  # replies as redis-py has them, by command

    async def commands(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Their replies in order, the server's errors in their places.

        Raises:
            RedisError, OSError: No connection could be had, or it was lost: any number of them may have been done.
        """
        await self._take_turn()
        connection: AbstractConnection | None = None
        try:
            connection = await self._connection()
            await self._make_ready(connection)
            packed = [part for command in commands for part in connection.pack_command(*command)]
            await connection.send_packed_command(packed)
            return [await self._reply(connection, command[0]) for command in commands]
        except BaseException:
            if connection is not None:  # whose replies nobody is to mistake for his own
                await connection.disconnect(nowait=True)
            raise
        finally:
            if connection is not None:
                self._kept.append(connection)
            self._free.release()

    async def disconnect(self) -> None:
        """Drops all connections; calls under way fail."""
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await self._pool.disconnect()

    async def close(self) -> None:
        """Closes all connections for good."""
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await self._pool.aclose()

    async def _take_turn(self) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        try:
            async with asyncio.timeout(self._pool.timeout):
                await self._free.acquire()
        except TimeoutError as error:
            raise redis_errors.ConnectionError("all connections are taken") from error

    async def _connection(self) -> AbstractConnection:
        if self._kept:
            return self._kept.pop()
        made: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return made

    async def _make_ready(self, connection: AbstractConnection) -> None:
        """Connects anew what was dropped, here or by the server."""
        if not connection.is_connected or await connection.can_read():
            await self._pool.ensure_connection(connection)

    async def _reply(self, connection: AbstractConnection, name: str | bytes) -> Any:
        try:
            reply = await connection.read_response()
        except redis_errors.ResponseError as error:
            return error
        read = self._readers.get(name) if isinstance(name, str) else None
        return reply if read is None else read(reply)
