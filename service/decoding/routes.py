"""The HTTP API for decoders."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response

from service.decoding.schemas import PREFIX_EXAMPLE, ChangesResponse, NextRequest, NextResponse, PrefixListing
from service.http.callers import unless_disconnected
from service.http.wire import (
    NamespaceQuery,
    TokenizerQuery,
    answered,
    as_json,
    body_of,
    gone,
    no_other_options,
    problems,
    queried,
)
from service.schemas import Envelope
from service.state import State

router = APIRouter(tags=["Decode"])
NO_OTHERS = [Depends(no_other_options)]

MAX_REVISION = 2**53
MAX_CHANGES = 10_000
MAX_PAGE = 1000

_ETAG = {
    "ETag": {
        "description": "The tokenizer's fingerprint, the record's epoch and its revision, by hyphens.",
        "schema": {"type": "string"},
    }
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}

AfterQuery = Annotated[int, Query(ge=0, le=MAX_REVISION, description="The revision up to which all is known.")]
EpochQuery = Annotated[
    str | None,
    Query(max_length=64, description="That the revision is of; 410 where the record has begun another meanwhile."),
]
LimitQuery = Annotated[int, Query(ge=1, le=MAX_CHANGES, description="How many changes to answer, at most.")]
WaitQuery = Annotated[
    float,
    Query(ge=0, description="Where there is nothing new, how many seconds to wait for it; cut to the service's limit."),
]

DisplayQuery = Annotated[
    bool, Query(description="Whether to tell the title that each item has now, where one is kept.")
]


@router.get(
    "/prefix/{prefix:any_text}",
    dependencies=NO_OTHERS,
    summary="What stands under a prefix",
    response_model=PrefixListing,
    responses=problems(422, 503),
)
async def prefix(
    request: Request,
    prefix: Annotated[
        str, Path(description="The first codes of an ID, in either form; empty: the root.", examples=[PREFIX_EXAMPLE])
    ],
    *,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Items of a page, at most.")] = 100,
    cursor: Annotated[str | None, Query(description="Of an earlier answer, to go on from there.")] = None,
    namespace: NamespaceQuery = "default",
    tokenizer: TokenizerQuery = None,
) -> Response:
    """List the codes that follow, with their live counts, and the live items, page by page."""
    work = State.of(request).decoding.prefix(prefix, limit, cursor, namespace, tokenizer)
    return as_json(await unless_disconnected(request, work))


@router.post(
    "/next",
    summary="Codes that lead to a live item",
    response_model=NextResponse,
    responses=problems(400, 408, 413, 415, 422, 429, 503),
    openapi_extra=body_of(NextRequest),
)
async def next_codes(request: Request) -> Response:
    """Say for each prefix, such as a beam, what may come next: as a list, and as a mask."""
    queried(request, Envelope)
    state = State.of(request)
    return await answered(request, state.gate, NextRequest, state.decoding.next)


@router.get(
    "/trie",
    dependencies=NO_OTHERS,
    summary="The whole live trie",
    response_class=Response,
    responses={
        200: {"description": "Safetensors.", "headers": _ETAG, "content": {"application/octet-stream": _BINARY}},
        304: {"description": "It is at the revision that is known.", "headers": _ETAG},
        **problems(422, 503),
    },
)
async def trie(
    request: Request,
    if_none_match: Annotated[str | None, Header(description="ETags that are known.")] = None,
    namespace: NamespaceQuery = "default",
    tokenizer: TokenizerQuery = None,
) -> Response:
    """Take the trie of all live Semantic IDs, in compressed sparse rows; from its revision on, follow `/changes`."""
    work = State.of(request).decoding.trie(if_none_match, namespace, tokenizer)
    etag, data = await unless_disconnected(request, work)
    if data is None:
        return Response(status_code=304, headers={"etag": etag})
    return Response(data, headers={"etag": etag}, media_type="application/octet-stream")


@router.get(
    "/changes",
    dependencies=NO_OTHERS,
    summary="What came and went since a revision",
    response_model=ChangesResponse,
    responses={**problems(422, 429, 503), **gone("Those changes are no longer kept", "ChangesGoneProblem")},
)
async def changes(
    request: Request,
    after: AfterQuery,
    *,
    epoch: EpochQuery = None,
    limit: LimitQuery = 1000,
    wait_s: WaitQuery = 0.0,
    display: DisplayQuery = False,
    namespace: NamespaceQuery = "default",
    tokenizer: TokenizerQuery = None,
) -> Response:
    """Follow the record: every assignment, return, retirement and replacement, in order."""
    decoding = State.of(request).decoding
    work = decoding.changes(after, limit, wait_s, namespace=namespace, name=tokenizer, epoch=epoch, display=display)
    return as_json(await unless_disconnected(request, work))
