"""The connections to one service: sends an exchange until it is answered, and many of them a few at a time."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from service.client.errors import ClientClosed, Refused
from service.client.exchange import Exchange, Reply
from service.client.patience import Patience, Waiting

T = TypeVar("T")

Verify = ssl.SSLContext | Path | str | bool
"""A context of TLS, the file of the authorities that are trusted, or whether any has to be."""

CONNECT_TIMEOUT_S = 10.0
KEPT_OPEN_S = 4.0  # a service closes what stands idle for 5 s: what is taken up again then is cut off


@dataclass(frozen=True)
class Options:
    """How a client behaves; what each is, `AsyncTokenizerClient` says."""

    batch_items: int = 256
    batch_rows: int = 4096
    in_flight: int = 4
    patience_s: float = 120.0
    timeout_s: float = 120.0
    on_wait: Callable[[Waiting], None] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where one makes no sense."""
        if min(self.batch_items, self.batch_rows, self.in_flight) < 1:
            raise ValueError("batch_items, batch_rows and in_flight are at least 1")
        if self.patience_s < 0 or self.timeout_s <= 0:
            raise ValueError("patience_s is at least 0, timeout_s more")


class Connection:
    """Connections to a service.

    Args:
        url: Its base.
        options: How to behave.
        headers: Of every request.
        verify: Whom to trust.

    Raises:
        ValueError: The address is none, or the file has no authorities.
    """

    def __init__(self, url: str, options: Options, headers: Mapping[str, str], *, verify: Verify) -> None:
        self.options = options
        self._url = url
        self._under_way: set[asyncio.Task[Any]] = set()
        self._closed = False
        try:
            self._http = httpx.AsyncClient(
                base_url=url,
                headers=dict(headers),
                verify=_context(verify),
                timeout=httpx.Timeout(options.timeout_s, connect=min(CONNECT_TIMEOUT_S, options.timeout_s), pool=None),
                limits=httpx.Limits(max_connections=None, keepalive_expiry=KEPT_OPEN_S),
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is no address: {error}") from error
        if self._http.base_url.scheme not in {"http", "https"} or not self._http.base_url.host:
            raise ValueError(f"{url!r} is no address: it begins with http:// or https:// and a host")

    def begin(self, exchange: Exchange[T], patience_s: float | None = None) -> asyncio.Task[T]:
        """Start sending it until it is answered; closing ends that.

        Raises:
            ClientClosed: There are no connections any more.
        """
        if self._closed:
            raise ClientClosed("the client is closed")
        task = asyncio.ensure_future(
            self._answer(exchange, self.options.patience_s if patience_s is None else patience_s)
        )
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def answer(self, exchange: Exchange[T], patience_s: float | None = None) -> T:
        """Send it until it is answered.

        Raises:
            Refused: Sending it again does not help.
            Unavailable: It got nowhere for `patience_s`.
            UnusableAnswer: What answers is not this service.
            ClientClosed: The client was closed.
        """
        return await self._outcome(self.begin(exchange, patience_s))

    async def answers(self, exchanges: AsyncIterator[Exchange[T]]) -> AsyncGenerator[T]:
        """Send exchanges, a few at a time, and yield what they bring in their order.

        What is wrong with the source comes after the answers to what it gave before. However this ends, nothing of it
        goes on.

        Raises:
            TokenizerError: As `answer`.
        """
        free = asyncio.Semaphore(self.options.in_flight)
        begun: asyncio.Queue[asyncio.Task[T] | None] = asyncio.Queue()
        tasks: set[asyncio.Task[T]] = set()

        async def begin_all() -> None:
            try:
                while True:
                    await free.acquire()
                    exchange = await anext(exchanges, None)
                    if exchange is None:
                        return
                    task = self.begin(exchange)
                    tasks.add(task)
                    begun.put_nowait(task)
            finally:
                begun.put_nowait(None)

        beginning = asyncio.ensure_future(begin_all())
        try:
            while (task := await begun.get()) is not None:
                yield await self._outcome(task)
                tasks.discard(task)
                free.release()
            await beginning
        finally:
            for each in (beginning, *tasks):
                each.cancel()
            await asyncio.gather(beginning, *tasks, return_exceptions=True)

    async def close(self) -> None:
        """End what is under way, and close the connections."""
        self._closed = True
        ending = tuple(self._under_way)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await self._http.aclose()

    async def _outcome(self, task: asyncio.Task[T]) -> T:
        try:
            return await task
        except asyncio.CancelledError:
            if self._closed and task.cancelled():
                raise ClientClosed("the client was closed") from None
            raise

    async def _answer(self, exchange: Exchange[T], patience_s: float) -> T:
        patience = Patience(self._url, patience_s, self.options.on_wait)
        while True:
            before = exchange.progress
            try:
                if exchange.take(await self._reply(exchange)):
                    return exchange.result()
                continue
            except (httpx.TransportError, Refused) as error:
                trouble = error
            if exchange.progress > before:
                patience.begin_anew()
            await asyncio.sleep(patience.pause_s(trouble))

    async def _reply(self, exchange: Exchange[object]) -> Reply:
        """What one attempt brings, which may be cut off.

        Raises:
            httpx.TransportError: Nothing.
        """
        request = exchange.request()
        timeout: object = httpx.USE_CLIENT_DEFAULT
        if request.longer_s:
            usual = self._http.timeout
            read_s = None if usual.read is None else usual.read + request.longer_s
            timeout = httpx.Timeout(usual.write, connect=usual.connect, read=read_s, pool=None)
        content = bytearray()
        cut = None
        async with self._http.stream(
            request.method,
            request.path,
            params=dict(request.params),
            content=request.content,
            headers=dict(request.headers),
            timeout=timeout,  # type: ignore[arg-type]
        ) as response:
            try:
                async for chunk in response.aiter_bytes():
                    content += chunk
            except httpx.TransportError as error:
                cut = error
        return Reply(response.status_code, response.headers, bytes(content), cut)


def _context(verify: Verify) -> ssl.SSLContext | bool:
    """As httpx takes it.

    Raises:
        ValueError: The file cannot be read, or has no certificates.
    """
    if isinstance(verify, bool | ssl.SSLContext):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:  # of the file, or of TLS
        raise ValueError(f"{verify} has no certificates of authorities that can be read: {error}") from error
