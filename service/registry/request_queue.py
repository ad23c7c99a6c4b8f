"""What callers ask of a record while a call is on its way waits here, and goes together into the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from service.errors import RegistryUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

Q = TypeVar("Q")
R = TypeVar("R")

REQUESTS_PER_CALL = 1024
SMALL_REQUESTS = 16  # of one caller; more are bulk
CALLS_IN_FLIGHT = 2  # of each lane: one is on the server while the next is put together


class Request(NamedTuple):
    """One item's request to the script: its id, and what is asked."""

    item_id: bytes
    request: bytes


class Reply(NamedTuple):
    """The script's reply to one request, and when, by the server's clock."""

    value: int | bytes | list[Any] | None
    at: datetime


class _Waiting(NamedTuple, Generic[Q, R]):
    requests: Sequence[Q]
    answer: asyncio.Future[list[R]]


class RequestQueue(Generic[Q, R]):
    """Merges what callers ask while a call is on its way into the next one; no timer.

    Small requests have calls of their own beside bulk's: a single look-up, or a new listing, waits for what is on
    the server already, and no more, however much bulk is queued.
    """

    def __init__(self, send: Callable[[Sequence[Q]], Awaitable[list[R]]]) -> None:
        """Sends by `send`, which is given at most `REQUESTS_PER_CALL` requests."""
        self._small = _Lane(send)
        self._bulk = _Lane(send)

    async def submit(self, requests: Sequence[Q]) -> list[R]:
        """The replies to these requests, in order; each chunk of `REQUESTS_PER_CALL` is sent together.

        None at all are sent too: an empty call is a barrier for what was read before.
        """
        if len(requests) <= SMALL_REQUESTS:
            return await self._small.submit(requests)
        if len(requests) <= REQUESTS_PER_CALL:
            return await self._bulk.submit(requests)
        starts = range(0, len(requests), REQUESTS_PER_CALL)
        chunks = (requests[start : start + REQUESTS_PER_CALL] for start in starts)
        answers = await asyncio.gather(*map(self._bulk.submit, chunks))
        return [reply for answer in answers for reply in answer]

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is on its way."""
        return not (self._small.senders or self._bulk.senders)

    async def drain(self) -> None:
        """Returns when nothing waits or is on its way."""
        while senders := self._small.senders | self._bulk.senders:
            await asyncio.wait(senders)


class _Lane(Generic[Q, R]):
    """What goes together into calls.

    The calls run in tasks of their own, so that a caller who is cancelled cancels only its own waiting.
    """

    def __init__(self, send: Callable[[Sequence[Q]], Awaitable[list[R]]]) -> None:
        self.senders: set[asyncio.Task[None]] = set()
        self._send = send
        self._pending: deque[_Waiting[Q, R]] = deque()

    def submit(self, requests: Sequence[Q]) -> asyncio.Future[list[R]]:
        """The replies to these requests, in order."""
        answer: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        self._pending.append(_Waiting(requests, answer))
        if len(self.senders) < CALLS_IN_FLIGHT:
            self.senders.add(asyncio.create_task(self._send_pending(), name="registry-calls"))
        return answer

    async def _send_pending(self) -> None:
        try:
            while batch := self._next_batch():
                await self._send_batch(batch)
        finally:
            # Here and not in a done callback, which would run later: `submit` could count a sender that has ended.
            self.senders.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _send_batch(self, batch: Sequence[_Waiting[Q, R]]) -> None:
        try:
            replies = await self._send([request for waiting in batch for request in waiting.requests])
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            _fail(batch, error)
        except asyncio.CancelledError:
            _fail(batch, RegistryUnavailable("The service is shutting down."))
            raise
        else:
            _answer(batch, replies)

    def _next_batch(self) -> list[_Waiting[Q, R]]:
        batch: list[_Waiting[Q, R]] = []
        room = REQUESTS_PER_CALL
        while self._pending and len(self._pending[0].requests) <= room:
            waiting = self._pending.popleft()
            if not waiting.answer.done():  # else its caller has left
                batch.append(waiting)
                room -= len(waiting.requests)
        return batch


def _answer(batch: Sequence[_Waiting[Q, R]], replies: Sequence[R]) -> None:
    start = 0
    for requests, answer in batch:
        if not answer.done():
            answer.set_result(list(replies[start : start + len(requests)]))
        start += len(requests)


def _fail(batch: Sequence[_Waiting[Q, R]], error: Exception) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)
