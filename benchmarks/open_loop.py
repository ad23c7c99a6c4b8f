"""Requests sent when they are due, whatever became of those before: callers do not wait for each other.

A client that sends the next request once the last is answered sends fewest while a server stalls, and so hides the
stall (coordinated omission). Here every latency counts from the time at which the request was due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.light import END_OF_HEAD, Head, request_of

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


@dataclass(frozen=True)
class Answer:
    """One answer: its status, whether it says when to come again, and its body."""

    status: int
    retry_after: bool
    body: bytes


@dataclass
class Outcomes:
    """What became of requests.

    Attributes:
        latencies_s: Of those answered with 200, in no order.
        statuses: How many had which.
        unbounded: How many were neither answered with 200 nor with 429 or 503 and `Retry-After`.
    """

    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    unbounded: int = 0

    def add(self, answer: Answer, latency_s: float) -> None:
        """Note one."""
        self.statuses[answer.status] += 1
        if answer.status == 200 and b'"error"' not in answer.body:
            self.latencies_s.append(latency_s)
        elif answer.status not in {429, 503} or not answer.retry_after:
            self.unbounded += 1

    def quantile_ms(self, share: float) -> float:
        """That share of the latencies is at most so long; infinite where there are none."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("inf")


class Unheard(ConnectionError):
    """A connection ended before anything was answered."""


class Connections:
    """Connections to one server, as many as are needed at once; each is used again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._free: list[tuple[Reader, Writer]] = []

    async def post(self, body: bytes) -> Answer:
        """The answer to one request."""
        while self._free:
            reader, writer = self._free.pop()
            if reader.at_eof():  # the server closes what it has not heard of for some seconds
                writer.close()
                continue
            try:
                return await self._posted(body, reader, writer)
            except Unheard:  # it closed it just now
                writer.close()
        address = urlsplit(self._url)
        opened = await asyncio.open_connection(address.hostname, address.port, limit=2**26)
        return await self._posted(body, *opened)

    async def _posted(self, body: bytes, reader: Reader, writer: Writer) -> Answer:
        writer.write(request_of(self._url, body))
        try:
            head = Head.of(await reader.readuntil(END_OF_HEAD))
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise Unheard from error
        content = await reader.readexactly(head.length)
        self._free.append((reader, writer))
        return Answer(head.status, "retry-after" in head.headers, content)

    async def close(self) -> None:
        """Close all."""
        for _, writer in self._free:
            writer.close()
            await writer.wait_closed()


async def poisson(connections: Connections, bodies: Callable[[], bytes], rate: float, seconds: float) -> Outcomes:
    """Requests at random times, the first now, `rate` a second on average; returns when all are answered."""
    outcomes, draw, sending = Outcomes(), random.Random(0), set()
    began = due = time.perf_counter()
    while due < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sending.add(asyncio.create_task(_send(connections, bodies(), due, outcomes)))
        due += draw.expovariate(rate)
    await asyncio.gather(*sending)
    return outcomes


async def closed(
    connections: Connections, bodies: Callable[[], bytes], in_flight: int, going_on: Callable[[], bool]
) -> Outcomes:
    """So many requests at a time, the next of each caller once its last is answered, while `going_on`."""
    outcomes = Outcomes()

    async def caller() -> None:
        while going_on():
            await _send(connections, bodies(), time.perf_counter(), outcomes)

    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return outcomes


def until(seconds: float) -> Callable[[], bool]:
    """True for so long from now."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


async def _send(connections: Connections, body: bytes, due: float, outcomes: Outcomes) -> None:
    answer = await connections.post(body)
    outcomes.add(answer, time.perf_counter() - due)
