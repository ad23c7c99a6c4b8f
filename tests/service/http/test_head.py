"""HEAD is GET without its body, for load balancers; and what machines that watch a service may say beside."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.http.refusals import assert_problem


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *(("/", 200), ("/healthz", 200), ("/readyz", 200), ("/tokenizers", 200), ("/explorer/main.js", 200)),
        *(("/healthz?tokenizer=other", 422), ("/item/1-2-3-0", 404), ("/nothing", 404)),
    ],
)
def test_head_is_answered_as_get_is_without_a_body(service: Any, path: str, status: int) -> None:
    request = f"HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    got = service.http.get(path)

    head, _, body = service.raw(request).partition(b"\r\n\r\n")

    assert (int(head.split(b" ")[1]), got.status_code) == (status, status)
    assert body == b""
    told = dict(line.split(b": ", 1) for line in head.splitlines()[1:])
    assert told[b"content-type"].decode() == got.headers["content-type"]
    if status == 200:
        assert int(told[b"content-length"]) == len(got.content)


def test_a_head_is_counted_by_its_route(service: Any) -> None:
    before = service.metric("semid_http_requests_total", method="HEAD", route="/readyz")

    service.http.head("/readyz")

    assert service.metric("semid_http_requests_total", method="HEAD", route="/readyz") == before + 1


def test_what_cannot_be_read_has_no_head_and_what_can_says_so(service: Any) -> None:
    assert service.http.head("/tokenize").headers["allow"] == "POST"
    assert service.http.put("/readyz").headers["allow"] == "GET, HEAD"
    assert service.http.put("/assignment/a").headers["allow"] == "DELETE, GET, HEAD"


def test_options_that_are_none_are_told_but_to_probes_and_scrapers(service: Any) -> None:
    assert_problem(service.http.get("/tokenizers?namespace=shop"), 422, "malformed_request")
    for path in ("/healthz", "/readyz", "/metrics"):
        assert service.http.get(f"{path}?probe=lb-7").status_code == 200
