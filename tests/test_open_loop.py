"""Latencies count from when a request was due, and every answer is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.open_loop import Answer, Connections, Outcomes, closed, poisson

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
REFUSAL = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\ncontent-length: 0\r\n\r\n"


@asynccontextmanager
async def answering(answer: Callable[[int], bytes], stall_s: float = 0.0) -> AsyncIterator[Connections]:
    """A server that gives its n-th answer to the n-th request, one at a time, the first after a stall."""
    turn, served = asyncio.Lock(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            async with turn:
                await asyncio.sleep(stall_s if served == 0 else 0)
                served += 1
                writer.write(answer(served))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    connections = Connections(f"http://{host}:{port}/tokenize")
    yield connections
    await connections.close()
    server.close()


async def test_a_stall_is_in_the_latency_of_everyone_who_was_due_meanwhile() -> None:
    async with answering(lambda _: OK, stall_s=0.5) as connections:
        outcomes = await poisson(connections, lambda: b"{}", rate=200, seconds=0.25)

    assert len(outcomes.latencies_s) > 20
    assert min(outcomes.latencies_s) > 0.2
    assert outcomes.quantile_ms(0.99) > 400


async def test_callers_one_after_the_other_hide_it() -> None:
    left = iter(range(40))
    async with answering(lambda _: OK, stall_s=0.5) as connections:
        outcomes = await closed(connections, lambda: b"{}", 1, lambda: next(left, None) is not None)

    assert outcomes.quantile_ms(0.5) < 100


async def test_refusals_are_counted_apart_and_are_no_latencies() -> None:
    async with answering(lambda number: REFUSAL if number % 2 else OK) as connections:
        outcomes = await poisson(connections, lambda: b"{}", rate=200, seconds=0.1)

    assert outcomes.statuses[429] == pytest.approx(outcomes.statuses[200], abs=1)
    assert len(outcomes.latencies_s) == outcomes.statuses[200]
    assert outcomes.unbounded == 0


@pytest.mark.parametrize(
    "answer",
    [
        Answer(429, retry_after=False, body=b""),
        Answer(500, retry_after=True, body=b""),
        Answer(200, retry_after=False, body=b'{"items":[{"error":{}}]}'),
    ],
)
def test_what_is_neither_done_nor_put_off_is_a_fault(answer: Answer) -> None:
    outcomes = Outcomes()

    outcomes.add(answer, 0.1)

    assert outcomes.unbounded == 1
    assert outcomes.latencies_s == []
