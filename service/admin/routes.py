"""The HTTP API for the operator."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from service.admin.hot_swap import Swapped
from service.admin.plan import OTHER_PLANS
from service.admin.schemas import DefaultRequest, LoadRequest, SwapAnswer
from service.http.wire import as_json, body_of, no_other_options, problems, read_body
from service.state import State

ACCEPTED = 202


async def admin_alone(request: Request) -> None:
    """Lets the operator in; see `AdminDoor`."""
    State.of(request).admin_door.check(request)


router = APIRouter(prefix="/admin", tags=["Operate"], dependencies=[Depends(admin_alone), Depends(no_other_options)])

TokenizerPath = Annotated[
    str, Path(description="`name@fingerprint`, or a `name` that only one has.", examples=["broad-6x256"])
]
PENDING: dict[int | str, dict[str, Any]] = {
    202: {"model": SwapAnswer, "description": "Not every worker has followed in time; they go on, see `pending`."}
}


@router.post(
    "/tokenizers",
    summary="Load a checkpoint",
    response_model=SwapAnswer,
    responses={**PENDING, **problems(400, 403, 408, 409, 413, 415, 422, 429, 503)},
    openapi_extra=body_of(LoadRequest),
)
async def load(request: Request) -> Response:
    """Load a checkpoint beside what is loaded, verified and warm in every worker, and make it the default when told."""
    state = State.of(request)
    asked = await read_body(request, state.gate, LoadRequest)
    return _answered(state, await state.swap.load(asked.checkpoint, default=asked.default, force=asked.force))


@router.post(
    "/tokenizers/{tokenizer}/default",
    summary="Make a tokenizer the default",
    response_model=SwapAnswer,
    responses={**PENDING, **problems(400, 403, 408, 409, 413, 415, 422, 429, 503)},
    openapi_extra={"requestBody": {**body_of(DefaultRequest)["requestBody"], "required": False}},
)
async def make_default(request: Request, tokenizer: TokenizerPath) -> Response:
    """Let it answer requests that name none, from the next one on; those under way end with the one they began with."""
    state = State.of(request)
    asked = await read_body(request, state.gate, DefaultRequest, empty=b"{}")
    return _answered(state, await state.swap.make_default(tokenizer, force=asked.force))


@router.delete(
    "/tokenizers/{tokenizer}",
    summary="Unload a tokenizer",
    response_model=SwapAnswer,
    responses={**PENDING, **problems(403, 409, 422, 503)},
)
async def unload(request: Request, tokenizer: TokenizerPath) -> Response:
    """Let it go; requests under way end with it, and what it assigned is there again when it is loaded again."""
    state = State.of(request)
    return _answered(state, await state.swap.unload(tokenizer))


def _answered(state: State, swapped: Swapped) -> Response:
    """What is loaded; and, where other services may have the same registry, that these have not been told."""
    note = OTHER_PLANS if state.registry_is_shared else None
    response = as_json({**swapped.as_answer(), "note": note})
    response.status_code = ACCEPTED if swapped.pending else 200
    return response
