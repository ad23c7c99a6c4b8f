"""Each call has its own replies, whatever became of the one before it on the same connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis import exceptions as redis_errors

from service.registry.connections import CONNECTIONS, open_connections
from service.registry.exchange import Exchange
from tests.valkey import Valkey

TIMEOUT_S = 0.5
BLOCK = ("BLPOP", "nothing", 30)


@pytest.fixture
async def exchange(valkey_process: Valkey) -> AsyncIterator[Exchange]:
    exchange = Exchange(open_connections(valkey_process.url, int(1000 * TIMEOUT_S)).pool)
    await exchange.commands([("FLUSHALL",)])
    yield exchange
    await exchange.close()


async def clients(exchange: Exchange) -> int:
    (listed,) = await exchange.commands([(b"CLIENT", b"LIST", b"TYPE", b"normal")])
    return len(listed.splitlines())


async def test_replies_come_in_order_with_errors_in_their_places(exchange: Exchange) -> None:
    set_, wrong, got, unknown = await exchange.commands(
        [("SET", b"a", b"x"), ("HGET", b"a", b"field"), (b"GET", b"a"), ("EVALSHA", "0" * 40, 0)]
    )

    assert (set_, got) == (True, b"x")
    assert type(wrong) is redis_errors.ResponseError
    assert isinstance(unknown, redis_errors.NoScriptError)


async def test_replies_to_commands_that_redis_py_knows_are_as_it_has_them(exchange: Exchange) -> None:
    answers = await exchange.commands([("HSET", b"h", b"a", b"1"), ("HGETALL", b"h"), ("CONFIG GET", "appendonly")])

    assert answers[1] == {b"a": b"1"}
    assert answers[2] == {"appendonly": "yes"}


async def test_calls_side_by_side_have_connections_of_their_own_that_are_used_again(exchange: Exchange) -> None:
    for _ in range(3):
        answers = await asyncio.gather(*(exchange.commands([("ECHO", b"%d" % i)] * 3) for i in range(CONNECTIONS)))
        assert answers == [[b"%d" % i] * 3 for i in range(CONNECTIONS)]
    assert await clients(exchange) == CONNECTIONS


async def test_commands_of_many_bytes_arrive_whole(exchange: Exchange) -> None:
    value = b"x" * 20_000_000
    assert (await exchange.commands([("SET", b"a", value), ("GET", b"a")]))[1] == value


async def test_the_reply_of_a_call_that_was_cancelled_is_nobody_elses(exchange: Exchange) -> None:
    left = asyncio.create_task(exchange.commands([BLOCK]))
    await asyncio.sleep(0.05)
    left.cancel()
    await asyncio.wait([left])

    assert left.cancelled()
    assert await exchange.commands([("LPUSH", b"nothing", b"x"), ("ECHO", b"mine")]) == [1, b"mine"]


async def test_a_reply_that_does_not_come_is_not_waited_for_nor_taken_later(exchange: Exchange) -> None:
    with pytest.raises(redis_errors.TimeoutError):
        await exchange.commands([BLOCK])

    assert await exchange.commands([("LPUSH", b"nothing", b"x"), ("ECHO", b"mine")]) == [1, b"mine"]


async def test_a_connection_that_the_server_dropped_is_made_anew(exchange: Exchange) -> None:
    await exchange.commands([("SET", b"a", b"x")])
    await exchange.commands([("CLIENT", b"KILL", b"TYPE", b"normal", b"SKIPME", b"no")])
    await asyncio.sleep(0.05)

    assert await exchange.commands([("GET", b"a")]) == [b"x"]


async def test_while_all_connections_are_taken_others_wait_for_one_and_not_for_ever(exchange: Exchange) -> None:
    taken = [asyncio.create_task(exchange.commands([("BLPOP", b"queue", 30)])) for _ in range(CONNECTIONS)]
    await asyncio.sleep(0.1)
    with pytest.raises(redis_errors.ConnectionError, match="all connections are taken"):
        async with asyncio.timeout(5):
            await exchange.commands([("ECHO", b"mine")])
    await asyncio.gather(*taken, return_exceptions=True)

    assert await exchange.commands([("ECHO", b"mine")]) == [b"mine"]


async def test_as_many_connections_are_made_as_the_url_says(valkey_process: Valkey) -> None:
    exchange = Exchange(open_connections(f"{valkey_process.url}?max_connections=2", 2000).pool)

    async with asyncio.timeout(1):
        answers = await asyncio.gather(*(exchange.commands([("ECHO", b"%d" % i)]) for i in range(20)))

    assert answers == [[b"%d" % i] for i in range(20)]
    assert await clients(exchange) == 2
    await exchange.close()


async def test_a_server_that_was_away_is_found_when_it_is_back(exchange: Exchange, valkey_process: Valkey) -> None:
    valkey_process.kill()
    for _ in range(2 * CONNECTIONS):
        with pytest.raises(redis_errors.ConnectionError):
            await exchange.commands([("ECHO", b"mine")])
    valkey_process.restart()

    assert await exchange.commands([("ECHO", b"mine")]) == [b"mine"]
