"""`application/x-ndjson`: lines are answered while the next ones are still to come."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.answers import Answer
from service.bodies import STREAM_BYTES, BodyGate
from service.bulk.ndjson import MAX_LINE_BYTES, MEDIA_TYPE, Line, LineSplitter, Ndjson
from service.bulk.row_thread import RowThread
from service.errors import InvalidLine
from tests.streaming import StreamingCaller

pytestmark = pytest.mark.usefixtures("nothing_left")
MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


def written(*items: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def post(service: Any, body: bytes, **query: Any) -> Any:
    return service.http.post("/tokenize", content=body, params=query, headers={"content-type": MEDIA_TYPE})


def entries(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


# Lines in, lines out -------------------------------------------------------------------------------------------------


def test_each_line_is_answered_in_order_as_a_json_body_would_be(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    items = [
        {"item_id": "text", "text": "kettle"},
        {"item_id": "fields", "fields": {"title": "Kettle", "brand": "Acme"}},
        {"item_id": "embedding", "embedding": make_embedding(1)},
        {"item_id": "bad"},
    ]

    answer = post(service, written(*items), namespace=namespace)
    again = service.tokenize(*items, namespace=namespace)

    first = entries(answer)
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.headers["semid-namespace"] == namespace
    assert answer.headers["semid-tokenizer"].startswith("small@")
    assert [entry["item_id"] for entry in first] == ["text", "fields", "embedding", "bad"]
    assert [entry.get("created") for entry in first] == [True, True, True, None]
    assert [entry.get("semantic_id") for entry in first] == [entry.get("semantic_id") for entry in again]
    assert first[3].pop("line") == 4
    assert first[3] == again[3]


def test_more_lines_than_a_request_has_items_are_answered_in_order(service: Any, namespace: str) -> None:
    items = [{"item_id": f"{i}", "text": f"kettle {i % 10}"} for i in range(1000)]

    answered = entries(post(service, written(*items), namespace=namespace))

    assert [entry["item_id"] for entry in answered] == [item["item_id"] for item in items]
    assert all(entry["created"] for entry in answered)
    assert len({entry["semantic_id"] for entry in answered}) == 1000


def test_the_first_line_is_answered_before_the_last_is_sent(service: Any, namespace: str) -> None:
    with StreamingCaller(service, MEDIA_TYPE, namespace=namespace) as caller:
        for i in range(3):
            caller.send(written({"item_id": f"{i}", "text": "kettle"}))
            assert json.loads(caller.answer.readline())["item_id"] == f"{i}"
        caller.end()
        assert caller.answer.read() == b""


def test_a_line_may_come_in_pieces_and_the_last_without_its_end(service: Any, namespace: str) -> None:
    body = written({"item_id": "a", "text": "kettle"}, {"item_id": "é", "text": "lamp"}).rstrip()
    with StreamingCaller(service, MEDIA_TYPE, namespace=namespace) as caller:
        for i in range(0, len(body), 7):
            caller.send(body[i : i + 7])
        caller.end()
        answered = [json.loads(line) for line in caller.answer.read().splitlines()]

    assert [entry["item_id"] for entry in answered] == ["a", "é"]


def test_lines_that_wait_go_together_in_their_order_and_no_more_than_a_group_of_them(row_thread: RowThread) -> None:
    chunks = [([Line(number, b"{}") for number in range(first, first + 100)], 200) for first in (0, 100, 200)]
    arrived = deque(chunks)

    lines, size = Ndjson(lambda _: pytest.fail("nothing is asked"), row_thread).together(arrived)

    assert [line.number for line in lines] == list(range(200))
    assert (size, list(arrived)) == (400, chunks[2:])


def test_an_empty_body_has_an_empty_answer(service: Any, namespace: str) -> None:
    assert entries(post(service, b"\n \r\n", namespace=namespace)) == []


def test_the_query_says_what_a_json_body_would(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    line, changed = (written({"item_id": "a", "embedding": make_embedding(seed)}) for seed in (1, 2))

    (tried,) = entries(post(service, line, namespace=namespace, assign="false"))
    (held,) = entries(post(service, line, namespace=namespace, tokenizer="small"))
    (kept,) = entries(post(service, changed, namespace=namespace))
    (moved,) = entries(post(service, changed, namespace=namespace, on_change="reassign"))

    assert (tried["semantic_id"], tried["group_size"], held["created"]) == (None, 0, True)
    assert (kept["semantic_id"], kept["content_changed"]) == (held["semantic_id"], True)
    assert moved["semantic_id"] != held["semantic_id"]


def test_the_query_fills_in_what_a_json_body_leaves_out(service: Any, namespace: str) -> None:
    item = {"item_id": "a", "text": "kettle"}
    query = {"namespace": namespace, "assign": "false"}

    unsaid = service.http.post("/tokenize", json={"items": [item]}, params=query).json()
    said = service.http.post("/tokenize", json={"items": [item], "assign": True}, params=query).json()

    assert (unsaid["namespace"], unsaid["items"][0]["semantic_id"]) == (namespace, None)
    assert (said["namespace"], said["items"][0]["created"]) == (namespace, True)


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "slug"),
    [
        (b'{"item_id": "bad", "text"', "invalid_line"),
        (b"{'item_id': 'bad'}", "invalid_line"),
        (b"\xff\xfe", "invalid_line"),
        (b"[" * 5000, "invalid_line"),
        (b'{"item_id": "bad", "text": "' + b"x" * MAX_LINE_BYTES + b'"}', "invalid_line"),
        (b"7", "invalid_item"),
        (b'{"item_id": "bad", "text": "a\\ud800"}', "invalid_text"),
        (b'{"item_id": "bad", "embedding": [NaN]}', "invalid_embedding"),
        (b'{"item_id": "bad", "text": "%b"}' % (b"x" * 5000), "invalid_text"),
    ],
    ids=range(9),
)
def test_a_faulty_line_fails_alone_and_says_where(service: Any, namespace: str, line: bytes, slug: str) -> None:
    before, after = written({"item_id": "before", "text": "x"}), written({"item_id": "after", "text": "y"})

    answered = entries(post(service, before + b"\n" + line + b"\r\n" + after, namespace=namespace))

    assert [entry["item_id"] for entry in answered][::2] == ["before", "after"]
    assert (answered[1]["error"]["type"], answered[1]["line"]) == (TYPE + slug, 3)
    assert set(service.assigned(namespace)) == {"before", "after"}


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ({"tokenizer": "other"}, {}, 422),
        ({"namespace": "a/b"}, {}, 422),
        ({"assign": "perhaps"}, {}, 422),
        ({"on_change": "rename"}, {}, 422),
        ({}, {"content-encoding": "gzip"}, 415),
    ],
)
def test_what_holds_for_all_lines_is_refused_as_a_whole(
    service: Any, query: dict[str, str], headers: dict[str, str], status: int
) -> None:
    refused = service.http.post(
        "/tokenize",
        content=written({"item_id": "never", "text": "x"}),
        params=query,
        headers={"content-type": MEDIA_TYPE, **headers},
    )

    assert refused.status_code == status
    assert refused.headers["content-type"] == "application/problem+json"


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=6),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], cuts: list[int]) -> None:
    body, splitter, found = b"\n".join(lines), LineSplitter(8), []
    while body:
        cuts.append(cuts.pop(0))
        found += splitter.split(body[: cuts[0]])
        assert splitter.held <= 8 * (1 + 64)  # were they all to become objects
        body = body[cuts[0] :]
    found += splitter.finish()

    expected = [(i, line) for i, line in enumerate(lines, start=1) if line.strip() or len(line) > 8]
    assert [line.number for line in found] == [number for number, _ in expected]
    for line, (_, content) in zip(found, expected, strict=True):
        assert isinstance(line.content, InvalidLine) if len(content) > 8 else line.content == content


def test_a_line_beyond_the_limit_is_not_held() -> None:
    splitter = LineSplitter(10)

    assert list(splitter.split(b"x" * 11)) == []
    assert splitter.held == 0
    assert [line.number for line in splitter.split(b"x" * 11 + b"\n{}\n")] == [1, 2]
    assert list(splitter.split(b"[]\n")) == [Line(3, b"[]")]


async def test_the_values_of_a_line_are_held_with_its_bytes(row_thread: RowThread) -> None:
    line = b'{"item_id": "a", "text": [' + b"{}," * 1000 + b"{}]}\n"

    async def chunks() -> AsyncIterator[bytes]:
        yield line[:2000]
        yield line[2000:]

    gate = BodyGate(max_body_bytes=1, inflight_bytes=1, timeout_s=0.05)
    with gate.allowance() as allowance:
        async for (only,), size in Ndjson(refuse, row_thread).groups(chunks(), allowance):
            assert only.number == 1
            assert gate._held_bytes - STREAM_BYTES == size > 64 * 1000
            allowance.give(size)
        assert gate._held_bytes == STREAM_BYTES


async def refuse(_entries: Sequence[object]) -> list[Answer]:
    raise AssertionError


# Pace ----------------------------------------------------------------------------------------------------------------


def test_a_caller_who_takes_no_answers_is_not_read_any_further(service: Any, namespace: str) -> None:
    (held,) = service.tokenize({"item_id": "a", "text": "kettle"}, namespace=namespace)
    assert held["created"]
    line = written({"item_id": "a", "text": "kettle"}) * 1000
    most_held, sent = 0, 0
    with StreamingCaller(service, MEDIA_TYPE, namespace=namespace) as caller:
        caller.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.socket.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while sent < 2000:
                caller.send(line)
                sent += 1
                most_held = max(most_held, service.state.gate._held_bytes)
    assert 0 < sent < 2000
    assert 0 < most_held < 4 * 2**20


def test_a_stream_waits_while_the_queue_is_full(service: Any, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = service.batcher._capacity
    monkeypatch.setattr(capacity, "_queue_tokens", 0)
    refused = service.post({"item_id": "single", "text": "kettle"}, namespace=namespace)
    with StreamingCaller(service, MEDIA_TYPE, namespace=namespace) as caller:
        caller.send(written({"item_id": "a", "text": "kettle"}))
        caller.end()
        threading.Timer(0.3, monkeypatch.undo).start()

        (entry,) = [json.loads(line) for line in caller.answer.read().splitlines()]

    assert refused.status_code == 429
    assert entry["created"]
