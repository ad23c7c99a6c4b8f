"""Bulk over HTTP: a body of any length is answered while it arrives, in bounded memory.

    chunks --format--> groups --use case, a few at a time--> answers, in the order of the groups

What arrives is put to work at once while few groups are under way; else what arrives meanwhile goes together.

The caller sets the pace on both sides. No more is read than what is being worked on and the next group, so where the
model or the registry is behind, or answers are not taken, the caller's own sending stands still: a stream waits, and is
not refused in its middle. What ends it early is said in the answer's last entry once the answer has begun, else as a
problem.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.bodies import Allowance
from service.bulk.caller import Caller, Stalled
from service.bulk.terms import StreamTerms, pause
from service.errors import Overloaded, SemidError, ServiceError, ShuttingDown

log = logging.getLogger(__name__)

G = TypeVar("G")
T = TypeVar("T")

GROUPS_IN_FLIGHT = 4
LINGER_S = 0.5


class BulkFormat(Protocol[G]):
    """What a stream is written in, both ways, and what answers it.

    Attributes:
        media_type: Of both.
        ahead_bytes: By how many of the allowance's bytes what has arrived and waits may grow, beyond one group.
    """

    media_type: str
    ahead_bytes: int

    def begin(self) -> bytes:
        """What the answer begins with."""

    def groups(self, chunks: AsyncIterator[bytes], allowance: Allowance) -> AsyncIterator[tuple[G, int]]:
        """Items that are worked on together, and how many bytes of the allowance each gives back once it is answered.

        Raises:
            ServiceError: The body cannot be read any further.
        """

    def together(self, arrived: deque[tuple[G, int]]) -> tuple[G, int]:
        """Takes the first of the groups that wait, and with it, as one, as many as are worked on together."""

    async def answer(self, group: G) -> bytes:
        """The answer to a group.

        Raises:
            ServiceError: There is none.
        """

    def end(self, problem: SemidError | None) -> bytes:
        """What the answer ends with; a problem is why it ends before its time."""


class StreamedAnswer(Response, Generic[G]):
    """The answer to a stream.

    Args:
        bulk: What the body and the answer are written in, and what answers them.
        allowance: The bytes that this stream holds.
        headers: Of the answer.
        terms: How long the caller is waited for, and when the service ends.
    """

    def __init__(
        self, bulk: BulkFormat[G], allowance: Allowance, headers: Mapping[str, str], terms: StreamTerms
    ) -> None:
        super().__init__(headers=dict(headers), media_type=bulk.media_type)
        del self.headers["content-length"]
        self._bulk = bulk
        self._allowance = allowance
        self._terms = terms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's own
        """Answer while the body arrives.

        Raises:
            ClientDisconnect: The caller left before anything was answered.
            ServiceError: The stream cannot be answered; nothing was sent.
        """
        with self._allowance:
            caller = Caller(receive, send, self._terms, self._head(), self._bulk.begin())
            exchange = _Exchange(self._bulk, self._allowance, caller)
            try:
                await exchange.run()
            except ClientDisconnect:
                if not caller.answered:
                    raise
            except Stalled:
                log.warning("a caller took nothing of an answer for %g s: dropped", self._terms.patience_s)

    def _head(self) -> MutableMapping[str, Any]:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}


@dataclass(frozen=True)
class _End:
    """The body has ended: as it should, or by what is wrong."""

    fault: Exception | None = None


@dataclass
class _Exchange(Generic[G]):
    """One stream under way: a task reads, each group is worked on in its own, one writes."""

    bulk: BulkFormat[G]
    allowance: Allowance
    caller: Caller
    arrived: deque[tuple[G, int]] = field(default_factory=deque)  # and waits for room among those under way
    end: _End | None = None  # of the body, behind what has arrived
    working: set[asyncio.Task[bytes]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Nothing is under way."""
        self.queue: asyncio.Queue[tuple[asyncio.Task[bytes], int] | _End] = asyncio.Queue()  # bounded by `_begin`
        self.begun = asyncio.Event()  # something of what had arrived

    async def run(self) -> None:
        """Returns when all is answered; however it ends, nothing of it goes on.

        Raises:
            ClientDisconnect: The caller left.
            ServiceError: Why nothing was sent.
        """
        self.reading = reading = asyncio.ensure_future(self._read())
        writing = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done() and not reading.cancelled():
                raise ClientDisconnect
            await writing
        finally:
            tasks = {reading, writing, *self.working}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                _ = task.cancelled() or task.exception()  # said where it matters

    async def _read(self) -> None:
        """Takes what arrives; returns when the caller has left."""
        end = _End()
        try:
            chunks = self.caller.chunks(busy=lambda: bool(self.working or self.arrived))
            async for group, size in self.bulk.groups(chunks, self.allowance):
                self.caller.progresses()
                if self.caller.terms.drain.reading_ends.done():
                    raise ShuttingDown  # noqa: TRY301 - said at the end of the answer
                self.arrived.append((group, size))
                del group  # else it would be held until the next one comes, though it is answered
                self._begin()
                while self._is_ahead():
                    self.begun.clear()
                    await self.begun.wait()
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - said at the end of the answer
            end = _End(error)
        self.end = end
        self._begin()
        await self.caller.leave()

    def _is_ahead(self) -> bool:
        """Whether enough has arrived that waits."""
        return bool(self.arrived) and sum(size for _, size in self.arrived) >= self.bulk.ahead_bytes

    def _begin(self) -> None:
        """Puts what has arrived to work, while there is room for it among what is under way."""
        while self.arrived and self.queue.qsize() < GROUPS_IN_FLIGHT:
            group, size = self.bulk.together(self.arrived)
            task = asyncio.create_task(self._answer(group))
            self.working.add(task)
            task.add_done_callback(self._worked)
            self.queue.put_nowait((task, size))
        if self.end is not None and not self.arrived:
            self.queue.put_nowait(self.end)
            self.end = None
        self.begun.set()

    def _worked(self, task: asyncio.Task[bytes]) -> None:
        self.working.discard(task)
        _ = task.cancelled() or task.exception()  # of several that fail the first in order is said

    async def _answer(self, group: G) -> bytes:
        while True:
            try:
                return await self.bulk.answer(group)
            except Overloaded as error:  # the caller's sending stands still meanwhile
                await pause(error)

    async def _write(self) -> None:
        """Sends the answers in the order of the groups, and says how the stream ended.

        Raises:
            ServiceError: Why nothing was sent.
        """
        while not isinstance(work := await self._work(), _End):
            self._begin()
            task, size = work
            try:
                data = await self._in_time(task)
            except Exception as error:  # noqa: BLE001 - said at the end of the answer
                work = _End(error)
                break
            await self.caller.answer(data, more=True)
            self.allowance.give(size)
        fault = work.fault
        if fault is not None and not self.caller.answered:
            raise fault
        if fault is not None and not isinstance(fault, ServiceError):
            log.error("a stream failed", exc_info=fault)
            fault = SemidError("an unforeseen error; the service's log has it")
        await self.caller.answer(self.bulk.end(fault), more=fault is not None)
        if fault is not None:
            await self._let_go()
            await self.caller.answer(b"", more=False)

    async def _work(self) -> tuple[asyncio.Task[bytes], int] | _End:
        """What is next."""
        if not self.queue.empty():
            return self.queue.get_nowait()
        getting = asyncio.ensure_future(self.queue.get())
        try:
            return await self._in_time(getting)
        except ShuttingDown as error:
            return _End(error)
        finally:
            getting.cancel()

    async def _in_time(self, work: asyncio.Future[T]) -> T:
        """What comes of it.

        Raises:
            ShuttingDown: Nothing did in time.
        """
        if not work.done():
            either: set[asyncio.Future[Any]] = {work, self.caller.terms.drain.answering_ends}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ShuttingDown
        return work.result()

    async def _let_go(self) -> None:
        """Takes what the caller still sends, for a moment.

        Bytes that nobody has read reset a connection that is closed, and the end of the answer may be lost with it.
        """
        self.reading.cancel()
        await asyncio.wait({self.reading})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self.caller.rest()
