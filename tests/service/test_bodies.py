"""The bytes of a request become JSON within limits, and a caller who leaves is noticed."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from service.bodies import COUNTED_AT_ONCE, BodyGate, bytes_of_values, parse_json
from service.errors import BodyTimeout, BodyTooLarge, NotJson, Overloaded, UnsupportedMediaType
from service.http.callers import require_json, unless_disconnected


class Connection:
    """What a server hands to an app: a queue of messages from the caller, then the caller's leave."""

    def __init__(self, *chunks: bytes, leaves: bool = False) -> None:
        self._messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        if not leaves:
            self._messages.append({"type": "http.request", "body": b"", "more_body": False})
        self.left = asyncio.Event()
        if leaves:
            self.left.set()

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    def request(self, **headers: str) -> Request:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return Request({"type": "http", "method": "POST", "headers": raw}, self.receive)


def gate(**limits: float) -> BodyGate:
    return BodyGate(
        **{  # type: ignore[arg-type]
            "max_body_bytes": 10,
            "inflight_bytes": 100,
            "timeout_s": 5.0,
            **limits,
        }
    )


async def test_a_body_is_read_whole() -> None:
    async with gate().read(Connection(b"one", b"", b"two").request()) as body:
        assert body == b"onetwo"


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    with pytest.raises(BodyTooLarge):
        async with gate().read(Connection(b"x").request(content_length="11")):
            pytest.fail("it was read")


async def test_a_body_is_dropped_as_soon_as_it_exceeds_the_limit() -> None:
    connection = Connection(b"x" * 6, b"x" * 5, b"never read")

    with pytest.raises(BodyTooLarge):
        async with gate().read(connection.request(content_length="3")):
            pytest.fail("it was read")

    assert (await connection.receive())["body"] == b"never read"


async def test_bodies_under_way_are_bounded_together() -> None:
    bodies = gate(inflight_bytes=12)
    async with bodies.read(Connection(b"x" * 8).request()):
        with pytest.raises(Overloaded) as refusal:
            async with bodies.read(Connection(b"x" * 5).request()):
                pytest.fail("it was read")
        assert "Retry-After" in refusal.value.headers()
        async with bodies.read(Connection(b"x" * 4).request()) as body:
            assert len(body) == 4
    async with bodies.read(Connection(b"x" * 10).request()) as body:
        assert len(body) == 10


async def test_a_lone_body_is_read_whatever_the_bound_of_all() -> None:
    async with gate(inflight_bytes=1).read(Connection(b"x" * 10).request()) as body:
        assert len(body) == 10


@pytest.mark.parametrize("fault", [ValueError("the use case failed"), asyncio.CancelledError()])
async def test_the_bytes_are_given_back_however_the_request_ends(fault: BaseException) -> None:
    bodies = gate()

    with pytest.raises(type(fault)):
        async with bodies.read(Connection(b"x" * 9).request()):
            raise fault

    assert bodies._held_bytes == 0


async def test_the_bytes_are_given_back_when_the_caller_leaves_in_the_middle() -> None:
    bodies = gate()

    with pytest.raises(ClientDisconnect):
        async with bodies.read(Connection(b"x" * 9, leaves=True).request()):
            pytest.fail("it was read")

    assert bodies._held_bytes == 0


@pytest.mark.parametrize("media_type", ["application/json", "APPLICATION/JSON;charset=utf-8", "application/ld+json"])
def test_json_by_any_name_is_taken(media_type: str) -> None:
    require_json(Request({"type": "http", "headers": [(b"content-type", media_type.encode())]}))


def test_a_body_that_says_nothing_is_taken_for_json() -> None:
    require_json(Request({"type": "http", "headers": []}))


@pytest.mark.parametrize("media_type", ["text/plain", "application/octet-stream", "", "json", "text/json"])
def test_a_body_that_says_otherwise_is_refused(media_type: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        require_json(Request({"type": "http", "headers": [(b"content-type", media_type.encode())]}))


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', {"a": [1, 2.5, None, True, "é"]}),
        (rb'"\ud83d\ude00"', "😀"),
        (rb'"a\ud800b"', "a\ud800b"),
        (b'"\xed\xa0\x80"', "\ud800"),
        (rb'"\u0000"', "\0"),
        (b"[Infinity, -Infinity]", [math.inf, -math.inf]),
        (b"[1e400]", [math.inf]),
        (b"[-" + b"9" * 5000 + b"]", [-math.inf]),
        (b"1" * 5000, math.inf),
        (b'{"a": 1, "a": 2}', {"a": 2}),
    ],
)
def test_json_is_read_as_leniently_as_each_item_allows(body: bytes, value: object) -> None:
    assert parse_json(body) == value


def test_an_integer_is_one_whatever_stands_beside_it() -> None:
    values = parse_json(b"[12, -3, 123456789012345678901, NaN]")

    assert values[:3] == [12, -3, 1.2345678901234568e20]
    assert [type(value) for value in values] == [int, int, float, float]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[1,]",
        b"{'a': 1}",
        b"nul",
        b"\xff",
        b'"\xc3"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1 2",
        b"\0",
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson):
        parse_json(body)


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        parse_json(body)
    except NotJson as error:
        error.detail.encode()


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=10))
def test_what_json_writes_is_read_back(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


async def some(answer: object, seconds: float = 0.0) -> object:
    await asyncio.sleep(seconds)
    return answer


@pytest.fixture
async def read_request() -> AsyncIterator[tuple[Connection, Request]]:
    """A request whose body has been read, as `unless_disconnected` wants it."""
    connection = Connection(b"{}")
    request = connection.request()
    async with gate().read(request):
        yield connection, request


async def test_work_is_answered_while_the_caller_stays(read_request: tuple[Connection, Request]) -> None:
    assert await unless_disconnected(read_request[1], some("answer", 0.01)) == "answer"


async def test_the_faults_of_the_work_pass_through(read_request: tuple[Connection, Request]) -> None:
    async def faulty() -> None:
        raise NotJson("no")

    with pytest.raises(NotJson):
        await unless_disconnected(read_request[1], faulty())


async def test_work_is_dropped_when_the_caller_leaves(read_request: tuple[Connection, Request]) -> None:
    connection, request = read_request
    dropped = asyncio.Event()

    async def long_work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            dropped.set()
            raise

    answer = asyncio.create_task(unless_disconnected(request, long_work()))
    await asyncio.sleep(0.01)
    connection.left.set()

    with pytest.raises(ClientDisconnect):
        await answer
    await asyncio.wait_for(dropped.wait(), 5)


async def test_a_caller_who_leaves_as_the_answer_comes_ends_nothing_that_follows(
    read_request: tuple[Connection, Request],
) -> None:
    connection, request = read_request
    work: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def call() -> object:
        answer = await unless_disconnected(request, _awaiting(work))
        await asyncio.sleep(0.01)
        return answer

    answering = asyncio.create_task(call())
    await asyncio.sleep(0.01)
    connection.left.set()
    work.set_result("answer")

    assert await answering == "answer"


async def test_work_is_dropped_when_the_server_gives_the_request_up(read_request: tuple[Connection, Request]) -> None:
    work = asyncio.create_task(some("late", 60))
    answer = asyncio.create_task(unless_disconnected(read_request[1], _awaiting(work)))
    await asyncio.sleep(0.01)

    answer.cancel()

    with pytest.raises(asyncio.CancelledError):
        await answer
    await asyncio.wait({work}, timeout=5)
    assert work.cancelled()


async def _awaiting(work: asyncio.Future[Any]) -> object:
    return await work


async def test_a_body_that_does_not_arrive_in_time_is_refused_and_holds_nothing() -> None:
    class Trickle(Connection):
        async def receive(self) -> Message:
            await asyncio.sleep(10)
            raise AssertionError("nobody waits that long")

    small = gate(timeout_s=0.05)

    with pytest.raises(BodyTimeout):
        async with small.read(Trickle(b"x").request()):
            pass

    assert small._held_bytes == 0


async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    body = b"[" + b"{}," * 1000 + b"{}]"
    wide = gate(max_body_bytes=10_000, inflight_bytes=20_000)

    with pytest.raises(BodyTooLarge, match="too many values"):
        async with wide.read(Connection(body).request()):
            pass

    assert wide._held_bytes == 0


@pytest.mark.parametrize("size", [0, 1, COUNTED_AT_ONCE - 1, COUNTED_AT_ONCE, 3 * COUNTED_AT_ONCE + 5])
def test_values_are_counted_to_the_last_byte_of_a_body(size: int) -> None:
    marks = b'{"a": [1, 2]}, '
    body = (b" " * size + marks)[-size - 1 :] + marks[::-1]

    found = bytes_of_values(body)

    assert found == 64 * sum(byte in b"{[" for byte in body) + 32 * sum(byte == ord(",") for byte in body) > 0
