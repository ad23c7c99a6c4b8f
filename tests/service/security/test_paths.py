"""No trick with a path leads to a file that is none of the page's, or around the door."""

from __future__ import annotations

from typing import Any

import pytest

from service.http.pages import assets
from tests.service.http.refusals import TYPE
from tests.service.security.guarded import Guarded

UP = [
    "..",
    "%2e%2e",
    "%2E.",
    "..%2f..",
    "..%5c..",
    "%252e%252e",
    "%c0%ae%c0%ae",
    "....//",
    "/",
    "%2f",
    "%2fetc%2fpasswd",
]
FILES = {
    *(f"{below}/{up}/{file}" for below in ("/explorer", "/static-offline-docs") for up in UP for file in ("state.py",)),
    *("/explorer/", "/explorer/..", "/explorer/../state.py", "/explorer/..%2fstate.py", "/explorer/..%5cstate.py"),
    *(
        "/explorer/main.js%00",
        "/explorer/main.js%00.html",
        "/explorer/%00",
        "/explorer//etc/passwd",
        "/explorer/main.js/x",
    ),
    *("/explorer/main.js\\..\\..\\state.py", "/explorer/main.js;x", "/explorer/MAIN.JS", "/explorer/.main.js.swp"),
    *(
        "/explorer/__pycache__",
        "/explorer/%s" * 20,
        "/explorer/" + "a" * 30_000,
        "/explorer/" + "../" * 9_000 + "etc/passwd",
    ),
    *("/static-offline-docs/../state.py", "/static-offline-docs/%00", "/static-offline-docs//etc/passwd"),
    *("/static-offline-docs/" + "a" * 30_000, "/static-offline-docs/" + "%2e%2e/" * 2_000 + "etc/passwd"),
    *(
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/docs/../state.py",
        "/favicon.ico/../state.py",
    ),
}
AROUND = {
    *("//tokenizers", "/./tokenizers", "/docs/../tokenizers", "/explorer/../tokenizers", "/explorer/%2e%2e/metrics"),
    *("/explorer/..%2ftokenizers", "/static-offline-docs/../tokenizers", "/static-offline-docs/..%2fmetrics"),
    *("/healthz/../tokenizers", "/healthz%2f..%2ftokenizers", "/healthz%00/../tokenizers", "/healthz;/../tokenizers"),
    *(
        "/tokenizers/",
        "/tokenizers%00",
        "/tokenizers%2f",
        "/tokenizers?/healthz",
        "/tokenizers%3f/healthz",
        "/Tokenizers",
    ),
    *("/%74okenizers", "/%61dmin/tokenizers", "/admin%2ftokenizers", "//admin/tokenizers", "/admin//tokenizers"),
    *("/metrics%20", "/metrics%0a", "/metrics%0d%0ax:%20y", "/prefix//", "/explorer/main.js/../../prefix/"),
    *("http://x/tokenizers", "http://x/healthz/../tokenizers", "/openapi.json/../tokenizers", "*"),
}


def asked(service: Any, method: str, path: str) -> tuple[int, bytes]:
    """What is answered to a path as it stands, which a client would put straight."""
    answer = service.raw(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode("latin-1"))
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path[:60])
def test_no_path_leads_out_of_the_page(service: Any, path: str) -> None:
    status, answer = asked(service, "GET", path)

    assert status in {400, 404}
    assert b"import" not in answer
    assert b"root:" not in answer
    assert service.metric("semid_http_requests_total", status="500") == 0


@pytest.mark.parametrize("path", sorted(AROUND))
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_no_trick_with_the_path_leads_around_the_door(guarded: Guarded, method: str, path: str) -> None:
    status, answer = asked(guarded.service, method, path)

    assert status in {400, 401, 404, 405}
    assert b"fingerprint" not in answer
    assert b"semid_" not in answer
    assert b"\r\nx: y" not in answer


def test_what_can_be_asked_for_are_the_pages_files_by_their_names(service: Any) -> None:
    assert asked(service, "GET", "/explorer/main%2Ejs")[0] == 200  # the same name, quoted
    assert {name.rpartition(".")[2] for name in assets()} <= {"html", "css", "js", "svg"}


@pytest.mark.parametrize("path", ["/item/", "/assignment/", "/prefix/"])
@pytest.mark.parametrize(
    "trick", ["%00", "..%00", "%ff", "%0d%0ax:%20y", "a" * 30_000, "%e2%80%ae"], ids=lambda t: t[:12]
)
def test_a_trick_in_place_of_an_id_is_one_problem(service: Any, path: str, trick: str) -> None:
    status, answer = asked(service, "GET", path + trick)

    assert status in {404, 422}
    assert TYPE.encode() in answer
    assert b"\r\nx: y" not in answer
    assert len(answer) < 2500
