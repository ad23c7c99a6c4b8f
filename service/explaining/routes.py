"""The HTTP API of one content's path."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.explaining.schemas import ExplainRequest, ExplainResponse
from service.http.wire import answered, body_of, problems, queried
from service.schemas import Envelope
from service.state import State

router = APIRouter(tags=["Explore"])


@router.post(
    "/explain",
    summary="How a content comes to its codes",
    response_model=ExplainResponse,
    responses=problems(400, 408, 413, 415, 422, 429, 503),
    openapi_extra=body_of(ExplainRequest),
)
async def explain(request: Request) -> Response:
    """Show one content's path down the levels, the ID it would get, and the live items nearest to it.

    A dry run, computed alone on the canonical path: for people. For many contents, send `POST /tokenize` a dry run.
    """
    queried(request, Envelope)
    state = State.of(request)
    return await answered(request, state.gate, ExplainRequest, state.explaining.explain)
