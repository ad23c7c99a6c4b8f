"""How a stream ends: its caller leaves, a part of it fails, or the service does."""

from __future__ import annotations

import asyncio
import gc

import pytest
from starlette.requests import ClientDisconnect

from service.errors import RegistryUnavailable, ShuttingDown
from tests.service.bulk.exchanges import Exchange, until


async def answered() -> tuple[Exchange, asyncio.Task[None]]:
    """A stream whose first word is answered."""
    exchange = Exchange()
    exchange.connection.arrives(b"a")
    stream = exchange.start()
    await until(lambda: exchange.connection.answer == b":a;")
    return exchange, stream


async def asked() -> tuple[Exchange, asyncio.Task[None]]:
    """A stream whose first two words are at work, and not to be done before they are freed."""
    exchange = Exchange()
    exchange.words.free.clear()
    exchange.connection.arrives(b"a", b"b")
    stream = exchange.start()
    await until(lambda: len(exchange.words.begun) == 2)
    return exchange, stream


async def test_work_is_dropped_when_the_caller_leaves() -> None:
    exchange, stream = await asked()

    exchange.connection.leaves()

    with pytest.raises(ClientDisconnect):
        await stream
    assert sorted(exchange.words.dropped) == [b"a", b"b"]
    assert exchange.gate._held_bytes == 0


async def test_work_is_dropped_when_the_caller_leaves_after_the_body() -> None:
    exchange, stream = await answered()
    exchange.words.free.clear()
    exchange.connection.arrives(b"b", end=True)
    await until(lambda: len(exchange.words.begun) == 2)

    exchange.connection.leaves()

    await stream  # the answer had begun, so there is nothing left to say
    assert exchange.words.dropped == [b"b"]


async def test_work_is_dropped_when_the_server_gives_the_stream_up() -> None:
    exchange = Exchange()
    exchange.words.free.clear()
    exchange.connection.arrives(b"a")
    stream = exchange.start()
    await until(lambda: exchange.words.begun)

    stream.cancel()

    with pytest.raises(asyncio.CancelledError):
        await stream
    assert exchange.words.dropped == [b"a"]
    assert exchange.gate._held_bytes == 0


@pytest.mark.parametrize("fault", [RegistryUnavailable("gone"), ValueError("unforeseen")])
async def test_what_fails_before_anything_is_answered_is_the_whole_answer(fault: Exception) -> None:
    exchange = Exchange()
    exchange.words.faults[b"a"] = [fault]
    exchange.connection.arrives(b"a", b"b", end=True)

    with pytest.raises(type(fault)):
        await exchange.start()

    assert exchange.connection.sent == []
    assert exchange.gate._held_bytes == 0


@pytest.mark.parametrize(
    ("fault", "slug"), [(RegistryUnavailable("gone"), b"registry_unavailable"), (ValueError(), b"internal_error")]
)
async def test_what_fails_later_is_the_end_of_the_answer(fault: Exception, slug: bytes) -> None:
    exchange = Exchange()
    exchange.words.faults[b"b"] = [fault]
    exchange.connection.arrives(b"a", b"b", b"c", end=True)

    await exchange.start()

    assert exchange.connection.answer == b":a;" + slug
    assert not exchange.connection.sent[-1]["more_body"]


async def test_of_several_groups_that_fail_the_first_is_said_and_the_log_says_nothing_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> bytes:
        exchange = Exchange()
        exchange.words.free.clear()
        for word in (b"b", b"c", b"d"):
            exchange.words.faults[word] = [RegistryUnavailable(word.decode())]
        exchange.connection.arrives(b"a", b"b", b"c", b"d", end=True)
        stream = exchange.start()
        await until(lambda: len(exchange.words.begun) == 4)
        exchange.words.free.set()
        await stream
        return exchange.connection.answer

    answer = await fail()
    gc.collect()

    assert answer == b":a;registry_unavailable"
    assert caplog.text == ""


async def test_what_was_read_before_the_body_broke_is_answered() -> None:
    exchange = Exchange()
    exchange.connection.arrives(b"a", b"b", b"broken", b"c")

    await exchange.start()

    assert exchange.connection.answer == b":a;b;not_json"


async def test_a_service_that_ends_answers_what_it_read_and_says_why_the_stream_ends() -> None:
    exchange, stream = await asked()

    exchange.terms.drain.reading_ends.set_result(None)
    exchange.connection.arrives(b"c")
    exchange.words.free.set()

    await stream
    assert exchange.connection.answer == b":a;b;shutting_down"
    assert not exchange.connection.sent[-1]["more_body"]
    assert exchange.gate._held_bytes == 0


async def test_a_body_that_ends_soon_is_answered_by_a_service_that_ends() -> None:
    exchange, stream = await answered()

    exchange.terms.drain.begin(10.0)
    exchange.connection.arrives(b"b", end=True)

    await stream
    assert exchange.connection.answer == b":a;b;."


async def test_answers_that_take_too_long_are_not_waited_for_by_a_service_that_ends() -> None:
    exchange, stream = await answered()
    exchange.words.free.clear()
    exchange.connection.arrives(b"b")
    await until(lambda: len(exchange.words.begun) == 2)

    exchange.terms.drain.begin(0.2)

    await stream
    assert exchange.connection.answer == b":a;shutting_down"
    assert exchange.words.dropped == [b"b"]


async def test_a_stream_that_has_no_answer_yet_is_refused_by_a_service_that_ends() -> None:
    exchange = Exchange()
    stream = exchange.start()
    exchange.terms.drain.begin(0.1)

    with pytest.raises(ShuttingDown):
        await stream
