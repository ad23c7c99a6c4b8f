"""The thread that rows of bulk are read and written on."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import pytest

from service.bulk.row_thread import RowThread

WHOSE: ContextVar[str] = ContextVar("whose")


async def test_work_has_its_caller_s_context_and_what_it_raises_is_his(row_thread: RowThread) -> None:
    WHOSE.set("mine")

    assert await row_thread.run(WHOSE.get) == "mine"
    with pytest.raises(ZeroDivisionError):
        await row_thread.run(divmod, 1, 0)


async def test_work_is_done_one_after_the_other_off_the_loop(row_thread: RowThread) -> None:
    under_way = most = 0

    def work() -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        threading.Event().wait(0.005)
        under_way -= 1
        return threading.get_ident()

    threads = await asyncio.gather(*(row_thread.run(work) for _ in range(8)))

    assert most == 1
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


async def test_work_of_a_caller_who_left_before_its_turn_is_not_done(row_thread: RowThread) -> None:
    go_on = threading.Event()
    done: list[str] = []
    first = asyncio.create_task(row_thread.run(go_on.wait, 30))
    left = asyncio.create_task(row_thread.run(done.append, "left"))
    stays = asyncio.create_task(row_thread.run(done.append, "stays"))
    await asyncio.sleep(0)

    left.cancel()
    await asyncio.wait([left])
    go_on.set()
    await asyncio.gather(first, stays)

    assert done == ["stays"]


async def test_at_the_end_what_has_begun_is_done_and_no_more() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        go_on.wait(30)
        done.append("first")

    row_thread = RowThread()
    first = asyncio.create_task(row_thread.run(work))
    second = asyncio.create_task(row_thread.run(done.append, "second"))
    await asyncio.to_thread(begun.wait, 30)

    ended = asyncio.create_task(asyncio.to_thread(row_thread.__exit__))
    with pytest.raises(asyncio.CancelledError):
        await second  # as the end has begun
    go_on.set()
    await ended

    await first
    assert done == ["first"]
