"""The HTTP API: every route hands over to the use case."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ValidationError
from starlette.convertors import PathConvertor, register_url_convertor

from service.bodies import parse_json, require_json, unless_disconnected
from service.content import MAX_ITEM_ID_BYTES, read_item_id
from service.errors import PROBLEM_JSON, InvalidItemId, MalformedItemId, MalformedRequest
from service.schemas import (
    SEMANTIC_ID_EXAMPLE,
    AssignmentAnswer,
    Health,
    LookupRequest,
    LookupResponse,
    Namespace,
    Readiness,
    RetiredAssignment,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerName,
    TokenizersResponse,
    describe,
)
from service.state import EXPLORER, State


class AnyText(PathConvertor):
    """All the rest of a path. The convertor `path` stops at a line end: it would find the item `a` for `a%0A`."""

    regex = "(?s:.*)"


register_url_convertor("any_text", AnyText())

router = APIRouter()

R = TypeVar("R", bound=BaseModel)

ItemIdPath = Annotated[str, Path(description="The catalogue's own key.", max_length=MAX_ITEM_ID_BYTES)]
NamespaceQuery = Annotated[Namespace, Query()]
TokenizerQuery = Annotated[TokenizerName, Query()]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented problem answers, by status."""
    titles = {
        400: "The body is not JSON",
        404: "Nothing is assigned there",
        410: "The item was retired",
        413: "The body is too large",
        415: "The content type is not supported",
        422: "The request does not fit its schema",
        429: "The service is at its limit",
        503: "The model or the registry is not available",
    }
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    retired = {"schema": {"$ref": "#/components/schemas/RetiredProblem"}}
    retry = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
    return {
        status: {
            "description": titles[status],
            "content": {PROBLEM_JSON: retired if status == 410 else problem},
            **({"headers": retry} if status in {429, 503} else {}),
        }
        for status in statuses
    }


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """The documented body of a route that reads its bytes itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _json(answer: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(answer, option=orjson.OPT_UTC_Z), status, media_type="application/json")


@router.post(
    "/tokenize",
    tags=["Tokenize"],
    summary="Items to Semantic IDs",
    response_model=TokenizeResponse,
    responses=_problems(400, 413, 415, 422, 429, 503),
    openapi_extra=_body(TokenizeRequest),
)
async def tokenize(request: Request) -> Response:
    """Give each item its Semantic ID: the one it holds, or a new one. A faulty item fails alone, in its place."""
    state = State.of(request)
    async with state.gate.read(request) as body:
        work = state.tokenization.tokenize(_parse(request, body, TokenizeRequest))
        return _json(await unless_disconnected(request, work))


@router.post(
    "/lookup",
    tags=["Look up"],
    summary="Semantic IDs to items",
    response_model=LookupResponse,
    responses=_problems(400, 413, 415, 422, 429, 503),
    openapi_extra=_body(LookupRequest),
)
async def lookup(request: Request) -> Response:
    """Find the holders of many Semantic IDs at once, such as a beam search's output."""
    state = State.of(request)
    async with state.gate.read(request) as body:
        work = state.tokenization.lookup(_parse(request, body, LookupRequest))
        return _json(await unless_disconnected(request, work))


@router.get(
    "/item/{semantic_id}",
    tags=["Look up"],
    summary="Reverse lookup",
    response_model=AssignmentAnswer,
    responses=_problems(404, 410, 422, 503),
)
async def item(
    request: Request,
    semantic_id: Annotated[str, Path(description="In either form.", examples=[SEMANTIC_ID_EXAMPLE])],
    namespace: NamespaceQuery = "default",
    tokenizer: TokenizerQuery = None,
) -> Response:
    """Find the item of a Semantic ID: the one that holds it, or held it before it was replaced."""
    return _json(await State.of(request).tokenization.by_semantic_id(semantic_id, namespace, tokenizer))


@router.get(
    "/assignment/{item_id:any_text}",
    tags=["Look up"],
    summary="Forward lookup",
    response_model=AssignmentAnswer,
    responses=_problems(404, 410, 422, 503),
)
async def assignment(
    request: Request, item_id: ItemIdPath, namespace: NamespaceQuery = "default", tokenizer: TokenizerQuery = None
) -> Response:
    """Find the Semantic ID that an item holds."""
    _check_item_id(item_id)
    return _json(await State.of(request).tokenization.by_item_id(item_id, namespace, tokenizer))


@router.delete(
    "/assignment/{item_id:any_text}",
    tags=["Tokenize"],
    summary="Retire an item",
    response_model=RetiredAssignment,
    responses=_problems(404, 422, 503),
)
async def retire(
    request: Request, item_id: ItemIdPath, namespace: NamespaceQuery = "default", tokenizer: TokenizerQuery = None
) -> Response:
    """Take an item out of every listing. Its Semantic ID stays its own: the item gets it back when it comes again."""
    _check_item_id(item_id)
    return _json(await State.of(request).tokenization.retire(item_id, namespace, tokenizer))


@router.get("/tokenizers", tags=["Operate"], summary="What is loaded", response_model=TokenizersResponse)
async def tokenizers(request: Request) -> Response:
    """The loaded tokenizer's manifest: fingerprint, components, measures."""
    return _json(State.of(request).tokenizers())


@router.get("/healthz", tags=["Operate"], summary="Liveness", response_model=Health, responses=_problems(503))
async def healthz(request: Request) -> Response:
    """Whether the model's thread runs; where it does not, the process needs a restart."""
    State.of(request).check_alive()
    return _json({"alive": True})


@router.get("/readyz", tags=["Operate"], summary="Readiness", response_model=Readiness, responses=_problems(503))
async def readyz(request: Request) -> Response:
    """Whether the model is warm and the registry answers."""
    await State.of(request).check_ready()
    return _json({"ready": True})


@router.get(
    "/metrics",
    tags=["Operate"],
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The exposition."}},
)
async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format."""
    metrics = State.of(request).metrics
    return Response(metrics.render(), headers={"content-type": metrics.content_type})


@router.get("/", include_in_schema=False)
async def explorer() -> FileResponse:
    """The page."""
    return FileResponse(EXPLORER / "index.html")


def _check_item_id(item_id: str) -> None:
    """Raise MalformedItemId unless it is one."""
    try:
        read_item_id(item_id)
    except InvalidItemId as error:
        raise MalformedItemId(error.detail) from error


def _parse(request: Request, body: bytes, model: type[R]) -> R:
    """The validated envelope of a JSON body.

    Raises:
        NotJson: The body is no JSON.
        MalformedRequest: It does not fit the model.
    """
    require_json(request)
    try:
        return model.model_validate(parse_json(body))
    except ValidationError as error:
        raise MalformedRequest(describe(error.errors(include_url=False, include_input=False))) from error
