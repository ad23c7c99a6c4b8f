"""Callers at once over HTTP: shared batches, small requests beside bulk, a full queue, and those who leave."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


class HeldModel:
    """The service's own tokenizer, which works only while it is let, but for the texts with which it `goes_on`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.free = threading.Event()
        self.working = threading.Semaphore(0)
        self.split = tokenizer.split
        self.goes_on: Callable[[Any], bool] = lambda _: False

    def encode(self, embeddings: Any, **options: Any) -> Any:
        self.working.release()
        assert self.free.wait(60)
        return self._tokenizer.encode(embeddings, **options)

    def encode_texts(self, pieces: Any, **options: Any) -> Any:
        if not self.goes_on(pieces):
            self.working.release()
            assert self.free.wait(60)
        return self._tokenizer.encode_texts(pieces, **options)


@pytest.fixture
def held_model(service: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldModel]:
    """The shared service's model, held until set free."""
    held = HeldModel(service.batcher._encoder)
    monkeypatch.setattr(service.batcher, "_encoder", held)
    yield held
    held.free.set()


def written(items: list[dict[str, Any]], namespace: str) -> bytes:
    """`POST /tokenize` of these items, byte by byte."""
    body = json.dumps({"items": items, "namespace": namespace}).encode()
    head = ["POST /tokenize HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def test_concurrent_callers_share_a_batch(
    service: Any, namespace: str, held_model: HeldModel, callers: ThreadPoolExecutor
) -> None:
    batches = service.metric("semid_batch_rows_count")
    rows = service.metric("semid_batch_rows_sum")
    first = callers.submit(service.tokenize, {"item_id": "first", "text": "kettle"}, namespace=namespace)
    assert held_model.working.acquire(timeout=30)
    others = [
        callers.submit(service.tokenize, {"item_id": f"{i}", "text": "kettle"}, namespace=namespace) for i in range(8)
    ]
    service.until(lambda: service.batcher.queued_rows == 8, "the callers do not queue")

    held_model.free.set()

    for request in [first, *others]:
        assert request.result()[0]["created"]
    assert service.metric("semid_batch_rows_count") == batches + 2
    assert service.metric("semid_batch_rows_sum") == rows + 9


def test_a_single_listing_is_answered_while_a_feed_is_in_the_model(
    service: Any, namespace: str, held_model: HeldModel, callers: ThreadPoolExecutor
) -> None:
    held_model.goes_on = lambda pieces: len(pieces) == 1
    feed = [[{"item_id": f"{part}-{i}", "text": f"kettle {i} " * 9} for i in range(64)] for part in range(3)]
    bulk = [callers.submit(service.tokenize, *items, namespace=namespace) for items in feed]
    assert held_model.working.acquire(timeout=30)

    single = service.tokenize({"item_id": "new", "text": "kettle"}, namespace=namespace)
    meanwhile = [request.done() for request in bulk]
    held_model.free.set()

    assert single[0]["created"]
    assert meanwhile == [False] * 3
    assert all(entry["created"] for request in bulk for entry in request.result())


def test_beyond_the_queue_callers_are_refused_and_may_come_again(
    service: Any,
    namespace: str,
    held_model: HeldModel,
    callers: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service.batcher._capacity, "_queue_tokens", 20)
    accepted = [callers.submit(service.post, {"item_id": "first", "text": "kettle"}, namespace=namespace)]
    assert held_model.working.acquire(timeout=30)
    accepted.append(callers.submit(service.post, {"item_id": "long", "text": "kettle " * 50}, namespace=namespace))
    service.until(lambda: service.metric("semid_queue_tokens") > 20, "the long text does not queue")

    refused = service.post({"item_id": "refused", "text": "kettle"}, namespace=namespace)
    held_model.free.set()

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["type"] == TYPE + "overloaded"
    assert [request.result().status_code for request in accepted] == [200, 200]
    assert set(service.assigned(namespace)) == {"first", "long"}
    assert service.post({"item_id": "refused", "text": "kettle"}, namespace=namespace).status_code == 200


def test_known_content_and_look_ups_are_answered_while_the_model_is_busy(
    service: Any,
    namespace: str,
    held_model: HeldModel,
    callers: ThreadPoolExecutor,
    make_embedding: Callable[[int], list[float]],
) -> None:
    held_model.free.set()
    (known,) = service.tokenize({"item_id": "known", "text": "kettle"}, namespace=namespace)
    embedded = {"item_id": "embedded", "embedding": make_embedding(1)}
    (known_embedding,) = service.tokenize(embedded, namespace=namespace)
    held_model.free.clear()
    while held_model.working.acquire(blocking=False):
        pass
    busy = callers.submit(service.tokenize, {"item_id": "busy", "text": "kettle"}, namespace=namespace)
    assert held_model.working.acquire(timeout=30)

    (again,) = service.tokenize({"item_id": "known", "text": "kettle"}, namespace=namespace)
    (embedding_again,) = service.tokenize(embedded, namespace=namespace)
    found = service.http.get(f"/item/{known['semantic_id']}", params={"namespace": namespace})

    assert again["semantic_id"] == known["semantic_id"]
    assert embedding_again["semantic_id"] == known_embedding["semantic_id"]
    assert found.status_code == 200
    assert not busy.done()
    held_model.free.set()
    assert busy.result()[0]["created"]


def test_the_work_of_a_caller_who_left_never_reaches_the_model(
    service: Any, namespace: str, held_model: HeldModel, callers: ThreadPoolExecutor
) -> None:
    rows = service.metric("semid_batch_rows_sum")
    gone = service.metric("semid_http_requests_total", status="499")
    stayer = callers.submit(service.tokenize, {"item_id": "stayer", "text": "kettle"}, namespace=namespace)
    assert held_model.working.acquire(timeout=30)
    items = [{"item_id": f"leaver {i}", "text": "kettle"} for i in range(10)]
    with socket.create_connection(service.address) as connection:
        connection.sendall(written(items, namespace))
        service.until(lambda: service.batcher.queued_rows == 10, "the leaver's rows do not queue")

    service.until(lambda: service.metric("semid_http_requests_total", status="499") > gone, "its leave was not seen")
    held_model.free.set()

    assert stayer.result()[0]["created"]
    service.until(lambda: service.metric("semid_queue_tokens") == 0, "the leaver's rows stay in the queue")
    assert service.metric("semid_batch_rows_sum") == rows + 1
    assert set(service.assigned(namespace)) == {"stayer"}


def test_a_caller_who_leaves_while_its_batch_runs_gets_nothing_assigned(
    service: Any, namespace: str, held_model: HeldModel
) -> None:
    gone = service.metric("semid_http_requests_total", status="499")
    leaver = [{"item_id": "leaver", "text": "kettle"}]
    with socket.create_connection(service.address) as connection:
        connection.sendall(written(leaver, namespace))
        assert held_model.working.acquire(timeout=30)
    service.until(lambda: service.metric("semid_http_requests_total", status="499") > gone, "its leave was not seen")

    held_model.free.set()

    assert service.tokenize({"item_id": "next", "text": "kettle"}, namespace=namespace)[0]["created"]
    assert set(service.assigned(namespace)) == {"next"}
