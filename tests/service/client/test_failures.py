"""What becomes of a call where the service, or what lies in between, does not answer as it should."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

from service.access.keys import KeyFile, Scope
from service.client import (
    AccessDenied,
    AsyncTokenizerClient,
    ClientClosed,
    Refused,
    TokenizerClient,
    Unavailable,
    UnusableAnswer,
    Waiting,
)
from service.client.patience import retry_after_s
from tests.service.client.conftest import Script, breaks_off, says

Connect = Callable[..., Any]
Start = Callable[..., Script]

ITEMS = [{"item_id": f"i{number}", "text": "kettle"} for number in range(6)]
PROBLEM = {"type": "urn:semid:problem:registry_unavailable", "title": "The registry cannot be reached", "detail": "x"}


def line(number: int) -> bytes:
    entry = {"item_id": f"i{number}", "semantic_id": f"{number}-0", "codes": [number], "suffix": 0, "tokens": []}
    return orjson.dumps({**entry, "created": True, "content_changed": False}) + b"\n"


def lines(first: int, end: int) -> bytes:
    return b"".join(map(line, range(first, end)))


def sent(script: Script) -> list[list[str]]:
    """The item ids of each request of lines."""
    return [[json.loads(each)["item_id"] for each in body.splitlines()] for _, _, body in script.seen]


def test_what_may_pass_is_tried_again_and_no_sooner_than_asked(connect: Connect, script: Start) -> None:
    heard: list[Waiting] = []
    service = script(says(503), says(429, Retry_After="0.4"), breaks_off(b""), says(200, lines(0, 6)))

    answers = list(connect(service.url, on_wait=heard.append).tokenize(ITEMS))

    assert [answer.item_id for answer in answers] == [item["item_id"] for item in ITEMS]
    assert [(waiting.attempts, waiting.reached) for waiting in heard] == [(1, True), (2, True), (3, False)]
    assert heard[0].pause_s <= 0.1
    assert 0.4 <= heard[1].pause_s <= 0.44
    assert 0.2 <= heard[2].pause_s <= 0.4
    assert "429" in heard[1].trouble


def test_what_was_answered_before_a_cut_stands_and_the_rest_is_sent_again(connect: Connect, script: Start) -> None:
    ended = lines(2, 4) + orjson.dumps({"problem": {**PROBLEM, "status": 503}}) + b"\n"
    service = script(breaks_off(lines(0, 3)[:-5]), says(200, ended), says(200, lines(4, 6)))

    answers = list(connect(service.url).tokenize(ITEMS))

    assert [answer.item_id for answer in answers] == ["i0", "i1", "i2", "i3", "i4", "i5"]
    assert sent(service) == [["i0", "i1", "i2", "i3", "i4", "i5"], ["i2", "i3", "i4", "i5"], ["i4", "i5"]]


def arrow(first: int, end: int, problem: dict[str, str] | None = None) -> bytes:
    """Answers, a record batch a row; a problem in a row behind them."""
    rows: list[dict[str, Any]] = [{"item_id": f"i{number}", "error": None} for number in range(first, end)]
    rows += [{"item_id": None, "error": problem}] if problem else []
    error = pa.struct([(name, pa.string()) for name in ("type", "title", "detail")])
    schema = pa.schema([("item_id", pa.string()), ("error", error)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for row in rows:
            stream.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    return bytes(sink.getvalue())


def test_record_batches_before_a_cut_stand_too(connect: Connect, script: Start) -> None:
    service = script(breaks_off(arrow(0, 4)[:-100]), says(200, arrow(3, 5, PROBLEM)), says(200, arrow(5, 6)))
    table = pa.table({"item_id": [f"i{number}" for number in range(6)], "text": ["kettle"] * 6})

    answered = connect(service.url).tokenize_table(table)

    assert answered["item_id"].to_pylist() == [f"i{number}" for number in range(6)]
    asked = [pa.ipc.open_stream(body).read_all()["item_id"].to_pylist() for _, _, body in service.seen]
    assert asked == [["i0", "i1", "i2", "i3", "i4", "i5"], ["i3", "i4", "i5"], ["i5"]]


def test_a_service_that_takes_fewer_is_sent_fewer(connect: Connect, script: Start) -> None:
    too_many = says(413, orjson.dumps({"type": "urn:semid:problem:too_many_items", "title": "t", "detail": "d"}))
    service = script(too_many, says(200, lines(0, 3)), says(200, lines(3, 6)))

    answers = list(connect(service.url).tokenize(ITEMS))

    assert len(answers) == 6
    assert [len(ids) for ids in sent(service)] == [6, 3, 3]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (says(400, b"<html>"), Refused, "400 Bad Request"),
        (says(401), AccessDenied, "401"),
        (says(500), Refused, "500"),
        (says(200, b"<html>\n"), UnusableAnswer, "cannot be read"),
        (says(200, line(1)), UnusableAnswer, "the answer to 'i0' is one to 'i1'"),
        (says(200, lines(0, 5)), UnusableAnswer, "6 rows were sent, 5 are answered"),
        (says(200, lines(0, 6) + line(0)), UnusableAnswer, "7 are answered"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(
    connect: Connect, script: Start, answer: Any, error: type[Exception], words: str
) -> None:
    service = script(answer)
    with pytest.raises(error, match=words):
        list(connect(service.url).tokenize(ITEMS))
    assert len(service.seen) == 1


def test_patience_ends_without_progress_and_the_reason_is_told(connect: Connect, script: Start) -> None:
    with pytest.raises(Unavailable, match=r"gave up on http://127\.0\.0\.1:1 after \d attempts: ConnectError"):
        list(connect("http://127.0.0.1:1", patience_s=0.3).tokenize(ITEMS))
    # longer than anybody waits: at once
    busy = script(says(503, orjson.dumps(PROBLEM), Retry_After="3600"))
    began = time.monotonic()
    with pytest.raises(Unavailable, match="503 The registry cannot be reached: x") as gave_up:
        connect(busy.url, patience_s=60).assignment("a")
    assert gave_up.value.retry_after_s == 3600
    assert time.monotonic() - began < 30
    # a cut after each answer, for longer than the patience
    slow = script(*(breaks_off(line(number)) for number in range(5)), says(200, line(5)))
    assert len(list(connect(slow.url, patience_s=0.1).tokenize(ITEMS))) == 6


def test_a_call_that_goes_on_failing_is_logged_once_unless_somebody_is_told(
    connect: Connect, script: Start, caplog: pytest.LogCaptureFixture
) -> None:
    away, there = says(503, orjson.dumps(PROBLEM)), says(200, b'{"ready": true}')
    waits: list[Any] = []

    connect(script(*[away] * 6, there).url).wait_until_ready()
    connect(script(*[away] * 4, there).url, on_wait=waits.append).wait_until_ready()

    (told,) = [record.getMessage() for record in caplog.records if record.name == "service.client.patience"]
    assert "503 The registry cannot be reached: x; trying again for up to 120 s" in told
    assert len(waits) == 4


@pytest.mark.parametrize("url", ["http://", "ftp://x", "", "localhost:8000"])
def test_what_is_no_address_is_told_what_one_looks_like(url: str) -> None:
    with pytest.raises(ValueError, match="it begins with http:// or https:// and a host"):
        TokenizerClient(url)


def test_an_address_that_is_none_and_a_limit_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="is no address"):
        TokenizerClient("http://127.0.0.1:no")
    with pytest.raises(ValueError, match="begins with http"):
        TokenizerClient("127.0.0.1:8000")
    with pytest.raises(ValueError, match="at least 1"):
        TokenizerClient("http://127.0.0.1:1", in_flight=0)
    with pytest.raises(ValueError, match="patience_s is at least 0"):
        TokenizerClient("http://127.0.0.1:1", patience_s=-1)


def test_the_key_and_other_headers_go_with_every_request(connect: Connect, script: Start) -> None:
    service = script(says(200, b'{"ready": true}'))

    connect(service.url, api_key="secret", headers={"x-team": "search"}).ready()

    ((_, headers, _),) = service.seen
    assert (headers["authorization"], headers["x-team"]) == ("Bearer secret", "search")


def test_a_key_lets_in_to_what_it_is_for(
    start_service: Callable[..., Any], make_checkpoint: Callable[..., Path], data_dir: Path
) -> None:
    file, secret = KeyFile().with_new("reader", Scope.READ)
    file.write(data_dir / "keys.json")
    checkpoint = make_checkpoint("keyed", 4, 4, takes_text=False)
    service = start_service(data_dir=data_dir, keys_file=data_dir / "keys.json", checkpoint=checkpoint)
    url = str(service.http.base_url)
    try:
        with TokenizerClient(url, api_key=secret) as client:
            assert client.tokenizers().default.startswith("keyed@")
            with pytest.raises(AccessDenied, match="403 The key is not for this"):
                list(client.tokenize(ITEMS))
        with TokenizerClient(url) as client, pytest.raises(AccessDenied, match="401 A key is needed"):
            client.assignment("a")
    finally:
        service.stop()


def test_retry_after_may_be_a_date() -> None:
    assert 8 < retry_after_s(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert [retry_after_s(value) for value in (None, "", "soon", "-3", formatdate(0, usegmt=True))] == [0.0] * 5


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held(released: threading.Event) -> Callable[[Any], None]:
    """The first item is answered; other answers do not come until they are released."""

    def answer(handler: Any) -> None:
        if b'"i0"' in handler.body:
            says(200, line(0))(handler)
            return
        released.wait(30)
        handler.close_connection = True

    return answer


def noted(source: Iterator[Any], taken: list[int]) -> Iterator[Any]:
    for number, item in enumerate(source):
        taken.append(number)
        yield item


def test_no_more_is_read_than_is_in_flight_and_answers_do_not_wait_for_the_source(script: Start) -> None:
    service = script(*(says(200, line(number)) for number in range(6)))
    taken: list[int] = []
    with TokenizerClient(service.url, batch_items=1, in_flight=1) as client:
        answers = client.tokenize(noted(iter(ITEMS), taken))
        assert next(answers).item_id == "i0"
        assert taken == [0]
        assert [answer.item_id for answer in answers] == ["i1", "i2", "i3", "i4", "i5"]


async def test_a_source_that_fails_fails_after_the_answers_to_what_it_gave(script: Start) -> None:
    twice = [says(200, lines(0, 2)), says(200, lines(2, 4))]
    service = script(*twice, *twice)
    seen: list[str | None] = []

    def source() -> Iterator[Any]:
        yield from ITEMS[:4]
        raise LookupError("no more")

    with TokenizerClient(service.url, batch_items=2, in_flight=1) as client, pytest.raises(LookupError):
        seen.extend(answer.item_id for answer in client.tokenize(source()))
    assert seen == ["i0", "i1", "i2", "i3"]
    async with AsyncTokenizerClient(service.url, batch_items=2, in_flight=1) as client:
        answers = client.tokenize(source())
        assert [(await anext(answers)).item_id for _ in range(4)] == seen
        with pytest.raises(LookupError):
            await anext(answers)


def test_leaving_closing_and_an_interrupt_end_what_is_under_way(script: Start) -> None:
    released = threading.Event()
    service = script(held(released))
    threads = threading.active_count()
    client = TokenizerClient(service.url, batch_items=1, in_flight=3)
    began = time.monotonic()

    # an iterator that is left
    answers = client.tokenize(ITEMS)
    assert next(answers).item_id == "i0"
    answers.close()
    # a client that is closed while another thread waits
    failed: list[Exception] = []

    def wait() -> None:
        try:
            list(client.tokenize(ITEMS))
        except ClientClosed as error:
            failed.append(error)

    asked = len(service.seen)
    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: len(service.seen) > asked)
    client.close()
    waiting.join(10)

    assert failed
    assert not waiting.is_alive()
    with pytest.raises(ClientClosed):
        client.assignment("a")
    client.close()
    assert time.monotonic() - began < 20
    released.set()
    until(lambda: threading.active_count() == threads)


async def test_cancelling_leaves_no_task_and_no_connection(script: Start) -> None:
    released = threading.Event()
    service = script(held(released))

    async def source() -> AsyncIterator[Any]:
        for item in ITEMS:
            yield item
            await asyncio.sleep(0)

    async with AsyncTokenizerClient(service.url, batch_items=1, in_flight=3) as client:

        async def work() -> None:
            async for _ in client.tokenize(source()):
                pass

        working = asyncio.create_task(work())
        await asyncio.to_thread(until, lambda: len(service.seen) > 1)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert asyncio.all_tasks() == {asyncio.current_task()}
        # closed by another task
        asking = asyncio.create_task(client.assignment("a"))
        await asyncio.sleep(0.05)
        await client.aclose()
        with pytest.raises(ClientClosed):
            await asking
    released.set()
