"""What the service promises, over HTTP: one ID for an item, for good."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


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
    (repeated,) = service.tokenize(new, namespace=namespace)
    by_item = service.http.get("/assignment/a", params={"namespace": namespace}).json()
    (back,) = service.tokenize(old, namespace=namespace)

    assert {entry["semantic_id"] for entry in (changed, repeated, by_item, back)} == {first["semantic_id"]}
    assert [entry["content_changed"] for entry in (first, changed, repeated, by_item, back)] == [
        *(False, True, True, True, False)
    ]
    assert [entry["created"] for entry in (first, changed, repeated, back)] == [True, False, False, False]
    assert [entry["margin"] is None for entry in (first, changed, repeated, back)] == [False, False, True, False]


def test_a_few_embeddings_are_claimed_without_asking_first_who_is_known(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(i)} for i in range(3)]
    asked = service.metric("semid_registry_seconds_count", call="recall")

    first = service.tokenize(*items, namespace=namespace)
    again = service.tokenize(*items, namespace=namespace)
    moved = service.tokenize({**items[0], "embedding": make_embedding(9)}, namespace=namespace, on_change="reassign")
    unmoved = service.tokenize({**items[0], "embedding": make_embedding(9)}, namespace=namespace, on_change="reassign")

    assert service.metric("semid_registry_seconds_count", call="recall") == asked
    assert [entry["semantic_id"] for entry in again] == [entry["semantic_id"] for entry in first]
    assert [(entry["created"], entry["margin"], entry["quantization_error"]) for entry in again] == [
        (False, None, None)
    ] * 3
    assert moved[0]["created"]
    assert (unmoved[0]["semantic_id"], unmoved[0]["margin"]) == (moved[0]["semantic_id"], None)


def test_other_content_with_the_same_codes_is_no_change(service: Any, namespace: str) -> None:
    (first,) = service.tokenize({"item_id": "a", "text": "Kettle"}, namespace=namespace)

    (again,) = service.tokenize({"item_id": "a", "text": "  KETTLE "}, namespace=namespace)

    assert again["semantic_id"] == first["semantic_id"]
    assert not again["content_changed"]
