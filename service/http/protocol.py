"""A connection's side of the service: heads of requests within limits, answers taken or let go, written in one piece.

uvicorn leaves open how large a head becomes where httptools parses it, how long one takes, how many requests wait for
another, and how long an answer waits to be taken: each is memory, or a connection, that a caller could hold
for ever. Bodies have their limits elsewhere (`service.bodies`), as streams have (`service.bulk.terms`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import h11
import orjson
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.bodies import CALLER
from service.errors import PROBLEM_JSON, HeadTimeout, HeadTooLarge, NotHttp, ServiceError

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # uvicorn without its extras
    HttpToolsProtocol = None  # type: ignore[assignment, misc]

REQUESTS_AHEAD = 100  # of one connection, sent ahead of their answers, beyond which it is cut off
PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class ConnectionLimits(NamedTuple):
    """What a caller may hold by a connection.

    Attributes:
        head_bytes: Of the head of one request: its target and its headers.
        head_timeout_s: In which a head has to arrive, from the connection or from its first byte on; what is left of
            a body that was refused, too.
        taken_timeout_s: In which something of an answer has to be taken.
    """

    head_bytes: int = 64 * 1024
    head_timeout_s: float = 30.0
    taken_timeout_s: float = 60.0


class Gathering:
    """A transport that sends what is written in one turn of the loop together; all else is the transport's own.

    uvicorn writes the head of an answer and its body by themselves. To send a short answer in two pieces costs the
    service and its caller a system call each more, and the caller a look at an answer that is not whole.

    Attributes:
        sent_bytes: Handed to the transport so far, which may hold some of them still.
    """

    MAX_BYTES = 64 * 1024  # beyond which it is sent at once, so that the transport can say that its caller is slow

    def __init__(self, transport: asyncio.Transport) -> None:
        self.sent_bytes = 0
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._bytes = 0

    def __getattr__(self, name: str) -> Any:
        """What is not said here."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send soon."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes > self.MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send now."""
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
            self.sent_bytes += self._bytes
        self._parts, self._bytes = [], 0

    def close(self) -> None:
        """Send, and close."""
        self.flush()
        self._transport.close()


class Bounded(asyncio.Protocol):
    """What holds whichever parser uvicorn has; comes before its protocol.

    A connection has one timer, which looks at it again and again: to set one for each head would cost every request.

    It is the `service.bodies.Caller` of its requests, one for all: an object for each would lie in a circle with
    its request, which only a search for garbage ends.
    """

    _lost = False
    _left: Callable[[], None] | None = None  # of the request that is worked for: of those sent ahead none is yet

    limits = ConnectionLimits()
    # uvicorn's own
    loop: asyncio.AbstractEventLoop
    transport: Any
    flow: FlowControl
    cycle: Any  # the latest request and its answer
    scope: Any  # of the latest head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a head, for so long; gather what is written."""
        super().connection_made(Gathering(transport))  # type: ignore[arg-type]
        self._heard = False
        self._head_since: float | None = self.loop.time()
        self._taken, self._taken_at = 0, 0.0
        self._again = self.loop.call_later(self.limits.head_timeout_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more, tell whoever works for the caller, and let go of the latest request.

        It lies in a circle with each, which only a search for garbage would end: that is seldom, and by then the memory
        of thousands of connections would wait for it.
        """
        self._again.cancel()
        self._lost = True
        super().connection_lost(exc)
        self.cycle = self.scope = None
        if self._left is not None:
            self._left()

    def data_received(self, data: bytes) -> None:
        """Parse it; what comes when no request is due any bytes is the beginning of a head."""
        before = self.cycle
        begins = before is None or before.response_complete or not before.more_body
        self._heard = True
        super().data_received(data)
        if self.cycle is not before:
            self._head_since = None
        elif begins and self._head_since is None:
            self._head_since = self.loop.time()

    def whole_body(self, scope: Scope) -> bytes | None:
        """The body of the latest request, once, where all has come and it was too short for the connection to pause."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or cycle.more_body:
            return None
        if cycle.disconnected or len(cycle.body) > HIGH_WATER_LIMIT:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def watch(self, left: Callable[[], None]) -> Callable[[], None]:
        """Have this called when the connection is lost, at once where it is; returns what ends the watch."""
        if self._lost:
            left()
        self._left = left
        self.flow.resume_reading()  # who does not read, as after much of a body, does not hear of a leave
        return self._unwatch

    def _unwatch(self) -> None:
        self._left = None

    def send_400_response(self, msg: str) -> None:
        """The parser's refusal, as a problem."""
        self._refuse(self._refusal() or NotHttp(msg))

    def _refusal(self) -> ServiceError | None:
        """Why the parser refused; None where it is just no HTTP."""
        return None

    def _look(self) -> None:
        """Let go what stands still."""
        now = self.loop.time()
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._stuck(now):
            self.transport.abort()
            return
        left_s = self.limits.head_timeout_s
        if self._head_since is not None and not answering:
            left_s = self._head_since + self.limits.head_timeout_s - now
        if left_s <= 0 and not self.transport.is_closing():
            self._refuse(HeadTimeout(f"it has to arrive within {self.limits.head_timeout_s:g} s"))
        self._again = self.loop.call_later(left_s if left_s > 0 else self.limits.head_timeout_s, self._look)

    def _stuck(self, now: float) -> bool:
        """Whether nothing of an answer has been taken for too long."""
        held = self.transport.get_write_buffer_size()
        taken = self.transport.sent_bytes - held
        if held == 0 or taken != self._taken:
            self._taken, self._taken_at = taken, now
        return held > 0 and now - self._taken_at >= self.limits.taken_timeout_s

    def _refuse(self, error: ServiceError) -> None:
        """Say so, where nothing else is being said, and close."""
        if self._heard and self._may_answer():
            body = orjson.dumps({**error.as_problem(), "request_id": None})
            start = b"HTTP/1.1 %d %s\r\nconnection: close\r\n" % (error.status, PHRASES[error.status])
            about = b"content-type: %s\r\ncontent-length: %d\r\n\r\n" % (PROBLEM_JSON.encode(), len(body))
            self.transport.write(start + about + body)
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether an answer sent now would be taken for one to what is refused."""
        cycle = self.cycle
        if cycle is None:
            return True
        return not cycle.more_body if cycle.response_complete else not cycle.response_started


class BoundedH11(Bounded, H11Protocol):
    """h11 has the bytes of what is not whole within limits itself (`h11_max_incomplete_event_size`)."""

    def data_received(self, data: bytes) -> None:
        """Parse it, unless it is a head that came at once and is too large all the same."""
        kept = self.conn.trailing_data[0]
        if self.conn.their_state is h11.IDLE and len(kept) + len(data) > self.limits.head_bytes:
            self._heard = True
            if (kept + data).find(b"\r\n\r\n") > self.limits.head_bytes:
                self._refuse(_too_large(self.limits))
                return
        super().data_received(data)

    def handle_events(self) -> None:
        """Take what the parser made of it: a request, of which the app runs later, in a task."""
        super().handle_events()
        if self.cycle is not None:
            self.cycle.scope[CALLER] = self

    def _refusal(self) -> ServiceError | None:
        too_large = len(self.conn.trailing_data[0]) > self.limits.head_bytes
        return _too_large(self.limits) if too_large else None


if HttpToolsProtocol is None:
    HttpProtocol: type[Bounded] = BoundedH11
else:

    class BoundedHttpTools(Bounded, HttpToolsProtocol):
        """httptools keeps whatever comes until a head, a part of a body or a request is whole."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            """It keeps nothing yet."""
            super().connection_made(transport)
            self._kept_bytes = 0
            self._found: ServiceError | None = None

        def connection_lost(self, exc: Exception | None) -> None:
            """Requests that were sent ahead are answered no more."""
            super().connection_lost(exc)
            self.pipeline.clear()

        def data_received(self, data: bytes) -> None:
            """Parse it, unless too much is kept already."""
            self._kept_bytes += len(data)
            super().data_received(data)
            if self._kept_bytes > self.limits.head_bytes and not self.transport.is_closing():
                self._refuse(_too_large(self.limits))

        def on_headers_complete(self) -> None:
            """A head is whole; what is raised here makes the parser refuse it.

            Raises:
                HeadTooLarge: It came at once, and is too large all the same.
                NotHttp: Too many requests were sent ahead of their answers.
            """
            if self._kept_bytes > self.limits.head_bytes and self._head_bytes() > self.limits.head_bytes:
                self._found = _too_large(self.limits)
                raise self._found
            if len(self.pipeline) >= REQUESTS_AHEAD:
                self._found = NotHttp(f"at most {REQUESTS_AHEAD} requests may be sent ahead of their answers")
                raise self._found
            self._kept_bytes = 0
            super().on_headers_complete()
            self.cycle.scope[CALLER] = self  # its app runs later, in a task

        def on_body(self, body: bytes) -> None:
            """A part of a body is handed on."""
            self._kept_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            """A request is whole."""
            self._kept_bytes = 0
            super().on_message_complete()

        def _refusal(self) -> ServiceError | None:
            return self._found

        def _may_answer(self) -> bool:
            return not self.pipeline and super()._may_answer()

        def _head_bytes(self) -> int:
            return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    HttpProtocol = BoundedHttpTools


def protocol_of(limits: ConnectionLimits, parser: type[Bounded] = HttpProtocol) -> type[Bounded]:
    """The protocol of connections within these limits, as uvicorn takes one: a class."""
    return type(parser.__name__, (parser,), {"limits": limits})


def _too_large(limits: ConnectionLimits) -> HeadTooLarge:
    return HeadTooLarge(f"at most {limits.head_bytes} bytes of target and headers are taken")
