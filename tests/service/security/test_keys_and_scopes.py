"""No key, the wrong key, the wrong scope: which requests the door lets in."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute

from service.access.door import scope_of
from service.access.keys import KeyFile, Scope
from service.app import ROUTERS
from tests.conftest import ServiceThread
from tests.service.security.guarded import PAGE, Guarded

ITEMS = {"items": [{"item_id": "a", "text": "x"}]}
CALLS = [
    ("GET", "/tokenizers", {}, Scope.READ),
    ("GET", "/metrics", {}, Scope.READ),
    ("HEAD", "/trie", {}, Scope.READ),
    ("GET", "/changes?after=0", {}, Scope.READ),
    ("POST", "/explain", {"json": {"item": {"text": "x"}}}, Scope.READ),
    ("GET", "/prefix/", {}, Scope.READ),
    ("POST", "/lookup", {"json": {"semantic_ids": ["0-0-0-0"]}}, Scope.READ),
    ("POST", "/assignments", {"json": {"item_ids": ["none"]}}, Scope.READ),
    ("POST", "/retire", {"json": {"item_ids": ["none"]}}, Scope.TOKENIZE),
    ("POST", "/next", {"json": {"prefixes": [""]}}, Scope.READ),
    ("POST", "/tokenize", {"json": ITEMS}, Scope.TOKENIZE),
    ("DELETE", "/assignment/none", {}, Scope.TOKENIZE),
    ("POST", "/admin/tokenizers", {"json": {"checkpoint": "none"}}, Scope.ADMIN),
    ("POST", "/admin/tokenizers/none/default", {}, Scope.ADMIN),
    ("DELETE", "/admin/tokenizers/none", {}, Scope.ADMIN),
    ("GET", "/admin/anything", {}, Scope.ADMIN),
]


@pytest.mark.parametrize(("method", "path", "body", "needed"), CALLS)
def test_a_request_needs_a_key_of_its_scope(
    guarded: Guarded, method: str, path: str, body: dict[str, Any], needed: Scope
) -> None:
    assert guarded.status(method, path, None, **body) == 401
    assert guarded.status(method, path, "semid_nobody", **body) == 401
    for scope, secret in guarded.secrets.items():
        status = guarded.status(method, path, secret, **body)
        assert status in ({200, 404, 422} if scope.includes(needed) else {403}), scope


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Basic {key}"},
        {"authorization": "{key}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer {key}x"},
        {"authorization": "Bearer\xa0{key}"},
        {"x-api-key": "{key}"},
        {"cookie": "authorization=Bearer {key}"},
    ],
)
def test_a_key_that_is_brought_in_another_way_opens_nothing(guarded: Guarded, headers: dict[str, str]) -> None:
    key = guarded.secrets[Scope.ADMIN]
    brought = {name: value.format(key=key).encode("latin-1") for name, value in headers.items()}

    assert guarded.service.http.get("/tokenizers", headers=brought).status_code == 401
    assert guarded.service.http.get(f"/tokenizers?authorization=Bearer%20{key}").status_code == 401


def test_of_two_keys_the_first_is_taken_and_a_second_adds_nothing(guarded: Guarded) -> None:
    reading, all_of = (guarded.secrets[scope].encode() for scope in (Scope.READ, Scope.ADMIN))
    twice = [(b"authorization", b"Bearer " + reading), (b"authorization", b"Bearer " + all_of)]

    assert guarded.service.http.post("/tokenize", json=ITEMS, headers=twice).status_code == 403


def test_a_wish_to_speak_another_protocol_opens_nothing(guarded: Guarded) -> None:
    for protocol in (b"websocket", b"h2c"):
        wish = b"connection: upgrade, close\r\nupgrade: " + protocol + b"\r\nsec-websocket-version: 13\r\n"
        wish += b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
        answer = guarded.service.raw(b"GET /tokenizers HTTP/1.1\r\nhost: x\r\n" + wish + b"\r\n", timeout_s=10)

        assert answer.startswith(b"HTTP/1.1 401 "), protocol


def test_health_and_the_page_need_none(guarded: Guarded) -> None:
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/explorer/main.js"):
        assert guarded.status("GET", path, None) == 200, path


def test_a_refusal_says_what_is_needed_and_not_which_keys_there_are(guarded: Guarded) -> None:
    without = guarded.service.http.get("/tokenizers")
    wrong = guarded.service.http.post(
        "/tokenize", json=ITEMS, headers={"authorization": f"Bearer {guarded.secrets[Scope.READ]}"}
    )

    assert without.headers["content-type"] == "application/problem+json"
    assert without.headers["www-authenticate"].startswith("Bearer")
    assert without.json()["type"] == "urn:semid:problem:unauthorized"
    assert wrong.json()["type"] == "urn:semid:problem:forbidden"
    assert "'tokenize'" in wrong.json()["detail"]
    assert "of-admin" not in without.text + wrong.text


def test_nothing_of_a_body_is_read_without_a_key(guarded: Guarded) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 1000000\r\n\r\n"

    assert guarded.service.raw(head, timeout_s=10.0).startswith(b"HTTP/1.1 401 ")


def test_every_route_asks_for_a_key_unless_it_says_nothing_of_a_catalogue() -> None:
    routes = [route for part in ROUTERS for route in part.routes if isinstance(route, APIRoute)]
    opened = {route.path for route in routes for method in route.methods if scope_of(method, route.path) is None}
    writing = {
        (method, route.path)
        for route in routes
        for method in route.methods
        if scope_of(method, route.path) is Scope.TOKENIZE
    }

    assert opened == {"/", "/explorer/{name}", "/healthz", "/readyz"}
    assert writing == {
        ("POST", "/tokenize"),
        ("POST", "/retire"),
        ("DELETE", "/assignment"),
        ("DELETE", "/assignment/{item_id:any_text}"),
    }


def test_the_api_says_which_scope_a_call_needs(guarded: Guarded) -> None:
    document = guarded.service.http.get("/openapi.json").json()

    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/tokenize"]["post"]["x-semid-scope"] == "tokenize"
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_a_page_of_an_origin_that_is_named_may_ask_and_no_other(guarded: Guarded, service: ServiceThread) -> None:
    def preflight(of: ServiceThread, origin: str) -> str | None:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        return of.http.options("/tokenize", headers=headers).headers.get("access-control-allow-origin")

    assert preflight(guarded.service, PAGE) == PAGE
    assert preflight(guarded.service, "https://elsewhere.example") is None
    assert preflight(service, PAGE) is None  # off unless set
    refused = guarded.service.http.get("/tokenizers", headers={"origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE  # so that the page can tell why


def test_a_key_that_is_removed_is_refused_within_a_second(guarded: Guarded) -> None:
    file, secret = KeyFile.read(guarded.path).with_new("passing", Scope.READ)
    file.write(guarded.path)
    guarded.service.until(lambda: guarded.status("GET", "/tokenizers", secret) == 200, "it is not taken", 5)

    file.without("passing").write(guarded.path)

    guarded.service.until(lambda: guarded.status("GET", "/tokenizers", secret) == 401, "it is still taken", 5)
