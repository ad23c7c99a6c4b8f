"""What every route shares: parameters, bodies, answers, and how they are documented."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast

import orjson
from fastapi import Path, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.convertors import PathConvertor, register_url_convertor

from service.bodies import BYTES_ON_THE_LOOP, BodyGate, parse_json
from service.bulk import arrow, ndjson
from service.bulk.streams import BulkFormat, StreamedAnswer
from service.bulk.terms import StreamTerms
from service.content import MAX_ITEM_ID_BYTES
from service.errors import PROBLEM_JSON, MalformedRequest
from service.http.callers import require_json, require_plain, unless_disconnected
from service.quoting import listed
from service.schemas import ITEM_SCHEMA, Namespace, TokenizerName, describe

R = TypeVar("R", bound=BaseModel)
G = TypeVar("G")

ItemIdPath = Annotated[str, Path(description="The catalogue's own key.", max_length=MAX_ITEM_ID_BYTES)]
NamespaceQuery = Annotated[Namespace, Query()]
TokenizerQuery = Annotated[TokenizerName, Query()]

_LINES_EXAMPLE = [
    {"item_id": "kettle-1", "text": "Cordless electric kettle, stainless steel, 1.7 l"},
    {"item_id": "lamp-1", "fields": {"title": "Desk lamp", "categories": ["Home", "Lighting"]}},
]
_BINARY = {"type": "string", "format": "binary"}
_ARROW_ITEMS = "Columns item_id, and text or embedding (a fixed-size list of float32), and display or not."
_ARROW_ANSWERS = f"A row an item, in order; columns {', '.join(arrow.answer_schema(1, {}).names)}."
_ENTRY = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("TokenizedItem", "FailedItem")]}
_TITLES = {
    400: "The body is not JSON",
    403: "The caller may not do that",
    404: "Nothing is assigned there",
    408: "The body did not arrive in time",
    409: "It does not go with what is loaded",
    413: "The body is too large",
    415: "The content type is not supported",
    422: "The request does not fit its schema",
    429: "The service is at its limit",
    503: "The model or the registry is not available",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}


class AnyText(PathConvertor):
    """All the rest of a path. The convertor `path` stops at a line end: it would find the item `a` for `a%0A`."""

    regex = "(?s:.*)"


register_url_convertor("any_text", AnyText())


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented problem answers, by status."""
    return {
        status: {
            "description": _TITLES[status],
            "content": _problem("Problem"),
            **({"headers": _RETRY_AFTER} if status in {429, 503} else {}),
        }
        for status in statuses
    }


def gone(description: str, schema: str) -> dict[int | str, dict[str, Any]]:
    """A documented 410, whose problem has members of its own."""
    return {410: {"description": description, "content": _problem(schema)}}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The documented body of a route that reads its bytes itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def query_of(model: type[BaseModel]) -> dict[str, Any]:
    """The documented query of a route that reads it itself, see `queried`."""
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.get("description", "")}
        for name, schema in model.model_json_schema()["properties"].items()
    ]
    return {"parameters": parameters}


def queried(request: Request, model: type[R]) -> R:
    """What the query says of these members. Most requests have none: FastAPI would look for each of them every time.

    Raises:
        MalformedRequest: It does not fit the model, has an option that is none of its members, or one twice.
    """
    if not request.scope["query_string"]:
        return cast("R", _unsaid(model))
    require_options(request, model.model_fields)
    return _validated(model, dict(request.query_params), strict=False)


@cache
def _unsaid(model: type[BaseModel]) -> BaseModel:
    """What a query that says nothing says."""
    return model()


def require_options(request: Request, known: Iterable[str]) -> None:
    """Refuse a query that says anything else, or one thing twice: `?namspace=shop` would be about `default`.

    Raises:
        MalformedRequest: It does; the message has the options that there are.
    """
    given = Counter(name for name, _ in request.query_params.multi_items())
    known = list(known)
    if unknown := [name for name in given if name not in known]:
        there_are = f"there are {', '.join(known)}" if known else "there are none"
        msg = f"no such option in the query: {listed(unknown)}; {there_are}"
        raise MalformedRequest(msg)
    if repeated := [name for name, times in given.items() if times > 1]:
        msg = f"given more than once in the query: {', '.join(repeated)}"
        raise MalformedRequest(msg)


async def no_other_options(request: Request) -> None:
    """Refuses the options that a route does not document; a dependency of routes whose query FastAPI reads.

    Raises:
        MalformedRequest: See `require_options`.
    """
    if request.scope["query_string"]:
        route: APIRoute = request.scope["route"]
        require_options(request, [parameter.alias for parameter in route.dependant.query_params])


def bulk_bodies(model: type[BaseModel]) -> dict[str, Any]:
    """The documented bodies of a route that takes a JSON body or a stream."""
    documented = body_of(model)
    documented["requestBody"]["content"] |= {
        ndjson.MEDIA_TYPE: {
            "schema": {"type": "array", "items": ITEM_SCHEMA, "description": "An item a line, of any number."},
            "example": _LINES_EXAMPLE,
        },
        arrow.MEDIA_TYPE: {"schema": {**_BINARY, "description": _ARROW_ITEMS}},
    }
    return documented


def bulk_answers() -> dict[int | str, dict[str, Any]]:
    """The documented answers to streams, beside the JSON one."""
    entries = {"type": "array", "items": _ENTRY, "description": "An entry a line, in order."}
    content = {
        ndjson.MEDIA_TYPE: {"schema": entries},
        arrow.MEDIA_TYPE: {"schema": {**_BINARY, "description": _ARROW_ANSWERS}},
    }
    headers = {
        f"Semid-{name.title()}": {"description": f"Of streams: the {name}.", "schema": {"type": "string"}}
        for name in ("tokenizer", "namespace")
    }
    return {200: {"content": content, "headers": headers}}


class Json(Response):
    """A JSON answer."""

    def init_headers(self, _headers: Mapping[str, str] | None = None) -> None:
        """Those of all of them, without asking which there are."""
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), (b"content-type", b"application/json")]


def as_json(answer: Any) -> Response:
    """A JSON answer; times end with Z."""
    return Json(orjson.dumps(answer, option=orjson.OPT_UTC_Z))


def _parsed(body: bytes, model: type[R]) -> R:
    return _validated(model, parse_json(body))


def _validated(model: type[R], value: Any, *, strict: bool | None = None) -> R:
    try:
        return model.model_validate(value, strict=strict)
    except ValidationError as error:
        raise MalformedRequest(describe(error.errors(include_url=False, include_input=False))) from error


async def answered(
    request: Request, gate: BodyGate, model: type[R], use_case: Callable[[R], Coroutine[Any, Any, Any]]
) -> Response:
    """What a use case answers to a JSON body; a caller who leaves is not worked for any longer.

    Raises:
        UnsupportedMediaType: The body does not say that it is JSON.
        NotJson: It is none.
        MalformedRequest: It does not fit the model.
        ServiceError: What the use case raises.
    """
    async with gate.read(request) as body:
        require_json(request)
        on_the_loop = len(body) <= BYTES_ON_THE_LOOP
        parsed = _parsed(body, model) if on_the_loop else await asyncio.to_thread(_parsed, body, model)
        return as_json(await unless_disconnected(request, use_case(parsed)))


async def read_body(request: Request, gate: BodyGate, model: type[R], *, empty: bytes = b"") -> R:
    """What a small JSON body says; `empty` where there is none.

    Raises:
        UnsupportedMediaType, NotJson, MalformedRequest: As `answered`.
    """
    async with gate.read(request) as body:
        if body:
            require_json(request)
        return _parsed(body or empty, model)


def streamed(
    request: Request, gate: BodyGate, terms: StreamTerms, bulk: BulkFormat[G], origin: Mapping[str, str]
) -> Response:
    """What a bulk format answers to a body of any length, while it arrives; the origin goes into headers.

    Raises:
        UnsupportedMediaType: The body is compressed.
    """
    require_plain(request)
    headers = {f"semid-{name}": value for name, value in origin.items()}
    return StreamedAnswer(bulk, gate.allowance(), headers, terms)


def _problem(schema: str) -> dict[str, Any]:
    return {PROBLEM_JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
