"""Bad input over HTTP gets a clear error, harms no neighbour, writes nothing, and leaves the service well."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis

TYPE = "urn:semid:problem:"
JSON = {"content-type": "application/json"}
DIMENSION = 384
UNIT = [1.0] + [0.0] * (DIMENSION - 1)


class Raw(str):
    """An entry's own JSON, which no serializer would write."""

    __slots__ = ()


def base64_of(numbers: list[float]) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


def embedding_with(number: str) -> Raw:
    return Raw(f'{{"item_id": "bad", "embedding": [{number}{", 0.0" * (DIMENSION - 1)}]}}')


def as_json(entry: object) -> str:
    return entry if isinstance(entry, Raw) else json.dumps(entry)


@pytest.fixture(autouse=True)
def _well_afterwards(service: Any) -> Iterator[None]:
    """No request of this file may end in a 5xx, stop the model, or leave bytes counted as held."""
    yield
    assert service.http.get("/healthz").status_code == 200
    assert service.http.get("/readyz").status_code == 200
    assert service.metric("semid_http_requests_total", status="500") == 0
    assert service.metric("semid_queue_tokens") == 0
    service.until(lambda: service.state.gate._held_bytes == 0, "bytes of bodies are still counted as held")


BAD_ITEMS: dict[str, tuple[object, str]] = {
    "not an object": ("kettle", "invalid_item"),
    "null": (None, "invalid_item"),
    "a list": ([], "invalid_item"),
    "an unknown member": ({"item_id": "bad", "text": "x", "price": 3}, "invalid_item"),
    "an unknown member that is no text": (Raw(r'{"item_id": "bad", "text": "x", "\ud800": 3}'), "invalid_item"),
    "no item id": ({"text": "x"}, "invalid_item_id"),
    "a null item id": ({"item_id": None, "text": "x"}, "invalid_item_id"),
    "an empty item id": ({"item_id": "", "text": "x"}, "invalid_item_id"),
    "an item id of 257 bytes": ({"item_id": "x" * 257, "text": "x"}, "invalid_item_id"),
    "an item id of 257 bytes in 129 characters": ({"item_id": "é" * 128 + "x", "text": "x"}, "invalid_item_id"),
    "an item id that is a number": ({"item_id": 7, "text": "x"}, "invalid_item_id"),
    "an item id that is a list": ({"item_id": ["bad"], "text": "x"}, "invalid_item_id"),
    "an item id with a NUL": ({"item_id": "bad\0", "text": "x"}, "invalid_item_id"),
    "an item id with a lone surrogate": (Raw(r'{"item_id": "bad\ud800", "text": "x"}'), "invalid_item_id"),
    "an item id with raw bytes of a surrogate": (Raw('{"item_id": "bad\udead", "text": "x"}'), "invalid_item_id"),
    "no content": ({"item_id": "bad"}, "invalid_content"),
    "a null content": ({"item_id": "bad", "text": None, "embedding": None}, "invalid_content"),
    "two kinds of content": ({"item_id": "bad", "text": "x", "embedding": UNIT}, "invalid_content"),
    "three kinds of content": (
        {"item_id": "bad", "text": "x", "fields": {"title": "x"}, "embedding": UNIT},
        "invalid_content",
    ),
    "an empty text": ({"item_id": "bad", "text": ""}, "invalid_text"),
    "a blank text": ({"item_id": "bad", "text": " \t\n\u3000"}, "invalid_text"),
    "a text that is a number": ({"item_id": "bad", "text": 5}, "invalid_text"),
    "a very long text": ({"item_id": "bad", "text": "x" * 4097}, "invalid_text"),
    "a very long text in few characters": ({"item_id": "bad", "text": "😀" * 1025}, "invalid_text"),
    "a text with a NUL": ({"item_id": "bad", "text": "a\0b"}, "invalid_text"),
    "a text with a lone surrogate": (Raw(r'{"item_id": "bad", "text": "a\udc00"}'), "invalid_text"),
    "fields that are no object": ({"item_id": "bad", "fields": "x"}, "invalid_text"),
    "fields without content": ({"item_id": "bad", "fields": {"title": ""}}, "invalid_text"),
    "a field that is a number": ({"item_id": "bad", "fields": {"title": 7}}, "invalid_text"),
    "a field with a lone surrogate": (Raw(r'{"item_id": "bad", "fields": {"title": "\ud800"}}'), "invalid_text"),
    "an embedding of a wrong dimension": ({"item_id": "bad", "embedding": UNIT[:-1]}, "invalid_embedding"),
    "an empty embedding": ({"item_id": "bad", "embedding": []}, "invalid_embedding"),
    "a nested embedding": ({"item_id": "bad", "embedding": [UNIT]}, "invalid_embedding"),
    "an embedding with a string": ({"item_id": "bad", "embedding": [*UNIT[:-1], "0"]}, "invalid_embedding"),
    "an embedding with NaN": (embedding_with("NaN"), "invalid_embedding"),
    "an embedding with infinity": (embedding_with("-Infinity"), "invalid_embedding"),
    "an embedding with a number beyond float64": (embedding_with("1e400"), "invalid_embedding"),
    "an embedding with a number beyond float32": (embedding_with("1e39"), "invalid_embedding"),
    "an embedding with an integer of 400 digits": (embedding_with("9" * 400), "invalid_embedding"),
    "an embedding with an integer of 5000 digits": (embedding_with("-" + "9" * 5000), "invalid_embedding"),
    "the zero vector": ({"item_id": "bad", "embedding": [0] * DIMENSION}, "invalid_embedding"),
    "a vector that float32 makes zero": (embedding_with("1e-60"), "invalid_embedding"),
    "base64 of no multiple of 4 bytes": ({"item_id": "bad", "embedding": "AAAA"}, "invalid_embedding"),
    "base64 of a wrong dimension": ({"item_id": "bad", "embedding": base64_of(UNIT[:-1])}, "invalid_embedding"),
    "base64 with NaN": ({"item_id": "bad", "embedding": base64_of([float("nan")] * DIMENSION)}, "invalid_embedding"),
    "no base64": ({"item_id": "bad", "embedding": "###"}, "invalid_embedding"),
    "base64 without its padding": ({"item_id": "bad", "embedding": "AAAAAA"}, "invalid_embedding"),
}


@pytest.mark.parametrize(("entry", "slug"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_a_bad_item_fails_alone(
    service: Any, namespace: str, make_embedding: Callable[[int], list[float]], entry: object, slug: str
) -> None:
    good = {"item_id": "before", "embedding": make_embedding(1)}
    text = {"item_id": "after", "text": "kettle"}
    body = f'{{"namespace": "{namespace}", "items": [{as_json(good)}, {as_json(entry)}, {as_json(text)}]}}'

    response = service.http.post("/tokenize", content=body.encode("utf-8", "surrogatepass"), headers=JSON)

    assert response.status_code == 200, response.text
    before, bad, after = response.json()["items"]
    assert bad["error"]["type"] == TYPE + slug
    assert bad["error"]["title"]
    assert bad["error"]["detail"]
    assert set(bad) == {"item_id", "error"}
    assert (before["created"], after["created"]) == (True, True)
    assert set(service.assigned(namespace)) == {"before", "after"}


@pytest.mark.parametrize(("entry", "slug"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_a_bad_item_fails_alone_in_a_dry_run(service: Any, namespace: str, entry: object, slug: str) -> None:
    good = as_json({"item_id": "good", "embedding": UNIT})
    body = f'{{"namespace": "{namespace}", "assign": false, "items": [{as_json(entry)}, {good}]}}'

    response = service.http.post("/tokenize", content=body.encode("utf-8", "surrogatepass"), headers=JSON)

    assert response.status_code == 200, response.text
    assert response.json()["items"][0]["error"]["type"] == TYPE + slug
    assert "codes" in response.json()["items"][1]
    assert service.assigned(namespace) == {}


def test_an_error_names_the_item_where_its_id_can_be_said(service: Any, namespace: str) -> None:
    named, unnamed = service.tokenize({"item_id": "é", "text": ""}, {"item_id": 7, "text": "x"}, namespace=namespace)

    assert (named["item_id"], unnamed["item_id"]) == ("é", None)


def test_nothing_but_bad_items_is_still_an_answer_for_each(service: Any, namespace: str) -> None:
    entries = service.tokenize({}, 1, {"item_id": "a"}, namespace=namespace)

    assert all("error" in entry for entry in entries)
    assert service.assigned(namespace) == {}


def test_the_same_item_twice_with_equal_content_is_one_assignment(service: Any, namespace: str) -> None:
    item = {"item_id": "twice", "text": "kettle"}

    first, second = service.tokenize(item, {"item_id": "twice", "fields": {"title": "kettle"}}, namespace=namespace)

    assert first["semantic_id"] == second["semantic_id"]
    assert [first["created"], second["created"]] == [True, False]
    assert len(service.assigned(namespace)) == 1


def test_the_same_item_twice_with_different_contents_fails_at_each_place(service: Any, namespace: str) -> None:
    entries = service.tokenize(
        {"item_id": "twice", "text": "kettle"},
        {"item_id": "good", "text": "kettle"},
        {"item_id": "twice", "embedding": UNIT},
        {"item_id": "twice", "text": "kettle"},
        namespace=namespace,
    )

    slugs = [entry.get("error", {}).get("type") for entry in entries]
    assert slugs == [
        TYPE + "conflicting_duplicate",
        None,
        TYPE + "conflicting_duplicate",
        TYPE + "conflicting_duplicate",
    ]
    assert set(service.assigned(namespace)) == {"good"}


def test_a_bad_item_does_not_spoil_a_good_one_of_the_same_id(service: Any, namespace: str) -> None:
    good, bad = service.tokenize({"item_id": "a", "text": "kettle"}, {"item_id": "a", "text": ""}, namespace=namespace)

    assert good["created"]
    assert bad["error"]["type"] == TYPE + "invalid_text"


ITEM = {"item_id": "never", "text": "kettle"}

BAD_BODIES: dict[str, tuple[str | bytes, int, str]] = {
    "a byte order mark": (b'\xef\xbb\xbf{"items": [{"item_id": "never", "text": "x"}]}', 400, "not_json"),
    "nothing": (b"", 400, "not_json"),
    "blanks": (b" \n ", 400, "not_json"),
    "cut off": (b'{"items": [{"item_id": "never", "text": "x"}', 400, "not_json"),
    "something after it": (b'{"items": [{"item_id": "never", "text": "x"}]} x', 400, "not_json"),
    "single quotes": (b"{'items': []}", 400, "not_json"),
    "no UTF-8": (b'{"items": [{"item_id": "never", "text": "caf\xe9"}]}', 400, "not_json"),
    "UTF-16": ('{"items": [{"item_id": "never", "text": "x"}]}'.encode("utf-16"), 400, "not_json"),
    "compressed": (gzip.compress(b'{"items": [{"item_id": "never", "text": "x"}]}'), 400, "not_json"),
    "a bomb of brackets": (b"[" * 200_000, 400, "not_json"),
    "a bomb of objects": (b'{"a":' * 50_000, 400, "not_json"),
    "a bomb inside an item": (
        b'{"items": [{"item_id": "never", "text": ' + b"[" * 5_000 + b"]" * 5_000 + b"}]}",
        400,
        "not_json",
    ),
    "NaN": (b"NaN", 422, "malformed_request"),
    "a number of 5000 digits": (b"9" * 5000, 422, "malformed_request"),
    "null": (b"null", 422, "malformed_request"),
    "a string": (b'"items"', 422, "malformed_request"),
    "a list": (json.dumps([ITEM]).encode(), 422, "malformed_request"),
    "no items": (b"{}", 422, "malformed_request"),
    "an empty list": (b'{"items": []}', 422, "malformed_request"),
    "items that are no list": (b'{"items": {"item_id": "never", "text": "x"}}', 422, "malformed_request"),
    "null items": (b'{"items": null}', 422, "malformed_request"),
    "too many items": (
        json.dumps({"items": [{"item_id": f"{i}", "text": "x"} for i in range(65)]}),
        413,
        "too_many_items",
    ),
}

BAD_MEMBERS: dict[str, tuple[str, str, str]] = {
    "an unknown member": ("price", "3", "malformed_request"),
    "a misspelt namespace": ("namspace", '"shop"', "malformed_request"),
    "an unknown member that is no text": (r"\ud800", "3", "malformed_request"),
    "a namespace that is a number": ("namespace", "7", "malformed_request"),
    "an empty namespace": ("namespace", '""', "malformed_request"),
    "a namespace of 65 characters": ("namespace", '"' + "x" * 65 + '"', "malformed_request"),
    "a namespace with a colon": ("namespace", '"a:b"', "malformed_request"),
    "a namespace with braces": ("namespace", '"{a}"', "malformed_request"),
    "a namespace with a line end": ("namespace", r'"a\n"', "malformed_request"),
    "a namespace with a lone surrogate": ("namespace", r'"\ud800"', "malformed_request"),
    "a null namespace": ("namespace", "null", "malformed_request"),
    "an unknown tokenizer": ("tokenizer", '"other"', "unknown_tokenizer"),
    "an empty tokenizer": ("tokenizer", '""', "unknown_tokenizer"),
    "a tokenizer of another fingerprint": ("tokenizer", '"small@0123456789abcdef"', "unknown_tokenizer"),
    "a tokenizer that is a number": ("tokenizer", "7", "malformed_request"),
    "a tokenizer with a lone surrogate": ("tokenizer", r'"\ud800"', "unknown_tokenizer"),
}


def assert_problem(response: Any, status: int, slug: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == TYPE + slug
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert len(response.content) < 2000
    assert "Traceback" not in response.text


@pytest.mark.parametrize("route", ["/tokenize", "/lookup"])
@pytest.mark.parametrize(("body", "status", "slug"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_bad_body_is_one_problem(service: Any, route: str, body: str | bytes, status: int, slug: str) -> None:
    before = set(service.assigned())
    if route == "/lookup":
        body = (body if isinstance(body, bytes) else body.encode()).replace(b'"items"', b'"semantic_ids"')

    response = service.http.post(route, content=body, headers=JSON)

    assert_problem(response, status, slug)
    assert set(service.assigned()) == before


@pytest.mark.parametrize("route", ["/tokenize", "/lookup"])
@pytest.mark.parametrize(("member", "value", "slug"), BAD_MEMBERS.values(), ids=BAD_MEMBERS.keys())
def test_a_bad_member_is_one_problem(service: Any, route: str, member: str, value: str, slug: str) -> None:
    asked = json.dumps({"/tokenize": [ITEM], "/lookup": ["1-2-3-0"]}[route])
    name = {"/tokenize": "items", "/lookup": "semantic_ids"}[route]

    response = service.http.post(route, content=f'{{"{name}": {asked}, "{member}": {value}}}', headers=JSON)

    assert_problem(response, 422, slug)
    assert "never" not in service.assigned()


@pytest.mark.parametrize("members", [{"assign": "yes"}, {"assign": 1}, {"assign": None}, {"on_change": "rename"}])
def test_a_bad_option_is_one_problem(service: Any, members: dict[str, object]) -> None:
    assert_problem(service.post(ITEM, **members), 422, "malformed_request")


def test_an_unknown_member_of_any_length_is_told_in_short(service: Any) -> None:
    response = service.post(ITEM, **{"x" * 100_000: 1})

    assert_problem(response, 422, "malformed_request")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/json-seq", "x"])
def test_a_body_that_does_not_say_json_is_refused(service: Any, media_type: str) -> None:
    body = json.dumps({"items": [ITEM]})

    response = service.http.post("/tokenize", content=body, headers={"content-type": media_type})

    assert_problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", None])
def test_a_body_that_says_json_or_nothing_is_read(service: Any, namespace: str, media_type: str | None) -> None:
    body = json.dumps({"items": [ITEM], "namespace": namespace})

    response = service.http.post("/tokenize", content=body, headers={"content-type": media_type} if media_type else {})

    assert response.status_code == 200


@pytest.mark.parametrize("route", ["/tokenize", "/lookup"])
def test_a_body_beyond_the_limit_is_refused_by_its_length(service: Any, route: str) -> None:
    answer = service.raw(
        f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {512 * 1024 + 1}\r\nconnection: close\r\n\r\n".encode()
    )

    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert b"body_too_large" in answer


@pytest.mark.parametrize("route", ["/tokenize", "/lookup"])
def test_a_body_of_chunks_beyond_the_limit_is_refused(service: Any, route: str) -> None:
    head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

    answer = service.raw(head.encode(), *[chunk] * 9, timeout_s=2)

    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert b"body_too_large" in answer


def test_a_body_at_the_limit_is_taken(service: Any, namespace: str) -> None:
    body = json.dumps({"items": [ITEM], "namespace": namespace}).ljust(512 * 1024)

    assert service.http.post("/tokenize", content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}{}{}",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: \xb2\r\n\r\n{}",
    ],
    ids=["TLS", "negative length", "two lengths", "a length of 23 digits", "a superscript length"],
)
def test_what_is_no_http_is_refused(service: Any, request_bytes: bytes) -> None:
    answer = service.raw(request_bytes, timeout_s=1)

    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 415")), answer[:200]


def test_a_caller_who_leaves_in_the_middle_of_a_body_harms_nobody(service: Any) -> None:
    service.raw(
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{",
        timeout_s=0.1,
    )

    service.until(lambda: service.metric("semid_http_requests_total", status="499") > 0, "its leave was not seen")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/tokenize", 405),
        ("POST", "/item/1-2-3-0", 405),
        ("GET", "/nothing", 404),
        ("GET", "/item/1-2/3-0", 404),
    ],
)
def test_a_wrong_method_or_path_is_a_problem_too(service: Any, method: str, path: str, status: int) -> None:
    response = service.http.request(method, path)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status


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
        ("GET", "/changes?after=0", "after, epoch, limit, wait_s, namespace, tokenizer"),
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
