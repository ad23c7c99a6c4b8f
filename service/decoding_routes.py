"""The HTTP API for decoders."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.bodies import unless_disconnected
from service.decoding_schemas import ChangesResponse
from service.state import State
from service.wire import NamespaceQuery, TokenizerQuery, as_json, gone, problems

router = APIRouter(tags=["Decode"])

MAX_REVISION = 2**53
MAX_CHANGES = 10_000

AfterQuery = Annotated[int, Query(ge=0, le=MAX_REVISION, description="The revision up to which all is known.")]
LimitQuery = Annotated[int, Query(ge=1, le=MAX_CHANGES, description="How many changes to answer, at most.")]
WaitQuery = Annotated[
    float,
    Query(ge=0, description="Where there is nothing new, how many seconds to wait for it; cut to the service's limit."),
]


@router.get(
    "/changes",
    summary="What came and went since a revision",
    response_model=ChangesResponse,
    responses={**problems(422, 429, 503), **gone("Those changes are no longer kept", "ChangesGoneProblem")},
)
async def changes(
    request: Request,
    after: AfterQuery,
    *,
    limit: LimitQuery = 1000,
    wait_s: WaitQuery = 0.0,
    namespace: NamespaceQuery = "default",
    tokenizer: TokenizerQuery = None,
) -> Response:
    """Follow the record: every assignment, return, retirement and replacement, in order."""
    work = State.of(request).decoding.changes(after, limit, wait_s, namespace, tokenizer)
    return as_json(await unless_disconnected(request, work))
