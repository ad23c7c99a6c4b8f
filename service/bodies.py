"""Bytes of a request -> JSON, within limits; and the watch for callers who leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from service.errors import BodyTimeout, BodyTooLarge, NotJson, Overloaded, UnsupportedMediaType

T = TypeVar("T")


@dataclass
class _Share:
    """The bytes that one body holds."""

    held: int = 0


class BodyGate:
    """Bounds the bytes of one body, and of all bodies held at once.

    Args:
        max_body_bytes: Of one body; beyond it 413.
        inflight_bytes: Of all bodies whose requests are not answered yet, and of what parsing makes of them; beyond it
            429, and 413 for a body that is beyond it alone.
        timeout_s: In which a body has to arrive; beyond it 408.
    """

    def __init__(self, *, max_body_bytes: int, inflight_bytes: int, timeout_s: float) -> None:
        self._max_body_bytes = max_body_bytes
        self._inflight_bytes = inflight_bytes
        self._timeout_s = timeout_s
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, its bytes counted as held until the request is answered.

        Raises:
            BodyTooLarge: It has more bytes than one body may.
            Overloaded: Too many bytes are held already.
        """
        self._refuse_large(int(request.headers.get("content-length") or 0))
        share = _Share()
        try:
            yield await self._receive(request, share)
        finally:
            self._held_bytes -= share.held

    async def _receive(self, request: Request, share: _Share) -> bytes:
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    self._hold(len(chunk), share)
                    self._refuse_large(share.held)
                    chunks.append(chunk)
        except TimeoutError as error:
            raise BodyTimeout(f"it has to arrive within {self._timeout_s:g} s") from error
        body = b"".join(chunks)
        values = _bytes_of_values(body)
        if values > self._inflight_bytes:
            raise BodyTooLarge("it holds too many values")
        self._hold(values, share)
        return body

    def _refuse_large(self, size: int) -> None:
        if size > self._max_body_bytes:
            msg = f"at most {self._max_body_bytes} bytes are taken in one body"
            raise BodyTooLarge(msg)

    def _hold(self, size: int, share: _Share) -> None:
        """Count more bytes of a body; one that is alone is taken whatever its size."""
        if self._held_bytes > share.held and self._held_bytes + size > self._inflight_bytes:
            msg = f"bodies of {self._held_bytes} bytes are held of at most {self._inflight_bytes}"
            raise Overloaded(msg)
        self._held_bytes += size
        share.held += size


def _bytes_of_values(body: bytes) -> int:
    """About what the values of a JSON body take once parsed: three bytes, `{},`, become an object of sixty-four."""
    return 64 * (body.count(b"{") + body.count(b"[")) + 32 * body.count(b",")


def require_json(request: Request) -> None:
    """Raise UnsupportedMediaType unless the body says that it is JSON, or says nothing."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        msg = f"the body is {media_type!r}; send application/json"
        raise UnsupportedMediaType(msg)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body.

    The fast parser refuses a whole body for one lone surrogate, NaN or number beyond float64; then the lenient one
    reads it, so that only the item that holds it fails. No member is an integer, so all numbers may be floats:
    Python's own limit on the digits of an integer would fail the body.

    Raises:
        NotJson: Neither can read it.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(body.decode("utf-8", "surrogatepass"), parse_int=float)
        except (ValueError, RecursionError):
            raise NotJson(str(error)) from error


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run the work, and drop it when the caller leaves.

    Call it after the body has been read: the next thing the caller can send is its leave.

    Raises:
        ClientDisconnect: The caller left; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    leave = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leave}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leave.cancel()
        if not task.done():
            task.cancel()


async def _left(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
