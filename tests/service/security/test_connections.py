"""Header floods, slow heads, requests sent ahead, answers not taken: what a caller may hold by a connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request

from service.bodies import CALLER, BodyGate
from service.http.callers import unless_disconnected
from service.http.protocol import REQUESTS_AHEAD, Bounded, BoundedH11, ConnectionLimits, HttpProtocol, protocol_of

T = TypeVar("T")

LIMITS = ConnectionLimits(head_bytes=8192)
IMPATIENT = ConnectionLimits(head_bytes=8192, head_timeout_s=0.4, taken_timeout_s=0.8)
HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"
BIG = 32 * 2**20  # more than the sockets of both sides hold
SOON_S = 20  # at the latest
GATE = BodyGate(max_body_bytes=2**20, inflight_bytes=2**24, timeout_s=SOON_S)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers how long the body was; much, where that is asked for; late, where that is; never, but for a leave."""
    size = 0
    if scope["path"] == "/whole":
        size = len(scope[CALLER].whole_body(scope) or b"")
    if scope["path"] == "/never":
        request = Request(scope, receive)
        async with GATE.read(request):
            scope["state"]["left"].put_nowait("works")
        try:
            await unless_disconnected(request, asyncio.sleep(SOON_S))
        except ClientDisconnect:
            scope["state"]["left"].put_nowait("left")
            return
    if scope["path"] == "/late":
        await asyncio.sleep(3 * IMPATIENT.head_timeout_s)
    if scope["path"] not in {"/refused", "/whole"}:
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
    body = b"x" * BIG if scope["path"] == "/big" else b"%d" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server(NamedTuple):
    """A server within the limits, in the test's own loop."""

    address: tuple[str, int]
    connections: set[Any]
    left: asyncio.Queue[str]

    @asynccontextmanager
    async def connected(self, *sent: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self.address, limit=2**20)
        for part in sent:
            writer.write(part)
        yield reader, writer
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def answer(self, *sent: bytes) -> bytes:
        """What is answered until the server closes the connection."""
        async with self.connected(*sent) as (reader, _):
            return await all_of(reader)


async def all_of(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionResetError):  # closed while more was on its way
        while part := await asyncio.wait_for(reader.read(2**20), 20):
            answer += part
    return answer


def problem(answer: bytes) -> tuple[int, str]:
    """The status and the end of the type."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    told = json.loads(body)
    assert told["status"] == int(head.split(b" ")[1])
    return told["status"], told["type"].rpartition(":")[2]


@pytest.fixture(params=list(dict.fromkeys((BoundedH11, HttpProtocol))), ids=lambda parser: parser.__name__)
def parser(request: pytest.FixtureRequest) -> type[Bounded]:
    """Each that is there."""
    return request.param


@pytest.fixture
async def server(parser: type[Bounded]) -> AsyncIterator[Server]:
    """One that no test is too slow for."""
    async with serving(protocol_of(LIMITS, parser)) as running:
        yield running


@pytest.fixture
async def impatient(parser: type[Bounded]) -> AsyncIterator[Server]:
    """One that waits for nobody."""
    async with serving(protocol_of(IMPATIENT, parser)) as running:
        yield running


@asynccontextmanager
async def serving(protocol: type[Bounded]) -> AsyncIterator[Server]:
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol,
        h11_max_incomplete_event_size=LIMITS.head_bytes,
        ws="none",
        lifespan="off",
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    config.load()
    running = uvicorn.Server(config)
    running.lifespan = config.lifespan_class(config)
    running.lifespan.state["left"] = left = asyncio.Queue()
    await running.startup()
    yield Server(running.servers[0].sockets[0].getsockname(), running.server_state.connections, left)
    await running.shutdown()


FLOODS: dict[str, tuple[bytes, Callable[[int], bytes]]] = {
    "many headers": (HEAD, lambda number: b"x-%d: y\r\n" % number),
    "one header without end": (HEAD + b"x: ", lambda _: b"y" * 64),
    "a header's name without end": (HEAD + b"x", lambda _: b"y" * 64),
    "a target without end": (b"GET /", lambda _: b"y" * 64),
    "a second request's headers": (HEAD + b"\r\n" + HEAD, lambda number: b"x-%d: y\r\n" % number),
    "trailers of a body": (
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\ny\r\n0\r\n",
        lambda number: b"x-%d: y\r\n" % number,
    ),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_of_headers_is_refused_at_the_limit(server: Server, flood: str) -> None:
    begin, part = FLOODS[flood]
    flooding = b"".join(part(number) for number in range(LIMITS.head_bytes // 8))

    async with server.connected(begin) as (reader, writer):
        await asyncio.sleep(0.05)
        writer.write(flooding[: LIMITS.head_bytes + 200])
        answer = await all_of(reader)

    last = answer[answer.rindex(b"HTTP/1.1") :]
    assert problem(last) == (431, "head_too_large")
    assert not server.connections


async def test_a_flood_that_does_not_stop_is_cut_off(server: Server) -> None:
    async def flood(writer: asyncio.StreamWriter) -> None:
        for _ in range(10_000):
            writer.write(b"x: " + b"y" * 8000 + b"\r\n")
            await writer.drain()

    async with server.connected(HEAD) as (_, writer):
        with pytest.raises(ConnectionError):
            await flood(writer)

    assert not server.connections


async def test_a_head_within_the_limit_is_taken_with_a_body_of_any_length(server: Server) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 200000\r\nx: " + b"y" * 7000

    answer = await server.answer(head + b"\r\n\r\n" + b"z" * 200_000)

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"200000")


POST = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


@pytest.mark.parametrize("size", [0, 3000])
async def test_a_small_body_that_came_with_its_head_is_there_without_waiting(server: Server, size: int) -> None:
    async with server.connected(POST % (b"/whole", size) + b"z" * size) as (reader, _):
        assert (await asyncio.wait_for(reader.read(1000), SOON_S)).endswith(b"\r\n\r\n%d" % size)


async def test_a_request_that_was_answered_is_let_go_without_a_search_for_garbage(server: Server) -> None:
    gc.disable()
    try:
        async with server.connected() as (reader, writer):
            for _ in range(3):
                writer.write(POST % (b"/whole", 2) + b"zz")
                await asyncio.wait_for(reader.readuntil(b"\r\n\r\n2"), SOON_S)
            await asyncio.sleep(0.01)
            (connection,) = server.connections
            cycles = [found for found in gc.get_objects() if type(found) is type(connection.cycle)]
            assert [cycle for cycle in cycles if cycle.transport is connection.transport] == [connection.cycle]
    finally:
        gc.enable()


CALLS = {
    "answered": HEAD + b"\r\n",
    "answered twice": 2 * (HEAD + b"\r\n"),
    "sent ahead": POST % (b"/late", 2) + b"zz" + 9 * (HEAD + b"\r\n"),
    "still worked for": POST % (b"/never", 2) + b"zz",
    "in the middle of a body": POST % (b"/", 9) + b"zz",
    "in the middle of a head": HEAD,
    "refused": b"no HTTP\r\n\r\n",
}


@pytest.mark.parametrize("sent", CALLS.values(), ids=CALLS.keys())
async def test_a_connection_that_was_closed_is_let_go_without_a_search_for_garbage(
    server: Server, parser: type[Bounded], sent: bytes
) -> None:
    if parser is BoundedH11 and sent == CALLS["refused"]:
        pytest.skip("the exception that h11 refuses by lies in a circle with its own traceback")
    gc.disable()
    try:
        async with server.connected(sent) as (reader, _):
            (connection,) = await until(lambda: [weakref.ref(each) for each in server.connections])
            if sent in (CALLS["answered"], CALLS["answered twice"]):
                await asyncio.wait_for(reader.readuntil(b"\r\n\r\n0"), SOON_S)
            await asyncio.sleep(0.01)
        await until(lambda: connection() is None)
    finally:
        gc.enable()


async def until(true: Callable[[], T]) -> T:
    """What it comes to once it is true."""
    async with asyncio.timeout(SOON_S):
        while not (found := true()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    return found


async def test_a_body_that_is_still_to_come_is_not_taken_for_whole(server: Server) -> None:
    async with server.connected(POST % (b"/whole", 3) + b"z") as (reader, _):
        assert (await asyncio.wait_for(reader.read(1000), SOON_S)).endswith(b"\r\n\r\n0")


@pytest.mark.parametrize("size", [0, 3000, 200_000], ids="{} bytes".format)
async def test_the_leave_of_a_caller_is_told_to_whoever_works_for_it(server: Server, size: int) -> None:
    """Though the connection stops reading while much of a body waits to be taken."""
    async with server.connected(POST % (b"/never", size) + b"z" * size):
        assert await asyncio.wait_for(server.left.get(), SOON_S) == "works"

    assert await asyncio.wait_for(server.left.get(), SOON_S / 2) == "left"


async def test_the_leave_of_a_caller_is_told_to_the_first_of_its_requests_that_came_together(server: Server) -> None:
    async with server.connected(2 * (POST % (b"/never", 3) + b"zzz")):
        assert await asyncio.wait_for(server.left.get(), SOON_S) == "works"

    assert await asyncio.wait_for(server.left.get(), SOON_S / 2) == "left"


async def test_a_head_that_is_too_large_and_comes_at_once_is_refused_too(server: Server) -> None:
    head = b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (LIMITS.head_bytes + 1) + b"\r\n\r\n"

    assert problem(await server.answer(head)) == (431, "head_too_large")


async def test_what_is_no_http_is_one_problem(server: Server) -> None:
    assert problem(await server.answer(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")) == (400, "not_http")


async def trickled(server: Server, begun: bytes, piece: bytes) -> bytes:
    """All that is answered to a caller who goes on with a piece at a time until the connection is closed."""
    async with server.connected(begun) as (reader, writer):
        answering = asyncio.ensure_future(all_of(reader))
        with contextlib.suppress(ConnectionError):
            while not answering.done():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)
        return await answering


@pytest.mark.parametrize(
    "begun", [b"GET /", HEAD, HEAD + b"\r\nGET / HTTP/1.1\r\nx-"], ids=["target", "headers", "next"]
)
async def test_a_head_that_trickles_is_refused_in_time(impatient: Server, begun: bytes) -> None:
    began = asyncio.get_running_loop().time()
    answer = await trickled(impatient, begun, b"x")

    assert problem(answer[answer.rindex(b"HTTP/1.1") :]) == (408, "head_timeout")
    assert asyncio.get_running_loop().time() - began >= IMPATIENT.head_timeout_s
    assert not impatient.connections


@pytest.mark.parametrize("kept", [b"", HEAD + b"\r\n"], ids=["new", "kept"])
async def test_line_ends_without_a_request_hold_no_connection(impatient: Server, kept: bytes) -> None:
    await trickled(impatient, kept, b"\r\n")

    assert not impatient.connections


async def test_a_connection_that_says_nothing_is_closed_without_a_word(impatient: Server) -> None:
    assert await impatient.answer() == b""


async def test_what_is_left_of_a_body_that_was_refused_holds_no_connection(impatient: Server) -> None:
    head = b"POST /refused HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
    answer = await trickled(impatient, head, b"x")

    assert answer.count(b"HTTP/1.1") == 1  # no second answer to one request
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_request_that_takes_long_is_waited_for_whatever_its_caller_sends_meanwhile(impatient: Server) -> None:
    late = b"GET /late HTTP/1.1\r\nhost: x\r\n\r\n"
    async with impatient.connected(late) as (reader, writer):
        await asyncio.sleep(0.05)
        writer.write(HEAD)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n0"), 10)

    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_requests_sent_ahead_are_answered_in_turn(server: Server) -> None:
    heads = [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"] * (REQUESTS_AHEAD - 1)
    last = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

    answer = await server.answer(*heads, last)

    assert answer.count(b"HTTP/1.1 200 ") == REQUESTS_AHEAD


async def test_far_too_many_requests_ahead_do_not_pile_up(server: Server) -> None:
    waiting = 0

    async with AsyncExitStack() as stack:
        reader, _ = await stack.enter_async_context(server.connected(b"GET / HTTP/1.1\r\n\r\n" * 100_000))
        answering = asyncio.ensure_future(all_of(reader))
        while not answering.done():
            await asyncio.wait({answering}, timeout=0.01)
            waiting = max([waiting, *(len(getattr(each, "pipeline", ())) for each in server.connections)])

    assert waiting <= REQUESTS_AHEAD


async def test_an_answer_that_is_not_taken_is_let_go(impatient: Server) -> None:
    async with impatient.connected(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n") as (reader, _):
        await reader.readuntil(b"\r\n")
        deadline = asyncio.get_running_loop().time() + 20
        while impatient.connections:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)


async def test_an_answer_that_is_taken_slowly_comes_whole(impatient: Server) -> None:
    async with impatient.connected(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") as (reader, _):
        size, next_look = 0, 0
        while part := await reader.read(2**20):
            size += len(part)
            if size >= next_look:
                await asyncio.sleep(IMPATIENT.taken_timeout_s / 16)
                next_look = size + 4 * 2**20

    assert size > BIG
