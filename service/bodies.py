"""Bytes of a request -> JSON, within limits: those of one body, and of all that are held at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, Self

import numpy as np
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from service.errors import BodyTimeout, BodyTooLarge, NotJson, Overloaded

STREAM_BYTES = 256 * 1024  # of a stream that holds nothing else: buffers of its connection, tasks
BYTES_ON_THE_LOOP = 64 * 1024  # parsing more would keep other requests waiting

DIGITS = 18  # of an integer, at most: beyond them it is a float
COUNTED_BY_ARRAYS = 32 * 1024  # bytes of a body, from which on arrays are faster
COUNTED_AT_ONCE = 1024 * 1024  # bytes of a large body; each part gives the interpreter away twice

CALLER: Final = "semid.caller"  # in a scope, where the server tells of its caller


class Caller(Protocol):
    """Who sent a request, as the server sees it: with it neither a body nor a leave has to be waited for in turns."""

    def whole_body(self, scope: Scope) -> bytes | None:
        """The body of the request with this scope, once, where all of it has come and is small; else None."""

    def watch(self, left: Callable[[], None]) -> Callable[[], None]:
        """Have this called when the caller leaves, at once where that is done; returns what ends the watch."""


@dataclass(slots=True)
class Share:
    """The bytes that one body holds."""

    held: int = 0


class Allowance:
    """The bytes that one stream holds of those that all may; used as a context, at whose end it holds none.

    Raises:
        Overloaded: On entering: there is no room for one stream more.
    """

    def __init__(self, gate: BodyGate) -> None:
        self._gate = gate
        self._share = Share()

    def __enter__(self) -> Self:
        """Hold what every stream does."""
        self._gate.admit(self._share)
        return self

    def __exit__(self, *_: object) -> None:
        """Give all back."""
        self._gate.give_back(self._share.held, self._share)

    async def take(self, size: int) -> None:
        """Hold more, once there is room.

        Raises:
            Overloaded: There was none for too long.
        """
        await self._gate.hold_patiently(size, self._share)

    def give(self, size: int) -> None:
        """Hold less."""
        self._gate.give_back(size, self._share)


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
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def timeout_s(self) -> float:
        """In which a body has to arrive; how long a stream's caller may stand still."""
        return self._timeout_s

    @property
    def max_body_bytes(self) -> int:
        """Of one body, and of what of a stream has to be read as a whole."""
        return self._max_body_bytes

    def allowance(self) -> Allowance:
        """For a stream."""
        return Allowance(self)

    def read(self, request: Request) -> WholeBody:
        """The whole body, as a context: its bytes are counted as held until its end."""
        return WholeBody(self, request)

    async def receive(self, request: Request, share: Share) -> bytes:
        """The whole body; its bytes are counted as held by the share.

        Raises:
            BodyTooLarge: It has more bytes than one body may.
            BodyTimeout: It did not arrive in time.
            Overloaded: Too many bytes are held already.
        """
        caller: Caller | None = request.scope.get(CALLER)
        body = caller.whole_body(request.scope) if caller is not None else None
        if body is not None:  # came with its head, as small ones do
            self._refuse_large(len(body))
            self.hold(len(body), share)
        else:
            body = await self._wait_for(request, share)
        values = bytes_of_values(body)
        if values > self._inflight_bytes:
            raise BodyTooLarge("it holds too many values")
        self.hold(values, share)
        return body

    async def _wait_for(self, request: Request, share: Share) -> bytes:
        self._refuse_large(int(header_of(request, b"content-length") or 0))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._receive(request, share)
        except TimeoutError as error:
            raise BodyTimeout(f"it has to arrive within {self._timeout_s:g} s") from error

    async def _receive(self, request: Request, share: Share) -> bytes:
        chunks: list[bytes] = []
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            self.hold(len(chunk), share)
            self._refuse_large(share.held)
            if not message.get("more_body", False):
                return b"".join([*chunks, chunk]) if chunks else chunk
            chunks.append(chunk)

    def _refuse_large(self, size: int) -> None:
        if size > self._max_body_bytes:
            msg = f"at most {self._max_body_bytes} bytes are taken in one body"
            raise BodyTooLarge(msg)

    def hold(self, size: int, share: Share) -> None:
        """Count more bytes of a body; one that is alone is taken whatever its size.

        Raises:
            Overloaded: Too many bytes are held already.
        """
        if self._held_bytes > share.held and self._held_bytes + size > self._inflight_bytes:
            msg = f"bodies of {self._held_bytes} bytes are held of at most {self._inflight_bytes}"
            raise Overloaded(msg)
        self._held_bytes += size
        share.held += size

    def admit(self, share: Share) -> None:
        """Count one stream more, while there is room for what those that are admitted read.

        Raises:
            Overloaded: There is none.
        """
        if self._held_bytes and self._held_bytes + STREAM_BYTES > self._inflight_bytes // 4:
            msg = f"streams are taken until bodies hold a quarter of {self._inflight_bytes} bytes"
            raise Overloaded(msg)
        self.hold(STREAM_BYTES, share)

    async def hold_patiently(self, size: int, share: Share) -> None:
        """Count more bytes of a stream once streams leave half of the room to whole bodies.

        Raises:
            Overloaded: They did not in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._held_bytes > share.held and self._held_bytes + size > self._inflight_bytes // 2:
                    freed = asyncio.get_running_loop().create_future()
                    self._waiting.add(freed)
                    try:
                        await freed
                    finally:
                        self._waiting.discard(freed)
        except TimeoutError as error:
            msg = f"streams hold all of their room, a half of {self._inflight_bytes} bytes"
            raise Overloaded(msg) from error
        self._held_bytes += size
        share.held += size

    def give_back(self, size: int, share: Share) -> None:
        """Count bytes that are no longer held."""
        self._held_bytes -= size
        share.held -= size
        for freed in self._waiting:
            if not freed.done():
                freed.set_result(None)


class WholeBody:
    """A body that is held for as long as it is worked for. No generator: every request has one."""

    __slots__ = ("_gate", "_request", "_share")

    def __init__(self, gate: BodyGate, request: Request) -> None:
        self._gate = gate
        self._request = request
        self._share = Share()

    async def __aenter__(self) -> bytes:
        """Its bytes.

        Raises:
            ServiceError: See `BodyGate.receive`.
        """
        try:
            return await self._gate.receive(self._request, self._share)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        """Hold it no longer."""
        self._gate.give_back(self._share.held, self._share)


def header_of(request: Request, name: bytes) -> str | None:
    """A header by its name in small letters; None where there is none."""
    for header, value in request.scope["headers"]:  # `Request.headers` would make an object for a look at one
        if header == name:
            text: str = value.decode("latin-1")
            return text
    return None


def bytes_of_values(body: bytes) -> int:
    """About what the values of a JSON body take once parsed: three bytes, `{},`, become an object of sixty-four."""
    count = body.count if len(body) < COUNTED_BY_ARRAYS else partial(_count, body)
    return 64 * (count(b"{") + count(b"[")) + 32 * count(b",")


def _count(body: bytes, mark: bytes) -> int:
    """How often a byte stands in a large body; by arrays, in a quarter of the time."""
    byte = mark[0]
    data = np.frombuffer(body, np.uint8)
    parts = (data[start : start + COUNTED_AT_ONCE] for start in range(0, len(data), COUNTED_AT_ONCE))
    return sum(int(np.count_nonzero(part == byte)) for part in parts)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body.

    The fast parser refuses a whole body for one lone surrogate, NaN or number beyond float64; then the lenient one
    reads it, so that only the item that holds it fails. An integer of many digits becomes a float: Python's own limit
    on them would fail the body.

    Raises:
        NotJson: Neither can read it.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(body.decode("utf-8", "surrogatepass"), parse_int=_integer)
        except (ValueError, RecursionError):
            raise NotJson(str(error)) from error


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS else float(digits)
