"""The HTTP API of the statistics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from service.http.callers import unless_disconnected
from service.http.wire import NamespaceQuery, TokenizerQuery, as_json, no_other_options, problems
from service.state import State
from service.stats.schemas import StatsResponse

router = APIRouter(tags=["Operate"])

CodewordsQuery = Annotated[bool, Query(description="Tell how many live items each codeword has.")]


@router.get(
    "/stats",
    dependencies=[Depends(no_other_options)],
    summary="Use of the codes, and drift",
    response_model=StatsResponse,
    responses=problems(422, 503),
)
async def stats(
    request: Request,
    *,
    codewords: CodewordsQuery = False,
    namespace: NamespaceQuery = "default",
    tokenizer: TokenizerQuery = None,
) -> Response:
    """Tell codebook usage, perplexity and collisions of the live items, and the drift of what comes in."""
    work = State.of(request).statistics.stats(namespace, tokenizer, codewords=codewords)
    return as_json(await unless_disconnected(request, work))
