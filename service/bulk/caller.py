"""The caller of a stream: sends its body and takes its answer, and is waited for no longer than the terms say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from service.bulk.terms import StreamTerms
from service.errors import BodyTimeout, ShuttingDown

PROGRESS_BYTES = 64 * 1024  # of a line or record batch that is still to come: a good part of it


class Stalled(Exception):
    """The caller takes no answers."""


@dataclass
class Caller:
    """The connection, on which nobody waits for ever."""

    receive: Receive
    send: Send
    terms: StreamTerms
    head: MutableMapping[str, Any]
    begin: bytes
    answered: bool = False
    ended: bool = False  # the body
    waited_s: float = 0.0  # for the caller, since there was something to work on
    arrived: int = 0  # bytes since

    async def chunks(self, busy: Callable[[], bool]) -> AsyncIterator[bytes]:
        """The body as it arrives.

        Raises:
            BodyTimeout: Too little came for too long, though nothing else was `busy`.
            ShuttingDown: The service ends.
            ClientDisconnect: The caller left.
        """
        while not self.ended:
            message = await self._next(busy)
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            self.ended = not message.get("more_body", False)
            if body := message.get("body"):
                self.arrived += len(body)
                if self.arrived >= PROGRESS_BYTES:
                    self.progresses()
                yield body

    def progresses(self) -> None:
        """The caller sends what can be worked on."""
        self.waited_s, self.arrived = 0.0, 0

    async def rest(self) -> None:
        """Takes and drops what is left of the body; returns when it has ended or the caller left."""
        while not self.ended:
            message = await self.receive()
            self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)

    async def leave(self) -> None:
        """Returns when the caller leaves; what still comes is dropped."""
        while (message := await self.receive())["type"] != "http.disconnect":
            self.ended = self.ended or not message.get("more_body", False)

    async def _next(self, busy: Callable[[], bool]) -> Mapping[str, Any]:
        receiving = asyncio.ensure_future(self.receive())
        ending, loop = self.terms.drain.reading_ends, asyncio.get_running_loop()
        either: set[asyncio.Future[Any]] = {receiving, ending}
        try:
            while not receiving.done():
                began, ours = loop.time(), busy()
                left_s = self.terms.patience_s if ours else max(0.0, self.terms.patience_s - self.waited_s)
                await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    raise ShuttingDown
                if not (ours or busy()):
                    self.waited_s += loop.time() - began
                    if self.waited_s >= self.terms.patience_s and not receiving.done():
                        msg = f"no whole line or record batch arrived within {self.terms.patience_s:g} s"
                        raise BodyTimeout(msg)
            return receiving.result()
        finally:
            receiving.cancel()

    async def answer(self, data: bytes, *, more: bool) -> None:
        """Send a part of the answer.

        Raises:
            Stalled: It was not taken in time.
        """
        try:
            async with asyncio.timeout(self.terms.patience_s):
                if not self.answered:
                    self.answered = True
                    await self.send(self.head)
                    data = self.begin + data
                await self.send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError as error:
            raise Stalled from error
