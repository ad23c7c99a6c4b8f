"""What the service promises, over HTTP: one ID for an item, for good, and every way to look it up."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import redis

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


class HeldModel:
    """The service's own tokenizer, which works only while it is let."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.free = threading.Event()
        self.working = threading.Semaphore(0)
        self.split = tokenizer.split

    def encode(self, embeddings: Any, **options: Any) -> Any:
        self.working.release()
        assert self.free.wait(60)
        return self._tokenizer.encode(embeddings, **options)

    def encode_texts(self, pieces: Any, **options: Any) -> Any:
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


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as pool:
        yield pool


def written(items: list[dict[str, Any]], namespace: str) -> bytes:
    """`POST /tokenize` of these items, byte by byte."""
    body = json.dumps({"items": items, "namespace": namespace}).encode()
    head = ["POST /tokenize HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


# One item, one ID ----------------------------------------------------------------------------------------------------


def test_a_new_item_gets_a_semantic_id(service: Any, namespace: str) -> None:
    response = service.post({"item_id": "kettle-1", "text": "Cordless kettle, 1.7 l"}, namespace=namespace)

    answer = response.json()
    (item,) = answer["items"]
    assert answer["tokenizer"].startswith("small@")
    assert answer["namespace"] == namespace
    assert set(item) == {
        *("item_id", "semantic_id", "codes", "suffix", "tokens", "created", "content_changed"),
        *("quantization_error", "margin"),
    }
    assert item["item_id"] == "kettle-1"
    assert len(item["codes"]) == 3
    assert item["suffix"] == 0
    assert item["semantic_id"] == "-".join(map(str, [*item["codes"], 0]))
    letters = zip("abcd", [*item["codes"], 0], strict=True)
    assert item["tokens"] == [f"<{letter}_{number}>" for letter, number in letters]
    assert (item["created"], item["content_changed"]) == (True, False)
    assert item["quantization_error"] > 0
    assert item["margin"] > 0


def test_an_item_keeps_its_id_on_every_request(service: Any, namespace: str) -> None:
    item = {"item_id": "kettle-1", "text": "Cordless kettle, 1.7 l"}

    first, *later = [service.tokenize(item, namespace=namespace)[0] for _request in range(4)]

    assert first["created"]
    assert [entry["created"] for entry in later] == [False] * 3
    assert {entry["semantic_id"] for entry in later} == {first["semantic_id"]}


def test_known_content_is_answered_without_the_model(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    items = [{"item_id": f"t{i}", "text": f"kettle {i}"} for i in range(5)]
    items += [{"item_id": f"e{i}", "embedding": make_embedding(i)} for i in range(5)]
    first = service.tokenize(*items, namespace=namespace)
    rows = service.metric("semid_batch_rows_sum")

    again = service.tokenize(*reversed(items), namespace=namespace)

    assert service.metric("semid_batch_rows_sum") == rows
    assert [entry["semantic_id"] for entry in reversed(again)] == [entry["semantic_id"] for entry in first]
    assert {(entry["created"], entry["margin"], entry["quantization_error"]) for entry in again} == {
        (False, None, None)
    }


def test_only_what_is_new_in_a_request_goes_through_the_model(service: Any, namespace: str) -> None:
    service.tokenize(*[{"item_id": f"{i}", "text": f"kettle {i}"} for i in range(5)], namespace=namespace)
    rows = service.metric("semid_batch_rows_sum")

    entries = service.tokenize(*[{"item_id": f"{i}", "text": f"kettle {i}"} for i in range(8)], namespace=namespace)

    assert service.metric("semid_batch_rows_sum") == rows + 3
    assert [entry["created"] for entry in entries] == [False] * 5 + [True] * 3


def test_fields_are_the_text_they_make(service: Any, namespace: str) -> None:
    fields = {"title": "Kettle", "brand": "Acme", "categories": ["Home", "Kitchen"], "description": "", "price": 3}
    (as_fields,) = service.tokenize({"item_id": "a", "fields": fields}, namespace=namespace)
    rows = service.metric("semid_batch_rows_sum")

    (as_text,) = service.tokenize({"item_id": "a", "text": "Kettle. Acme. Home > Kitchen"}, namespace=namespace)

    assert as_text["semantic_id"] == as_fields["semantic_id"]
    assert service.metric("semid_batch_rows_sum") == rows


def test_both_forms_of_an_embedding_are_one_content(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    numbers = make_embedding(7)
    as_base64 = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()

    (listed,) = service.tokenize({"item_id": "a", "embedding": numbers}, namespace=namespace)
    (encoded,) = service.tokenize({"item_id": "a", "embedding": as_base64}, namespace=namespace)

    assert encoded["semantic_id"] == listed["semantic_id"]
    assert (listed["margin"] is None, encoded["margin"] is None) == (False, True)


def test_a_text_and_its_own_embedding_have_the_same_codes(service: Any, namespace: str, tokenizer: Any) -> None:
    text = "Cordless kettle"
    embedding = tokenizer.embed(tokenizer.split([text]))[0].tolist()

    by_text, by_embedding = service.tokenize(
        {"item_id": "a", "text": text}, {"item_id": "b", "embedding": embedding}, namespace=namespace
    )

    assert by_text["codes"] == by_embedding["codes"]


def test_answers_stand_in_the_order_of_the_items(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items: list[dict[str, Any]] = [{"item_id": f"t{i}", "text": "x" * (40 - i)} for i in range(20)]
    items[3:3] = [{"item_id": f"e{i}", "embedding": make_embedding(i)} for i in range(20)]
    items[7:7] = [{"item_id": "bad"}]

    entries = service.tokenize(*items, namespace=namespace)

    assert [entry["item_id"] for entry in entries] == [item["item_id"] for item in items]
    assert [i for i, entry in enumerate(entries) if "error" in entry] == [7]


def test_codes_are_the_same_alone_and_among_neighbours(service: Any, namespace: str) -> None:
    texts = [f"{'very ' * (i % 7)}long kettle number {i}" for i in range(24)]

    together = service.tokenize(
        *[{"item_id": f"{i}", "text": text} for i, text in enumerate(texts)], namespace=namespace, assign=False
    )
    alone = [
        service.tokenize({"item_id": f"{i}", "text": text}, namespace=namespace, assign=False)[0]
        for i, text in enumerate(texts)
    ]

    assert [entry["codes"] for entry in together] == [entry["codes"] for entry in alone]


@pytest.mark.parametrize("name", ["small", "full", None])
def test_the_tokenizer_may_be_named(service: Any, namespace: str, name: str | None) -> None:
    full = service.http.get("/tokenizers").json()["default"]

    response = service.post(
        {"item_id": "a", "text": "x"}, namespace=namespace, tokenizer=full if name == "full" else name
    )

    assert response.status_code == 200
    assert response.json()["tokenizer"] == full


# Collisions ----------------------------------------------------------------------------------------------------------


def test_equal_codes_receive_increasing_suffixes(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    first = service.tokenize(
        *[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(5)], namespace=namespace
    )
    then = service.tokenize(
        *[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(3, 8)], namespace=namespace
    )

    assert [entry["suffix"] for entry in first] == [0, 1, 2, 3, 4]
    assert [entry["suffix"] for entry in then] == [3, 4, 5, 6, 7]
    assert len({tuple(entry["codes"]) for entry in [*first, *then]}) == 1


def test_a_new_item_is_assigned_once_however_many_ask_at_once(
    service: Any, namespace: str, make_embedding: MakeEmbedding, callers: ThreadPoolExecutor
) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 2)} for i in range(6)]

    requests = [callers.submit(service.tokenize, *items, namespace=namespace) for _caller in range(20)]
    answers = [request.result() for request in requests]

    assert len({json.dumps([entry["semantic_id"] for entry in answer]) for answer in answers}) == 1
    assert [sum(answer[i]["created"] for answer in answers) for i in range(6)] == [1] * 6
    assert len({entry["semantic_id"] for entry in answers[0]}) == 6
    assert sorted(entry["suffix"] for entry in answers[0]) == [0, 0, 1, 1, 2, 2]


# The dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items = [{"item_id": "a", "embedding": make_embedding(1)}, {"item_id": "b", "text": "kettle"}]

    entries = service.tokenize(*items, namespace=namespace, assign=False)

    assert service.assigned(namespace) == {}
    assert [entry["semantic_id"] for entry in entries] == [None, None]
    assert [entry["suffix"] for entry in entries] == [None, None]
    assert [entry["created"] for entry in entries] == [False, False]
    assert [entry["group_size"] for entry in entries] == [0, 0]
    assert service.http.get("/assignment/a", params={"namespace": namespace}).status_code == 404
    assigned = service.tokenize(*items, namespace=namespace)
    assert [entry["codes"] for entry in assigned] == [entry["codes"] for entry in entries]
    assert [entry["created"] for entry in assigned] == [True, True]


def test_a_dry_run_gives_the_codes_of_the_content_whatever_was_seen_before(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    changed = {"item_id": "a", "embedding": make_embedding(2)}
    service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    (before,) = service.tokenize(changed, namespace=namespace, assign=False)
    service.tokenize(changed, namespace=namespace)

    (after,) = service.tokenize(changed, namespace=namespace, assign=False)

    assert after["codes"] == before["codes"]
    assert after["content_changed"]


def test_a_request_without_a_valid_item_leaves_nothing_in_a_new_namespace(service: Any, namespace: str) -> None:
    service.tokenize({"item_id": "a"}, namespace=namespace)

    with redis.Redis.from_url(service.redis_url) as client:
        assert list(client.scan_iter(f"sid:*{namespace}:*")) == []


def test_a_dry_run_says_what_is_known(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    held = service.tokenize(
        *[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(3)], namespace=namespace
    )
    before = service.assigned(namespace)

    known, new, changed = service.tokenize(
        {"item_id": "1", "embedding": make_embedding(1)},
        {"item_id": "new", "embedding": make_embedding(1)},
        {"item_id": "2", "embedding": make_embedding(2)},
        namespace=namespace,
        assign=False,
    )

    assert (known["semantic_id"], known["group_size"]) == (held[1]["semantic_id"], 3)
    assert (new["semantic_id"], new["codes"], new["group_size"]) == (None, held[0]["codes"], 3)
    assert (changed["semantic_id"], changed["content_changed"], changed["group_size"]) == (
        held[2]["semantic_id"],
        True,
        0,
    )
    assert changed["codes"] != held[2]["codes"]
    assert service.assigned(namespace) == before


# Changed content -----------------------------------------------------------------------------------------------------


def test_an_item_with_other_codes_keeps_its_id_and_says_so(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    old, new = ({"item_id": "a", "embedding": make_embedding(seed)} for seed in (1, 2))
    (first,) = service.tokenize(old, namespace=namespace)

    (changed,) = service.tokenize(new, namespace=namespace)
    rows = service.metric("semid_batch_rows_sum")
    (repeated,) = service.tokenize(new, namespace=namespace)
    unmoved = service.metric("semid_batch_rows_sum") == rows
    by_item = service.http.get("/assignment/a", params={"namespace": namespace}).json()
    (back,) = service.tokenize(old, namespace=namespace)

    assert {entry["semantic_id"] for entry in (changed, repeated, by_item, back)} == {first["semantic_id"]}
    assert [entry["content_changed"] for entry in (first, changed, repeated, by_item, back)] == [
        *(False, True, True, True, False)
    ]
    assert [entry["created"] for entry in (first, changed, repeated, back)] == [True, False, False, False]
    assert unmoved


def test_other_content_with_the_same_codes_is_no_change(service: Any, namespace: str) -> None:
    (first,) = service.tokenize({"item_id": "a", "text": "Kettle"}, namespace=namespace)

    (again,) = service.tokenize({"item_id": "a", "text": "  KETTLE "}, namespace=namespace)

    assert again["semantic_id"] == first["semantic_id"]
    assert not again["content_changed"]


# The look-ups --------------------------------------------------------------------------------------------------------


def test_forward_and_reverse_agree_in_both_forms(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items = [{"item_id": f"item {i}", "embedding": make_embedding(i % 3)} for i in range(9)]
    entries = service.tokenize(*items, namespace=namespace)

    for entry in entries:
        forward = service.http.get(f"/assignment/{entry['item_id']}", params={"namespace": namespace})
        written = service.http.get(f"/item/{entry['semantic_id']}", params={"namespace": namespace})
        tokens = service.http.get(f"/item/{''.join(entry['tokens'])}", params={"namespace": namespace})
        assert forward.status_code == 200
        assert forward.json() == written.json() == tokens.json()
        assert forward.json()["item_id"] == entry["item_id"]
        assert forward.json()["semantic_id"] == entry["semantic_id"]
        assert forward.json()["tokenizer"] == service.http.get("/tokenizers").json()["default"]
        assert forward.json()["assigned_at"].endswith("Z")


def test_many_ids_are_looked_up_in_their_order(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 2)} for i in range(6)]
    entries = service.tokenize(*items, namespace=namespace)
    asked = [entries[4]["semantic_id"], "15-15-15-99", "".join(entries[0]["tokens"]), entries[4]["semantic_id"]]

    response = service.http.post("/lookup", json={"semantic_ids": asked, "namespace": namespace})

    found = response.json()["items"]
    assert [entry.get("item_id") for entry in found] == ["4", None, "0", "4"]
    assert found[1]["semantic_id"] == "15-15-15-99"
    assert found[1]["error"]["type"] == TYPE + "not_assigned"
    assert found[2]["semantic_id"] == entries[0]["semantic_id"]


def test_what_nobody_holds_is_not_found(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    (entry,) = service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    next_suffix = "-".join(map(str, [*entry["codes"], 1]))

    for path in (f"/item/{next_suffix}", "/assignment/b"):
        response = service.http.get(path, params={"namespace": namespace})
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"] == TYPE + "not_assigned"


def test_namespaces_know_nothing_of_each_other(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    mine, other = f"{namespace}.a", f"{namespace}.b"

    service.tokenize({"item_id": "filler", "embedding": make_embedding(1)}, namespace=mine)
    (in_mine,) = service.tokenize({"item_id": "x", "embedding": make_embedding(1)}, namespace=mine)
    (in_other,) = service.tokenize({"item_id": "x", "embedding": make_embedding(1)}, namespace=other)

    assert (in_mine["suffix"], in_other["suffix"]) == (1, 0)
    assert in_other["created"]
    assert service.http.get(f"/item/{in_mine['semantic_id']}", params={"namespace": other}).status_code == 404
    assert service.http.get("/assignment/filler", params={"namespace": other}).status_code == 404
    assert service.http.get(f"/item/{in_mine['semantic_id']}").status_code == 404


@pytest.mark.parametrize(
    "item_id",
    [
        *(
            "a/b",
            "/a",
            "a/",
            "//",
            ".",
            "..",
            "a/../b",
            "%41",
            "100%",
            "a?b=c",
            "a#b",
            "a b",
            "a+b",
            "\n",
            "a\n",
            "a\nb",
            "a\tb",
            "a\\b",
        ),
        *("é" * 128, "x" * 256, "😀", "\ufffd", "\u202e", "e\u0301", "<script>", '"', "'", "null", "0", "a;b", "a&b"),
    ],
)
def test_any_item_id_is_found_by_its_path(service: Any, namespace: str, item_id: str) -> None:
    (entry,) = service.tokenize({"item_id": item_id, "text": "kettle"}, namespace=namespace)
    quoted = "".join(f"%{byte:02X}" for byte in item_id.encode())

    # By hand: clients take dots out of paths.
    answer = service.raw(
        f"GET /assignment/{quoted}?namespace={namespace} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    )

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    assert json.loads(body)["item_id"] == item_id
    assert json.loads(body)["semantic_id"] == entry["semantic_id"]


def test_a_path_with_a_line_end_finds_no_other_item(service: Any, namespace: str) -> None:
    (entry,) = service.tokenize({"item_id": "a", "text": "kettle"}, namespace=namespace)

    assert service.http.get("/assignment/a%0A", params={"namespace": namespace}).status_code == 404
    assert service.http.get(f"/item/{entry['semantic_id']}%0A", params={"namespace": namespace}).status_code == 422


def test_ids_that_look_alike_are_different_items(service: Any, namespace: str) -> None:
    ids = ["e\u0301", "\u00e9", "a", "A", "a ", "1", "1.0", "01"]

    entries = service.tokenize(*[{"item_id": item_id, "text": "kettle"} for item_id in ids], namespace=namespace)

    assert [entry["suffix"] for entry in entries] == list(range(8))


# Load ----------------------------------------------------------------------------------------------------------------


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
    service.until(lambda: len(service.batcher._rows) == 8, "the callers do not queue")

    held_model.free.set()

    for request in [first, *others]:
        assert request.result()[0]["created"]
    assert service.metric("semid_batch_rows_count") == batches + 2
    assert service.metric("semid_batch_rows_sum") == rows + 9


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
    service: Any, namespace: str, held_model: HeldModel, callers: ThreadPoolExecutor
) -> None:
    held_model.free.set()
    (known,) = service.tokenize({"item_id": "known", "text": "kettle"}, namespace=namespace)
    held_model.free.clear()
    while held_model.working.acquire(blocking=False):
        pass
    busy = callers.submit(service.tokenize, {"item_id": "busy", "text": "kettle"}, namespace=namespace)
    assert held_model.working.acquire(timeout=30)

    (again,) = service.tokenize({"item_id": "known", "text": "kettle"}, namespace=namespace)
    found = service.http.get(f"/item/{known['semantic_id']}", params={"namespace": namespace})

    assert again["semantic_id"] == known["semantic_id"]
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
        service.until(lambda: len(service.batcher._rows) == 10, "the leaver's rows do not queue")

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


# About the service ---------------------------------------------------------------------------------------------------


def test_the_service_says_that_it_is_well(service: Any) -> None:
    assert service.http.get("/healthz").json() == {"alive": True}
    assert service.http.get("/readyz").json() == {"ready": True}


def test_the_loaded_tokenizer_shows_its_manifest(service: Any, tokenizer: Any) -> None:
    answer = service.http.get("/tokenizers").json()

    (manifest,) = answer["tokenizers"]
    assert answer["default"] == manifest["tokenizer"] == tokenizer.full_name
    assert manifest["codebook_sizes"] == [16, 16, 16]
    assert manifest["components"]["text_encoder"]["weights"]["sha256"].startswith("53aa5117")


def test_the_metrics_count_items_by_outcome(service: Any, namespace: str) -> None:
    def count(outcome: str) -> float:
        return service.metric("semid_items_total", outcome=outcome)

    outcomes = ("created", "known", "existing", "dry_run", "failed")
    before = {outcome: count(outcome) for outcome in outcomes}

    service.tokenize(
        {"item_id": "a", "text": "x"}, {"item_id": "b", "text": "x"}, {"item_id": "c"}, namespace=namespace
    )
    service.tokenize({"item_id": "a", "text": "x"}, {"item_id": "b", "text": "y"}, namespace=namespace)
    service.tokenize({"item_id": "d", "text": "x"}, namespace=namespace, assign=False)

    assert {outcome: count(outcome) - before[outcome] for outcome in outcomes} == {
        "created": 2,
        "known": 1,
        "existing": 1,
        "dry_run": 1,
        "failed": 1,
    }


def test_the_metrics_name_routes_and_not_paths(service: Any) -> None:
    service.http.get("/assignment/secret-item")
    service.http.get("/nowhere/secret-item")

    response = service.http.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "secret-item" not in response.text
    assert 'route="/assignment/{item_id}"' in response.text


def test_the_pages_need_nothing_from_elsewhere(service: Any) -> None:
    for path in ("/docs", "/"):
        page = service.http.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert 'src="http' not in page.text
        assert 'href="https://cdn' not in page.text


def test_the_openapi_document_knows_every_route(service: Any) -> None:
    document = service.http.get("/openapi.json").json()

    assert set(document["paths"]) >= {
        *("/tokenize", "/lookup", "/item/{semantic_id}", "/assignment/{item_id}"),
        *("/tokenizers", "/healthz", "/readyz", "/metrics"),
    }


def test_an_answer_is_valid_json_whatever_the_numbers(service: Any, namespace: str) -> None:
    huge = np.full(384, 3e38).tolist()
    tiny = [1e-45, *[0.0] * 383]

    entries = service.tokenize(
        {"item_id": "huge", "embedding": huge}, {"item_id": "tiny", "embedding": tiny}, namespace=namespace
    )

    assert [entry["created"] for entry in entries] == [True, True]
