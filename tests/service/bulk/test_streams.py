"""A stream under way: its pace, its order, its end, and callers who leave."""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.bodies import STREAM_BYTES, Allowance, BodyGate
from service.bulk.caller import PROGRESS_BYTES
from service.bulk.streams import GROUPS_IN_FLIGHT, StreamedAnswer
from service.bulk.terms import StreamTerms
from service.errors import BodyTimeout, NotJson, Overloaded, RegistryUnavailable, SemidError, ShuttingDown


class Connection:
    """What a server hands to an app, and what the app sends; the caller acts when the test says so."""

    def __init__(self) -> None:
        self._arriving: asyncio.Queue[Message] = asyncio.Queue()
        self.taking = asyncio.Event()
        self.taking.set()
        self.sent: list[Message] = []

    def arrives(self, *chunks: bytes, end: bool = False) -> None:
        for chunk in chunks:
            self._arriving.put_nowait({"type": "http.request", "body": chunk, "more_body": True})
        if end:
            self._arriving.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    def leaves(self) -> None:
        self._arriving.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self._arriving.get()

    async def send(self, message: Message) -> None:
        await self.taking.wait()
        self.sent.append(message)

    @property
    def answer(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def unread(self) -> int:
        return self._arriving.qsize()


class Words:
    """A format of one word a chunk, whose answers come when the test says so."""

    media_type = "text/words"

    def __init__(self, ahead_bytes: int = 0, longest: int = 0) -> None:
        self.ahead_bytes, self._longest = ahead_bytes, longest
        self.begun: list[bytes] = []
        self.dropped: list[bytes] = []
        self.free = asyncio.Event()
        self.free.set()
        self.faults: dict[bytes, list[Exception]] = {}

    def begin(self) -> bytes:
        return b":"

    async def groups(self, chunks: AsyncIterator[bytes], allowance: Allowance) -> AsyncIterator[tuple[bytes, int]]:
        async for chunk in chunks:
            if chunk == b"broken":
                raise NotJson("here")
            if chunk.startswith(b"-"):  # more of it is to come
                continue
            await allowance.take(len(chunk))
            yield chunk, len(chunk)

    def together(self, arrived: deque[tuple[bytes, int]]) -> tuple[bytes, int]:
        word, size = arrived.popleft()
        while arrived and len(word + arrived[0][0]) <= self._longest:
            more, more_size = arrived.popleft()
            word, size = word + more, size + more_size
        return word, size

    async def answer(self, group: bytes) -> bytes:
        self.begun.append(group)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.dropped.append(group)
            raise
        if self.faults.get(group):
            raise self.faults[group].pop(0)
        await asyncio.sleep(0.01 / len(group))
        return group + b";"

    def end(self, problem: SemidError | None) -> bytes:
        return b"." if problem is None else problem.slug.encode()


class Exchange:
    """A stream and both its ends."""

    def __init__(
        self, words: Words | None = None, *, patience_s: float = 5.0, inflight_bytes: int = 10 * STREAM_BYTES
    ) -> None:
        self.connection, self.words = Connection(), words or Words()
        self.gate = BodyGate(max_body_bytes=10, inflight_bytes=inflight_bytes, timeout_s=patience_s)
        allowance = self.gate.allowance()
        self.terms = StreamTerms(patience_s)
        self.answer = StreamedAnswer(self.words, allowance, {"semid-x": "y"}, self.terms)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.answer({}, self.connection.receive, self.connection.send))


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


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


async def test_work_is_dropped_when_the_caller_leaves() -> None:
    exchange = Exchange()
    exchange.words.free.clear()
    exchange.connection.arrives(b"a", b"b")
    stream = exchange.start()
    await until(lambda: len(exchange.words.begun) == 2)

    exchange.connection.leaves()

    with pytest.raises(ClientDisconnect):
        await stream
    assert sorted(exchange.words.dropped) == [b"a", b"b"]
    assert exchange.gate._held_bytes == 0


async def test_work_is_dropped_when_the_caller_leaves_after_the_body() -> None:
    exchange = Exchange()
    exchange.connection.arrives(b"a")
    stream = exchange.start()
    await until(lambda: exchange.connection.answer == b":a;")
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


async def test_a_service_that_ends_answers_what_it_read_and_says_why_the_stream_ends() -> None:
    exchange = Exchange()
    exchange.words.free.clear()
    exchange.connection.arrives(b"a", b"b")
    stream = exchange.start()
    await until(lambda: len(exchange.words.begun) == 2)

    exchange.terms.drain.begin(0.2)
    await asyncio.sleep(0.12)
    exchange.connection.arrives(b"c")
    exchange.words.free.set()

    await stream
    assert exchange.connection.answer == b":a;b;shutting_down"
    assert not exchange.connection.sent[-1]["more_body"]
    assert exchange.gate._held_bytes == 0


async def test_a_body_that_ends_soon_is_answered_by_a_service_that_ends() -> None:
    exchange = Exchange()
    exchange.connection.arrives(b"a")
    stream = exchange.start()
    await until(lambda: exchange.connection.answer == b":a;")

    exchange.terms.drain.begin(10.0)
    exchange.connection.arrives(b"b", end=True)

    await stream
    assert exchange.connection.answer == b":a;b;."


async def test_answers_that_take_too_long_are_not_waited_for_by_a_service_that_ends() -> None:
    exchange = Exchange()
    exchange.connection.arrives(b"a")
    stream = exchange.start()
    await until(lambda: exchange.connection.answer == b":a;")
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


# Allowance -----------------------------------------------------------------------------------------------------------


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
