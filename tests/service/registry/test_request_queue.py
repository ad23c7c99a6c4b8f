"""What is asked of a record at the same time: merged into calls, small requests beside bulk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from service.registry import Claim, Record
from service.registry.assignment import ClaimResult
from service.registry.request_queue import REQUESTS_PER_CALL, SMALL_REQUESTS, RequestQueue

LANES = {"s": SMALL_REQUESTS, "b": SMALL_REQUESTS + 1}  # how many requests of one caller

Ask = Callable[[Record, str], Coroutine[Any, Any, object]]


def claims(name: str, count: int) -> list[Claim]:
    return [Claim(f"{name}-{i}", (i % 4, i % 8, i % 16), bytes(8)) for i in range(count)]


async def _claim(record: Record, name: str) -> object:
    (result,) = await record.claim(claims(name, 1))
    return isinstance(result, ClaimResult)


async def _look_up(record: Record, name: str) -> object:
    return await record.by_item_ids([f"{name}-0"]) == [None]


async def _retire(record: Record, name: str) -> object:
    return await record.retire([f"{name}-0"]) == [None]


@pytest.mark.parametrize("ask", [_claim, _look_up, _retire])
async def test_one_item_is_answered_while_bulk_is_queued(record: Record, ask: Ask) -> None:
    feeds = [asyncio.create_task(record.claim(claims(f"feed {n}", REQUESTS_PER_CALL))) for n in range(12)]
    scans = [
        asyncio.create_task(record.by_item_ids([f"scan {n}-{i}" for i in range(REQUESTS_PER_CALL)])) for n in range(12)
    ]
    await asyncio.sleep(0)

    answered = await ask(record, "listing")

    waiting = sum(not feed.done() for feed in feeds)
    await asyncio.gather(*feeds, *scans)
    assert answered
    assert waiting > len(feeds) / 2


async def test_small_requests_go_together_and_never_wait_for_bulk() -> None:
    calls: list[list[str]] = []
    gate = asyncio.Event()

    async def send(requests: Sequence[str]) -> list[str]:
        calls.append(list(requests))
        await gate.wait()
        return [request.upper() for request in requests]

    queue = RequestQueue(send)
    asked: list[asyncio.Task[list[str]]] = []
    for n in range(5):
        asked += [asyncio.create_task(queue.submit([f"{lane}{n}"] * size)) for lane, size in LANES.items()]
        await asyncio.sleep(0.01)
    on_their_way = [call[0] for call in calls]
    gate.set()
    answers = await asyncio.gather(*asked)

    assert sorted(on_their_way) == ["b0", "b1", "s0", "s1"]
    assert [answer[0] for answer in answers] == [f"{lane}{n}".upper() for n in range(5) for lane in LANES]
    assert sorted(sorted(set(call)) for call in calls[4:]) == [["b2", "b3", "b4"], ["s2", "s3", "s4"]]
    assert queue.idle
