"""A stream and both its ends, which act when a test says so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message

from service.bodies import STREAM_BYTES, Allowance, BodyGate
from service.bulk.streams import StreamedAnswer
from service.bulk.terms import StreamTerms
from service.errors import NotJson, SemidError


class Connection:
    """What a server hands to an app, and what the app sends; the caller acts when the test says so."""

    def __init__(self) -> None:
        self._arriving: asyncio.Queue[Message] = asyncio.Queue()
        self.taking = asyncio.Event()
        self.taking.set()
        self.sent: list[Message] = []

    def arrives(self, *chunks: bytes, end: bool = False) -> None:
        for chunk in chunks:
            self._arriving.put_nowait({"type": "http.request", "body": chunk, "more_body": True})
        if end:
            self._arriving.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    def leaves(self) -> None:
        self._arriving.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self._arriving.get()

    async def send(self, message: Message) -> None:
        await self.taking.wait()
        self.sent.append(message)

    @property
    def answer(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def unread(self) -> int:
        return self._arriving.qsize()


class Words:
    """A format of one word a chunk, whose answers come when the test says so."""

    media_type = "text/words"

    def __init__(self, ahead_bytes: int = 0, longest: int = 0) -> None:
        self.ahead_bytes, self._longest = ahead_bytes, longest
        self.begun: list[bytes] = []
        self.dropped: list[bytes] = []
        self.free = asyncio.Event()
        self.free.set()
        self.faults: dict[bytes, list[Exception]] = {}

    def begin(self) -> bytes:
        return b":"

    async def groups(self, chunks: AsyncIterator[bytes], allowance: Allowance) -> AsyncIterator[tuple[bytes, int]]:
        async for chunk in chunks:
            if chunk == b"broken":
                raise NotJson("here")
            if chunk.startswith(b"-"):  # more of it is to come
                continue
            await allowance.take(len(chunk))
            yield chunk, len(chunk)

    def together(self, arrived: deque[tuple[bytes, int]]) -> tuple[bytes, int]:
        word, size = arrived.popleft()
        while arrived and len(word + arrived[0][0]) <= self._longest:
            more, more_size = arrived.popleft()
            word, size = word + more, size + more_size
        return word, size

    async def answer(self, group: bytes) -> bytes:
        self.begun.append(group)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.dropped.append(group)
            raise
        if self.faults.get(group):
            raise self.faults[group].pop(0)
        await asyncio.sleep(0.01 / len(group))
        return group + b";"

    def end(self, problem: SemidError | None) -> bytes:
        return b"." if problem is None else problem.slug.encode()


class Exchange:
    """A stream and both its ends."""

    def __init__(
        self, words: Words | None = None, *, patience_s: float = 5.0, inflight_bytes: int = 10 * STREAM_BYTES
    ) -> None:
        self.connection, self.words = Connection(), words or Words()
        self.gate = BodyGate(max_body_bytes=10, inflight_bytes=inflight_bytes, timeout_s=patience_s)
        allowance = self.gate.allowance()
        self.terms = StreamTerms(patience_s)
        self.answer = StreamedAnswer(self.words, allowance, {"semid-x": "y"}, self.terms)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.answer({}, self.connection.receive, self.connection.send))


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
