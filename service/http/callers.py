"""The caller of a request: what is said of the body, and the watch for those who leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.bodies import CALLER, Caller, header_of
from service.errors import UnsupportedMediaType
from service.quoting import quoted

JSON: Final = "application/json"

T = TypeVar("T")


def media_type_of(request: Request) -> str:
    """What the body says that it is; JSON where it says nothing."""
    said = header_of(request, b"content-type")
    return JSON if said is None or said == JSON else said.partition(";")[0].strip().lower()


def require_json(request: Request) -> None:
    """Raise UnsupportedMediaType unless the body says that it is JSON, or says nothing, and is not compressed."""
    require_plain(request)
    media_type = media_type_of(request)
    if media_type != JSON and not media_type.endswith("+json"):
        msg = f"the body is {quoted(media_type)}; send application/json"
        raise UnsupportedMediaType(msg)


def require_plain(request: Request) -> None:
    """Raise UnsupportedMediaType where the body is compressed."""
    encoding = header_of(request, b"content-encoding")
    if encoding is not None and encoding.strip().lower() != "identity":
        msg = f"the body is compressed ({quoted(encoding)}); send it as it is"
        raise UnsupportedMediaType(msg)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run the work, and drop it when the caller leaves.

    Call it after the body has been read: the next thing the caller can send is its leave.

    Raises:
        ClientDisconnect: The caller left; the work was cancelled.
    """
    worker = asyncio.current_task()
    assert worker is not None
    left = answered = False

    def drop() -> None:
        nonlocal left
        if not answered:  # else what the worker does by now is none of this
            left = True
            worker.cancel()

    unwatch = _watch(request, drop)
    try:
        return await work
    except asyncio.CancelledError as error:
        if left and worker.uncancel() == 0:
            raise ClientDisconnect from error
        raise
    finally:
        answered = True
        unwatch()


def _watch(request: Request, left: Callable[[], None]) -> Callable[[], object]:
    """Have this called when the caller leaves; returns what ends the watch.

    Where the server itself does not tell of a leave, a task waits for it, which costs a small request some of its time.
    """
    caller: Caller | None = request.scope.get(CALLER)
    if caller is not None:
        return caller.watch(left)
    leave = asyncio.ensure_future(_left(request))
    leave.add_done_callback(lambda _: left())
    return leave.cancel


async def _left(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
