"""Routes that read their requests themselves are called directly, and answer as FastAPI would let them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from service.http.direct import DirectRoutes


class Refused(Exception):
    """Of a class that has a handler."""


class AlsoRefused(Refused):
    """Of a class derived from it."""


async def _refused(request: Request, error: Exception) -> Response:
    return Response(f"{request.url.path}: {error}", 418)


@pytest.fixture
def seen() -> list[Any]:
    """The routes of the requests that were answered, as the middleware around sees them."""
    return []


@pytest.fixture
async def http(seen: list[Any]) -> Any:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response((await request.body()).upper())

    @app.get("/refused")
    async def refused(request: Request) -> Response:
        raise AlsoRefused(request.query_params["why"])

    @app.get("/double")
    async def double(request: Request, number: int) -> Response:
        return Response(str(2 * number))

    app.add_middleware(DirectRoutes, routes=app.routes, handlers={Refused: _refused})

    async def around(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(getattr(scope.get("route"), "path", None))

    async with httpx.AsyncClient(transport=httpx.ASGITransport(around), base_url="http://app") as client:
        yield client


async def test_an_endpoint_that_takes_the_request_alone_is_called_directly(http: Any, seen: list[Any]) -> None:
    answer = await http.post("/echo", content=b"kettle")

    assert (answer.status_code, answer.text) == (200, "KETTLE")
    assert seen == ["/echo"]


async def test_what_it_raises_is_answered_by_the_handler_of_its_class(http: Any) -> None:
    answer = await http.get("/refused", params={"why": "too hot"})

    assert (answer.status_code, answer.text) == (418, "/refused: too hot")


async def test_all_other_requests_are_the_frameworks(http: Any) -> None:
    asked = [http.get("/double?number=4"), http.get("/double?number=x"), http.get("/echo"), http.get("/nowhere")]

    assert [(await one).status_code for one in asked] == [200, 422, 405, 404]
