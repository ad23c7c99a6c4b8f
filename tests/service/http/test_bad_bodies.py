"""A bad body is one problem, harms nobody and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from tests.service.http.refusals import assert_problem

pytestmark = pytest.mark.usefixtures("well_afterwards")

JSON = {"content-type": "application/json"}
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


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
def test_a_body_that_says_it_is_compressed_is_refused(service: Any, namespace: str, media_type: str) -> None:
    headers = {"content-type": media_type, "content-encoding": "gzip"}
    body = gzip.compress(json.dumps({"items": [ITEM]}).encode())

    response = service.http.post("/tokenize", content=body, headers=headers)

    assert_problem(response, 415, "unsupported_media_type")
    assert "'gzip'" in response.json()["detail"]


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", None])
def test_a_body_that_says_json_or_nothing_is_read(service: Any, namespace: str, media_type: str | None) -> None:
    body = json.dumps({"items": [ITEM], "namespace": namespace})

    response = service.http.post("/tokenize", content=body, headers={"content-type": media_type} if media_type else {})

    assert response.status_code == 200


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
