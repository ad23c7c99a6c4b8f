"""A TCP proxy that delays, stalls, cuts and half-closes the connections through it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

CHUNK_BYTES = 16_384
SHARE = 0.7
"""Of the open connections, how many a fault takes."""


class Connection:
    """One connection and its other half, a pump for each direction."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = (reader, writer)
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._cut_in_chunk = False
        self._pumps: list[asyncio.Task[None]] = []

    async def run(self, upstream: int) -> None:
        """Passes everything on, until both sides have closed or it is cut."""
        try:
            self._server = await asyncio.open_connection("127.0.0.1", upstream)
        except OSError:
            self.cut()
            return
        directions = [(self._client[0], self._server[1]), (self._server[0], self._client[1])]
        self._pumps = [asyncio.ensure_future(self._pump(*direction)) for direction in directions]
        try:
            await asyncio.wait(self._pumps)
        finally:
            self.cut()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                await self._flowing.wait()
                await asyncio.sleep(self._proxy.delay_s())
                if self._cut_in_chunk:
                    writer.write(chunk[: self._proxy.chance.randrange(len(chunk))])
                    await writer.drain()
                    self.cut()
                    return
                writer.write(chunk)
                await writer.drain()
            await self._flowing.wait()
            writer.write_eof()
        except OSError:
            self.cut()

    def cut(self) -> None:
        """Ends it both ways, at once; now and then by a reset."""
        for pump in self._pumps:
            pump.cancel()
        for _, writer in filter(None, (self._client, self._server)):
            if self._proxy.chance.random() < 0.5:
                with contextlib.suppress(OSError):
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    def cut_in_chunk(self) -> None:
        """Ends it in the middle of what it passes next."""
        self._cut_in_chunk = True

    def half_close(self) -> None:
        """Ends one direction; the other goes on, for as long as its ends have patience."""
        if self._server is None or len(self._pumps) < 2:
            return
        direction = self._proxy.chance.randrange(2)
        writer = (self._server[1], self._client[1])[direction]
        self._pumps[direction].cancel()
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def stall(self, duration_s: float) -> None:
        """Holds everything back for a while."""
        self._flowing.clear()
        await asyncio.sleep(duration_s)
        self._flowing.set()


class Proxy:
    """Listens on a port of its own and passes connections on to another.

    Its methods may be called from any thread.
    """

    def __init__(self, network: Network, upstream: int, seed: str) -> None:
        self.chance = random.Random(seed)
        self._network = network
        self._upstream = upstream
        self._connections: set[Connection] = set()
        self._longest_delay_s = 0.0
        self.port = network.listen(self._serve)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run(self._upstream)
        finally:
            self._connections.discard(connection)

    def delay_s(self) -> float:
        """How long to hold the next chunk back."""
        return self.chance.uniform(0, self._longest_delay_s) if self._longest_delay_s else 0.0

    def delay(self, longest_s: float) -> None:
        """From now on, holds each chunk back for up to so long."""
        self._longest_delay_s = longest_s

    def cut(self) -> None:
        """Cuts connections, some of them in the middle of a chunk."""
        self._network.soon(lambda: self._some(lambda one: self.chance.choice([one.cut, one.cut_in_chunk])()))

    def half_close(self) -> None:
        """Half-closes connections."""
        self._network.soon(lambda: self._some(lambda one: one.half_close()))

    def stall(self, duration_s: float) -> None:
        """Stalls connections."""
        self._network.soon(lambda: self._some(lambda one: self._network.start(one.stall(duration_s))))

    def _some(self, fault: Callable[[Connection], object]) -> None:
        for connection in list(self._connections):
            if self.chance.random() < SHARE:
                fault(connection)


class Network:
    """The thread in which all proxies run."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listening: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def listen(self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]) -> int:
        """Serves connections on a port of loopback; which."""
        server = self._run(asyncio.start_server(serve, "127.0.0.1", 0))
        self._listening.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def soon(self, action: Callable[[], object]) -> None:
        """Does it in the thread."""
        self._loop.call_soon_threadsafe(action)

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Starts a coroutine, in the thread."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Ends all connections and the thread."""
        self._run(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _cancel(self) -> None:
        for server in self._listening:
            server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # aborted connections are closed in the next round
