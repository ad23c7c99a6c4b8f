"""The HTTP API: every route hands over to the use case."""

from __future__ import annotations

from functools import partial
from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Path, Query, Request, Response

from service.bulk import arrow, ndjson
from service.bulk.arrow import ArrowStream
from service.bulk.ndjson import Ndjson
from service.content import MAX_ITEM_ID_BYTES, read_item_id
from service.errors import InvalidItemId, MalformedItemId
from service.http.callers import media_type_of
from service.http.wire import (
    ItemIdPath,
    answered,
    as_json,
    body_of,
    bulk_answers,
    bulk_bodies,
    gone,
    problems,
    queried,
    query_of,
    streamed,
)
from service.schemas import (
    SEMANTIC_ID_EXAMPLE,
    AssignmentAnswer,
    AssignmentsRequest,
    AssignmentsResponse,
    Envelope,
    Health,
    ItemOptions,
    LookupRequest,
    LookupResponse,
    Readiness,
    RecordOptions,
    RetiredAssignment,
    RetireRequest,
    RetireResponse,
    TokenizeOptions,
    TokenizeRequest,
    TokenizeResponse,
    TokenizersResponse,
)
from service.state import State

router = APIRouter()

_ITEM_IN_QUERY = query_of(RecordOptions)
_ITEM_IN_QUERY["parameters"].append(
    {
        "name": "item_id",
        "in": "query",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ITEM_ID_BYTES},
        "description": "The catalogue's own key.",
    }
)

TokenizerOfManyQuery = Annotated[str | None, Query(description="Of this one alone; of all where absent.")]


@router.post(
    "/tokenize",
    tags=["Tokenize"],
    summary="Items to Semantic IDs",
    response_model=TokenizeResponse,
    responses={**problems(400, 408, 413, 415, 422, 429, 503), **bulk_answers()},
    openapi_extra={**bulk_bodies(TokenizeRequest), **query_of(TokenizeOptions)},
)
async def tokenize(request: Request) -> Response:
    """Give each item its Semantic ID: the one it holds, or a new one. A faulty item fails alone, in its place.

    A stream of any length is answered while it arrives. What stands in the query holds where a JSON body says nothing.
    """
    state = State.of(request)
    options = queried(request, TokenizeOptions)
    if (media_type := media_type_of(request)) in {arrow.MEDIA_TYPE, ndjson.MEDIA_TYPE}:
        named = state.tokenizers.named(options.tokenizer)
        origin = named.origin(options.namespace)
        if media_type == ndjson.MEDIA_TYPE:
            lines = Ndjson(partial(state.entries.entries, named, options, patient=True), state.row_thread)
            return streamed(request, state.gate, state.terms, lines, origin)
        use_case = partial(state.columns.answer, named, options, patient=True)
        levels = len(named.manifest.codebook_sizes)
        bulk = ArrowStream(
            use_case,
            state.row_thread,
            named.reader,
            levels,
            origin,
            max_batch_bytes=state.gate.max_body_bytes,
            knows=partial(state.columns.knows, named, options),
        )
        return streamed(request, state.gate, state.terms, bulk, origin)
    tokenize = state.entries.tokenize
    beside_query = (lambda body: tokenize(body.beside(options))) if request.scope["query_string"] else tokenize
    return await answered(request, state.gate, TokenizeRequest, beside_query)


@router.post(
    "/lookup",
    tags=["Look up"],
    summary="Semantic IDs to items",
    response_model=LookupResponse,
    responses=problems(400, 408, 413, 415, 422, 429, 503),
    openapi_extra=body_of(LookupRequest),
)
async def lookup(request: Request) -> Response:
    """Find the holders of many Semantic IDs at once, such as a beam search's output."""
    queried(request, Envelope)
    state = State.of(request)
    return await answered(request, state.gate, LookupRequest, state.assignments.of_semantic_ids)


@router.get(
    "/item/{semantic_id}",
    tags=["Look up"],
    summary="Reverse lookup",
    response_model=AssignmentAnswer,
    responses={**problems(404, 422, 503), **gone("The item was retired", "RetiredProblem")},
    openapi_extra=query_of(RecordOptions),
)
async def item(
    request: Request,
    semantic_id: Annotated[str, Path(description="In either form.", examples=[SEMANTIC_ID_EXAMPLE])],
) -> Response:
    """Find the item of a Semantic ID: the one that holds it, or held it before it was replaced."""
    options = queried(request, RecordOptions)
    found = await State.of(request).assignments.of_semantic_id(semantic_id, options)
    return as_json(found)


@router.get(
    "/assignment/{item_id:any_text}",
    tags=["Look up"],
    summary="Forward lookup",
    response_model=AssignmentAnswer,
    responses={**problems(404, 422, 503), **gone("The item was retired", "RetiredProblem")},
    openapi_extra=query_of(RecordOptions),
)
async def assignment(request: Request, item_id: ItemIdPath) -> Response:
    """Find the Semantic ID that an item holds."""
    options = queried(request, RecordOptions)
    item_id = _in_path(request, item_id)
    return as_json(await State.of(request).assignments.of_item(item_id, options))


@router.delete(
    "/assignment/{item_id:any_text}",
    tags=["Tokenize"],
    summary="Retire an item",
    response_model=RetiredAssignment,
    responses=problems(404, 422, 503),
    openapi_extra=query_of(RecordOptions),
)
async def retire(request: Request, item_id: ItemIdPath) -> Response:
    """Take an item out of every listing. Its Semantic ID stays its own: the item gets it back when it comes again."""
    options = queried(request, RecordOptions)
    item_id = _in_path(request, item_id)
    return as_json(await State.of(request).assignments.retire_item(item_id, options))


@router.get(
    "/assignment",
    tags=["Look up"],
    summary="Forward lookup of any item id",
    response_model=AssignmentAnswer,
    responses={**problems(404, 422, 503), **gone("The item was retired", "RetiredProblem")},
    openapi_extra=_ITEM_IN_QUERY,
)
async def assignment_of(request: Request) -> Response:
    """Find the Semantic ID that an item holds, whose id no path can have: `.` and `..` are steps to most callers."""
    options = queried(request, ItemOptions)
    item_id = _in_query(request, options)
    return as_json(await State.of(request).assignments.of_item(item_id, options))


@router.delete(
    "/assignment",
    tags=["Tokenize"],
    summary="Retire an item of any item id",
    response_model=RetiredAssignment,
    responses=problems(404, 422, 503),
    openapi_extra=_ITEM_IN_QUERY,
)
async def retire_of(request: Request) -> Response:
    """Take an item out of every listing, whose id no path can have."""
    options = queried(request, ItemOptions)
    item_id = _in_query(request, options)
    return as_json(await State.of(request).assignments.retire_item(item_id, options))


@router.post(
    "/assignments",
    tags=["Look up"],
    summary="Items to Semantic IDs they hold",
    response_model=AssignmentsResponse,
    responses=problems(400, 408, 413, 415, 422, 429, 503),
    openapi_extra=body_of(AssignmentsRequest),
)
async def assignments(request: Request) -> Response:
    """Find the Semantic IDs that many items hold at once."""
    queried(request, Envelope)
    state = State.of(request)
    return await answered(request, state.gate, AssignmentsRequest, state.assignments.of_items)


@router.post(
    "/retire",
    tags=["Tokenize"],
    summary="Retire many items",
    response_model=RetireResponse,
    responses=problems(400, 408, 413, 415, 422, 429, 503),
    openapi_extra=body_of(RetireRequest),
)
async def retire_many(request: Request) -> Response:
    """Take many items out of every listing at once; each fails alone."""
    queried(request, Envelope)
    state = State.of(request)
    return await answered(request, state.gate, RetireRequest, state.assignments.retire_items)


@router.get(
    "/tokenizers",
    tags=["Operate"],
    summary="What is loaded",
    response_model=TokenizersResponse,
    responses=problems(422),
)
async def tokenizers(request: Request) -> Response:
    """The manifests of the loaded tokenizers, the default first: fingerprint, components, measures."""
    queried(request, Envelope)
    return as_json(State.of(request).manifests())


# These three are asked by machines, whose addresses may hold whatever their operator's other services want: options
# that are none are passed over there, as a probe that fails for its query ends a service that is well.
@router.get("/healthz", tags=["Operate"], summary="Liveness", response_model=Health, responses=problems(422, 503))
async def healthz(request: Request, tokenizer: TokenizerOfManyQuery = None) -> Response:
    """Whether the thread of each model runs; where one does not, the process needs a restart."""
    State.of(request).check_alive(tokenizer)
    return as_json({"alive": True})


@router.get("/readyz", tags=["Operate"], summary="Readiness", response_model=Readiness, responses=problems(422, 503))
async def readyz(request: Request, tokenizer: TokenizerOfManyQuery = None) -> Response:
    """Whether all models are warm and the registry answers."""
    await State.of(request).check_ready(tokenizer)
    return as_json({"ready": True})


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


def _in_path(request: Request, item_id: str) -> str:
    return _item_id_of(item_id, request.scope.get("raw_path", b""), "path")


def _in_query(request: Request, options: ItemOptions) -> str:
    return _item_id_of(options.item_id, request.scope["query_string"], "query")


def _item_id_of(item_id: str | None, part: bytes, name: str) -> str:
    """An item id, read from this part of a URL, where what is no UTF-8 has been replaced by other characters.

    Raises:
        MalformedItemId: It is none.
    """
    try:
        unquote_to_bytes(part).decode()
    except UnicodeDecodeError as error:
        raise MalformedItemId(f"the {name} is not UTF-8") from error
    try:
        return read_item_id(item_id)
    except InvalidItemId as error:
        raise MalformedItemId(error.detail) from error
