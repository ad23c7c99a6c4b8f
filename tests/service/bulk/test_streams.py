"""A stream under way: its pace, its order, and the room that it takes."""

from __future__ import annotations

import asyncio

import pytest

from service.bodies import STREAM_BYTES, BodyGate
from service.bulk.caller import PROGRESS_BYTES
from service.bulk.streams import GROUPS_IN_FLIGHT
from service.errors import BodyTimeout, Overloaded
from tests.service.bulk.exchanges import Exchange, Words, until


async def test_answers_stand_in_the_order_of_the_body() -> None:
    exchange = Exchange()
    exchange.connection.arrives(b"a", b"long word", b"b", end=True)

    await exchange.start()

    start, *_, last = exchange.connection.sent
    assert exchange.connection.answer == b":a;long word;b;."
    assert (start["status"], last["more_body"]) == (200, False)
    assert {name for name, _ in start["headers"]} == {b"content-type", b"semid-x"}
    assert exchange.gate._held_bytes == 0


async def test_no_more_is_read_than_is_worked_on() -> None:
    exchange = Exchange()
    exchange.words.free.clear()
    exchange.connection.arrives(*[b"word"] * 100, end=True)
    stream = exchange.start()
    await until(lambda: len(exchange.words.begun) > GROUPS_IN_FLIGHT)
    await asyncio.sleep(0.02)

    assert exchange.connection.unread > 100 - 2 * GROUPS_IN_FLIGHT
    assert exchange.gate._held_bytes < STREAM_BYTES + 4 * 2 * GROUPS_IN_FLIGHT
    exchange.words.free.set()
    await stream
    assert exchange.connection.answer == b":" + b"word;" * 100 + b"."


async def test_what_arrives_while_others_are_worked_on_goes_together() -> None:
    exchange = Exchange(Words(ahead_bytes=8, longest=6))
    exchange.words.free.clear()
    exchange.connection.arrives(*[b"ab"] * 20, end=True)
    stream = exchange.start()
    read = GROUPS_IN_FLIGHT + 1 + 8 // len(b"ab")  # one of those under way is about to be written
    await until(lambda: exchange.connection.unread <= 20 + 1 - read)
    await asyncio.sleep(0.02)
    at_once, unread = list(exchange.words.begun), exchange.connection.unread

    exchange.words.free.set()
    await stream

    assert at_once == [b"ab"] * (GROUPS_IN_FLIGHT + 1)
    assert unread == 20 + 1 - read
    assert exchange.words.begun[len(at_once)] == b"ababab"
    assert exchange.connection.answer.replace(b";", b"") == b":" + b"ab" * 20 + b"."
    assert exchange.gate._held_bytes == 0


async def test_no_more_is_worked_on_than_is_taken() -> None:
    exchange = Exchange()
    exchange.connection.taking.clear()
    exchange.connection.arrives(*[b"word"] * 100, end=True)
    stream = exchange.start()
    await asyncio.sleep(0.1)

    assert len(exchange.words.begun) <= 2 * GROUPS_IN_FLIGHT
    exchange.connection.taking.set()
    await stream
    assert exchange.connection.answer == b":" + b"word;" * 100 + b"."


async def test_an_overload_is_waited_out() -> None:
    exchange = Exchange()
    exchange.words.faults[b"b"] = [Overloaded("full", retry_after_s=0.01)] * 3
    exchange.connection.arrives(b"a", b"b", end=True)

    await exchange.start()

    assert exchange.connection.answer == b":a;b;."
    assert exchange.words.begun == [b"a", b"b", b"b", b"b", b"b"]


async def test_an_overload_of_which_nobody_knows_how_long_it_lasts_is_not_asked_about_without_end() -> None:
    exchange = Exchange()
    exchange.words.faults[b"a"] = [Overloaded("full", retry_after_s=0.0)] * 1000
    exchange.connection.arrives(b"a", end=True)
    stream = exchange.start()
    await until(lambda: exchange.words.begun)

    for _ in range(500):
        await asyncio.sleep(0)

    assert len(exchange.words.begun) < 10
    stream.cancel()
    await asyncio.wait({stream})


async def test_a_caller_who_sends_nothing_is_told_so() -> None:
    exchange, silent = Exchange(patience_s=0.05), Exchange(patience_s=0.05)
    exchange.connection.arrives(b"a")

    await exchange.start()
    with pytest.raises(BodyTimeout):
        await silent.start()

    assert exchange.connection.answer == b":a;body_timeout"


async def test_a_caller_whose_items_are_worked_on_may_be_silent() -> None:
    exchange = Exchange(patience_s=0.05)
    exchange.words.free.clear()
    exchange.connection.arrives(b"a")
    stream = exchange.start()
    await asyncio.sleep(0.2)

    exchange.connection.arrives(b"b", end=True)
    exchange.words.free.set()

    await stream
    assert exchange.connection.answer == b":a;b;."


async def test_a_caller_who_takes_nothing_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange(patience_s=0.05)
    exchange.connection.taking.clear()
    exchange.connection.arrives(b"a", b"b", end=True)

    await exchange.start()

    assert "took nothing" in caplog.text
    assert exchange.gate._held_bytes == 0


async def test_bytes_that_trickle_are_no_progress() -> None:
    exchange = Exchange(patience_s=0.3)
    exchange.connection.arrives(b"a")
    stream = exchange.start()

    async with asyncio.timeout(5):
        while not stream.done():
            exchange.connection.arrives(b"-")
            await asyncio.sleep(0.05)

    assert exchange.connection.answer == b":a;body_timeout"


@pytest.mark.parametrize("chunk", [b"word", b"-" * PROGRESS_BYTES])
async def test_a_caller_who_sends_whole_items_or_much_of_one_may_be_slow(chunk: bytes) -> None:
    exchange = Exchange(patience_s=0.6)
    stream = exchange.start()

    for _ in range(9):
        exchange.connection.arrives(chunk)
        await asyncio.sleep(0.1)
    exchange.connection.arrives(b"last", end=True)

    await stream
    assert exchange.connection.answer.endswith(b"last;.")


async def test_a_stream_that_finds_no_room_is_refused_at_once() -> None:
    gate = BodyGate(max_body_bytes=10, inflight_bytes=4 * STREAM_BYTES, timeout_s=5.0)
    with gate.allowance(), pytest.raises(Overloaded), gate.allowance():
        pass
    with gate.allowance():
        pass


async def test_streams_leave_half_of_the_room_to_whole_bodies_and_wait_for_the_rest() -> None:
    gate = BodyGate(max_body_bytes=10, inflight_bytes=8 * STREAM_BYTES, timeout_s=5.0)
    with gate.allowance() as first, gate.allowance() as second:
        await first.take(2 * STREAM_BYTES)
        waiting = asyncio.create_task(second.take(STREAM_BYTES))
        await asyncio.sleep(0.01)
        assert not waiting.done()

        first.give(STREAM_BYTES)

        await asyncio.wait_for(waiting, 5)
        assert gate._held_bytes == 4 * STREAM_BYTES
    assert gate._held_bytes == 0


async def test_a_stream_does_not_wait_for_room_for_ever() -> None:
    gate = BodyGate(max_body_bytes=10, inflight_bytes=8 * STREAM_BYTES, timeout_s=0.05)
    with gate.allowance() as first, gate.allowance() as second:
        await first.take(2 * STREAM_BYTES)
        with pytest.raises(Overloaded):
            await second.take(1)


async def test_a_lone_stream_has_room_whatever_the_bound() -> None:
    gate = BodyGate(max_body_bytes=10, inflight_bytes=1, timeout_s=0.05)
    with gate.allowance() as allowance:
        await allowance.take(10 * STREAM_BYTES)
    assert gate._held_bytes == 0
