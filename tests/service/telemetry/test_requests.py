"""Each request has an id, and says where its time went."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from service.access.door import Door
from service.access.keys import KeyFile, Keys, Scope
from service.app import create_app
from service.errors import ServiceError
from service.metrics import Metrics
from service.settings import Settings
from service.telemetry.requests import RequestTelemetry


@pytest.mark.parametrize("said", ["a", "7d2a-4711", "A" * 128, "trace:00-4bf92f/x=1@eu+2_b."])
def test_the_id_that_a_caller_gives_comes_back(service: Any, said: str) -> None:
    assert service.http.get("/healthz", headers={"X-Request-ID": said}).headers["x-request-id"] == said


@pytest.mark.parametrize("said", ["", "A" * 129, "a b", 'a"b', "a;b", "a\tb", "ä".encode(), "<script>"])
def test_an_id_that_no_log_should_hold_is_replaced(service: Any, said: str | bytes) -> None:
    made = service.http.get("/healthz", headers={"X-Request-ID": said}).headers.get_list("x-request-id")

    assert len(made) == 1
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", made[0])


def test_ids_that_are_made_differ(service: Any) -> None:
    assert len({service.http.get("/healthz").headers["x-request-id"] for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/tokenize", b"{"),  # a route that reads its request itself
        ("GET", "/item/nonsense", None),  # one that the framework reads
        ("GET", "/nothing-here", None),
        ("PUT", "/tokenize", None),
        ("POST", "/tokenize?nonsense=1", b"{}"),
    ],
)
def test_a_problem_tells_the_id_of_its_request(service: Any, method: str, path: str, body: bytes | None) -> None:
    headers = {"X-Request-ID": "one-of-mine", "content-type": "application/json"}

    answer = service.http.request(method, path, content=body, headers=headers)

    assert answer.status_code >= 400
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "one-of-mine"


async def test_an_unforeseen_error_has_the_id_as_well(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))  # never started: it has no state to answer from
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://semid") as http:
        answer = await http.get("/tokenizers", headers={"X-Request-ID": "one-of-mine"})

    assert answer.status_code == 500
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "one-of-mine"


def durations(answer: httpx.Response) -> dict[str, float]:
    found = re.findall(r"(\w+);dur=([\d.]+)", answer.headers.get("server-timing", ""))
    return {name: float(milliseconds) for name, milliseconds in found}


def test_an_answer_tells_how_long_it_waited_for_queue_model_and_registry(service: Any, namespace: str) -> None:
    item = {"item_id": "kettle", "text": "a kettle of steel"}

    created = service.post(item, namespace=namespace)
    known = service.post(item, namespace=namespace)
    many = service.post(*({"item_id": f"i{n}", "text": f"lamp {n}"} for n in range(40)), namespace=namespace)

    assert list(durations(created)) == ["registry", "queue", "model"]
    assert list(durations(known)) == ["registry"]  # without the model
    assert set(durations(many)) == {"registry", "queue", "model"}
    for answer in (created, known, many):
        assert min(durations(answer).values()) >= 0
        assert sum(durations(answer).values()) <= 1000 * answer.elapsed.total_seconds() + 0.02
    assert durations(created)["model"] > 0.1  # a forward pass is no less


def test_a_method_that_nobody_knows_is_no_label(service: Any) -> None:
    for number in range(3):
        assert service.http.request(f"BREW{number}", "/tokenize").status_code in {
            400,
            405,
        }  # by the parser, or the routes

    assert "BREW" not in service.http.get("/metrics").text


@pytest.fixture
def answered(service: Any, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., list[logging.LogRecord]]]:
    """The access lines of requests to the running app, once it tells of them."""
    middleware = service.app.middleware_stack
    while not isinstance(middleware, RequestTelemetry):
        middleware = middleware.app

    def ask(*, paths: bool, **request: Any) -> list[logging.LogRecord]:
        caplog.clear()
        middleware._access_log, middleware._log_paths = True, paths
        with caplog.at_level(logging.INFO, "service.access"):
            service.http.request(**request)
            lines = lambda: [line for line in caplog.records if line.name == "service.access"]  # noqa: E731
            service.until(lines, "no line in the log")
            return lines()

    yield ask
    middleware._access_log = middleware._log_paths = False


def test_an_access_line_tells_the_route_and_the_durations(answered: Callable[..., list[logging.LogRecord]]) -> None:
    body = {"items": [{"item_id": "secret-id", "text": "a secret text"}]}

    (line,) = answered(paths=False, method="POST", url="/tokenize", json=body)

    assert line.levelno == logging.INFO
    said: dict[str, Any] = line.__dict__["members"]
    assert (said["method"], said["route"], said["status"], said["client"]) == ("POST", "/tokenize", 200, "127.0.0.1")
    assert said["duration_ms"] >= said["queue_ms"] + said["model_ms"] + said["registry_ms"] > 0
    assert line.getMessage().startswith("method=POST route=/tokenize status=200 duration_ms=")
    assert "secret" not in line.getMessage() + str(said)


def test_item_ids_stand_in_access_lines_only_when_asked_for(answered: Callable[..., list[logging.LogRecord]]) -> None:
    request = {"method": "GET", "url": "/assignment/secret%0Aid"}

    (without,) = answered(paths=False, **request)
    (with_path,) = answered(paths=True, **request)

    assert "secret" not in without.getMessage()
    assert "path=/assignment/secret%0Aid" in with_path.getMessage()


async def test_an_access_line_names_the_key_and_never_has_its_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, reader = KeyFile().with_new("of-the-recommender", Scope.READ)
    file.write(tmp_path / "keys.json")
    keys = Keys(tmp_path / "keys.json")

    async def refuse(_: Request, error: ServiceError) -> Response:
        return Response(error.detail, error.status)

    door = Door(Response("let in"), lambda: keys, refuse)
    transport = httpx.ASGITransport(RequestTelemetry(door, Metrics(), access_log=True))
    async with httpx.AsyncClient(transport=transport, base_url="http://semid") as http:
        with caplog.at_level(logging.INFO, "service.access"):
            for method, path, secret in (
                ("GET", "/stats", reader),
                ("POST", "/tokenize", reader),  # for which its scope is too little
                ("GET", "/stats", reader[:-1]),
            ):
                await http.request(method, path, headers={"authorization": f"Bearer {secret}"})

    lines = [line.__dict__["members"] for line in caplog.records]
    assert [(line["status"], line.get("key")) for line in lines] == [
        (200, "of-the-recommender"),
        (403, "of-the-recommender"),
        (401, None),
    ]
    assert reader[:-1] not in caplog.text
