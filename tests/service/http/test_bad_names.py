"""Semantic IDs, item ids and options that are none are refused wherever they are read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from tests.service.http.refusals import TYPE, assert_problem

pytestmark = pytest.mark.usefixtures("well_afterwards")

JSON = {"content-type": "application/json"}
ITEM = {"item_id": "never", "text": "kettle"}

BAD_SEMANTIC_IDS = {
    "too few parts": "1-2-3",
    "too many parts": "1-2-3-4-0",
    "one number": "7",
    "a code out of range": "16-2-3-0",
    "a last code out of range": "1-2-16-0",
    "a negative code": "-1-2-3-0",
    "a sign": "+1-2-3-0",
    "leading zeros": "01-2-3-0",
    "letters": "a-b-c-d",
    "an empty part": "1--3-0",
    "blanks": " 1-2-3-0",
    "a line end": "1-2-3-0\n",
    "digits of another script": "１-2-3-0",  # noqa: RUF001 - that is the test
    "a suffix of 11 digits": "1-2-3-99999999999",
    "a suffix beyond 32 bits": "1-2-3-2147483648",
    "5000 digits": "1-2-3-" + "9" * 5000,
    "a NUL": "1-2-3-0\0",
    "too few tokens": "<a_1><b_2><c_3>",
    "too many tokens": "<a_1><b_2><c_3><d_0><e_0>",
    "tokens in the wrong order": "<a_1><c_2><b_3><d_0>",
    "something between tokens": "<a_1>, <b_2><c_3><d_0>",
    "something after tokens": "<a_1><b_2><c_3><d_0>x",
    "a token out of range": "<a_16><b_2><c_3><d_0>",
    "an open token": "<a_1><b_2><c_3><d_0",
    "both forms": "<a_1>-2-3-0",
}


def quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


@pytest.mark.parametrize("semantic_id", BAD_SEMANTIC_IDS.values(), ids=BAD_SEMANTIC_IDS.keys())
def test_a_malformed_semantic_id_is_refused_wherever_it_is_read(service: Any, semantic_id: str) -> None:
    alone = service.http.get(f"/item/{quoted(semantic_id)}")
    among_others = service.http.post("/lookup", json={"semantic_ids": ["1-2-3-9", semantic_id]})

    assert_problem(alone, 422, "malformed_semantic_id")
    assert among_others.status_code == 200
    unknown, malformed = among_others.json()["items"]
    assert unknown["error"]["type"] == TYPE + "not_assigned"
    assert malformed["error"]["type"] == TYPE + "malformed_semantic_id"
    assert malformed["semantic_id"] == semantic_id


def test_a_semantic_id_that_is_no_text_fails_alone(service: Any) -> None:
    body = r'{"semantic_ids": ["1-2-3-9", 7, null, "\ud800", {}]}'

    response = service.http.post("/lookup", content=body, headers=JSON)

    assert response.status_code == 200, response.text
    assert [entry["error"]["type"] for entry in response.json()["items"]] == [
        TYPE + "not_assigned",
        *[TYPE + "malformed_semantic_id"] * 4,
    ]
    assert [entry["semantic_id"] for entry in response.json()["items"]] == ["1-2-3-9", None, None, None, None]


def test_too_many_semantic_ids_are_refused(service: Any) -> None:
    response = service.http.post("/lookup", json={"semantic_ids": ["1-2-3-0"] * 65})

    assert_problem(response, 413, "too_many_items")


@pytest.mark.parametrize(
    "path",
    ["", "x" * 257, quoted("é" * 129), "%00", "a%00b", "%ff%fe"],
    ids=["empty", "257 bytes", "258 bytes", "NUL", "inner NUL", "no UTF-8"],
)
def test_a_malformed_item_id_in_a_path_is_refused(service: Any, path: str) -> None:
    for method in ("GET", "DELETE"):
        response = service.http.request(method, f"/assignment/{path}")

        assert response.status_code == 422
        assert response.json()["type"] in {TYPE + "malformed_item_id", TYPE + "malformed_request"}


@pytest.mark.parametrize("path", ["/item/1-2-3-0", "/assignment/a"])
@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("namespace=", "malformed_request"),
        ("namespace=a%20b", "malformed_request"),
        ("namespace=a%0A", "malformed_request"),
        ("namespace=%00", "malformed_request"),
        ("namespace=" + "x" * 65, "malformed_request"),
        ("tokenizer=other", "unknown_tokenizer"),
        ("tokenizer=%FF%00", "unknown_tokenizer"),
    ],
)
def test_a_bad_query_is_one_problem(service: Any, path: str, query: str, slug: str) -> None:
    assert_problem(service.http.get(f"{path}?{query}"), 422, slug)


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("POST", "/tokenize", "tokenizer, namespace, assign, on_change"),
        ("POST", "/lookup", None),
        ("GET", "/item/1-2-3-0", "namespace, tokenizer"),
        ("GET", "/assignment/never", "namespace, tokenizer"),
        ("DELETE", "/assignment/never", "namespace, tokenizer"),
        ("GET", "/prefix/", "limit, cursor, namespace, tokenizer"),
        ("POST", "/next", None),
        ("GET", "/trie", "namespace, tokenizer"),
        ("GET", "/assignment?item_id=never", "namespace, tokenizer, item_id"),
        ("DELETE", "/assignment?item_id=never", "namespace, tokenizer, item_id"),
        ("GET", "/changes?after=0", "after, epoch, limit, wait_s, display, namespace, tokenizer"),
    ],
)
def test_a_misspelt_option_is_told_and_never_means_another_namespace(
    service: Any, method: str, path: str, known: str | None
) -> None:
    bodies: dict[str, Any] = {"/tokenize": {"items": [ITEM]}, "/lookup": {"semantic_ids": ["1-2-3-0"]}}
    url = f"{path}{'&' if '?' in path else '?'}namspace=shop"

    refused = service.http.request(method, url, json=bodies.get(path, {"prefixes": [""]}))

    assert_problem(refused, 422, "malformed_request")
    there_are = f"there are {known}" if known else "there are none"
    assert refused.json()["detail"] == f"no such option in the query: 'namspace'; {there_are}"
    assert "never" not in service.assigned()


@pytest.mark.parametrize("media_type", ["application/x-ndjson", "application/json"])
def test_an_option_given_twice_is_refused(service: Any, namespace: str, media_type: str) -> None:
    refused = service.http.post(
        f"/tokenize?namespace={namespace}&assign=true&namespace=default",
        content=json.dumps(ITEM if media_type.endswith("ndjson") else {"items": [ITEM]}),
        headers={"content-type": media_type},
    )

    assert_problem(refused, 422, "malformed_request")
    assert refused.json()["detail"] == "given more than once in the query: namespace"
    assert "never" not in service.assigned() | service.assigned(namespace)


def test_reading_leaves_no_trace_in_the_registry(service: Any, namespace: str) -> None:
    with redis.Redis.from_url(service.redis_url) as client:
        before = client.dbsize()
        for path in ("/item/1-2-3-0", "/assignment/a"):
            assert service.http.get(path, params={"namespace": namespace}).status_code == 404
        assert (
            service.http.post("/lookup", json={"semantic_ids": ["1-2-3-0"], "namespace": namespace}).status_code == 200
        )
        service.tokenize(ITEM, namespace=namespace, assign=False)
        assert client.dbsize() == before
