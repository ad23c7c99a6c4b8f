"""The door over HTTP: which requests a key lets in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from service.access.door import scope_of
from service.access.keys import KeyFile, Scope
from service.app import ROUTERS
from tests.conftest import ServiceThread

PAGE = "https://shop.example"


class Guarded:
    """A running service, and a key of each scope."""

    def __init__(self, service: ServiceThread, path: Path, secrets: dict[Scope, str]) -> None:
        self.service = service
        self.path = path
        self.secrets = secrets

    def status(self, method: str, path: str, secret: str | None, **body: Any) -> int:
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        return self.service.http.request(method, path, headers=headers, **body).status_code


@pytest.fixture(scope="module")
def guarded(start_service: Callable[..., ServiceThread]) -> Iterator[Guarded]:
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    file, secrets = KeyFile(), {}
    for scope in Scope:
        file, secrets[scope] = file.with_new(f"of-{scope}", scope)
    file.write(directory / "keys.json")
    running = start_service(data_dir=directory, keys_file=directory / "keys.json", cors_origins=PAGE)
    yield Guarded(running, directory / "keys.json", secrets)
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


ITEMS = {"items": [{"item_id": "a", "text": "x"}]}
CALLS = [
    ("GET", "/tokenizers", {}, Scope.READ),
    ("GET", "/metrics", {}, Scope.READ),
    ("GET", "/prefix/", {}, Scope.READ),
    ("POST", "/lookup", {"json": {"semantic_ids": ["0-0-0-0"]}}, Scope.READ),
    ("POST", "/next", {"json": {"prefixes": [""]}}, Scope.READ),
    ("POST", "/tokenize", {"json": ITEMS}, Scope.TOKENIZE),
    ("DELETE", "/assignment/none", {}, Scope.TOKENIZE),
]


@pytest.mark.parametrize(("method", "path", "body", "needed"), CALLS)
def test_a_request_needs_a_key_of_its_scope(
    guarded: Guarded, method: str, path: str, body: dict[str, Any], needed: Scope
) -> None:
    assert guarded.status(method, path, None, **body) == 401
    assert guarded.status(method, path, "semid_nobody", **body) == 401
    for scope, secret in guarded.secrets.items():
        status = guarded.status(method, path, secret, **body)
        assert status in ({200, 404} if scope.includes(needed) else {403}), scope


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


@pytest.mark.parametrize(
    "path",
    ["//tokenizers", "/./tokenizers", "/docs/../tokenizers", "/explorer/../tokenizers", "/explorer/%2e%2e/metrics"],
)
def test_no_trick_with_the_path_leads_around_the_door(guarded: Guarded, path: str) -> None:
    answer = guarded.service.raw(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())

    assert answer.split(b" ", 2)[1] in {b"401", b"404"}
    assert b"fingerprint" not in answer
    assert b"semid_" not in answer


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
