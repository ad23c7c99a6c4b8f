"""Around every request: its id, its count, its durations in the answer, its line in the log.

Pure ASGI: BaseHTTPMiddleware would hide that a caller has left.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping
from itertools import count
from typing import Any, Final
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics
from service.telemetry.logs import MEMBERS
from service.telemetry.serving import KEY_NAME, NO_ROUTE, SERVING, Serving
from service.telemetry.tracing import Tracing

log = logging.getLogger("service.access")

REQUEST_ID: Final = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9_.:+/=@-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestTelemetry:
    """Gives each request an id, counts and times it by its route, and tells of it where that is asked for.

    Args:
        app: What answers.
        metrics: Where it is counted.
        tracing: Where its spans go; None: there are none.
        access_log: Whether the log has a line for each request.
        log_paths: Whether that line has the path, which may hold an item id.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        tracing: Tracing | None = None,
        access_log: bool = False,
        log_paths: bool = False,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._access_log = access_log
        self._log_paths = log_paths
        self._prefix = secrets.token_hex(6)
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and watch for its status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        started = time.perf_counter()
        serving = Serving(_callers_id(scope) or f"{self._prefix}-{next(self._numbers):x}")
        # Never taken back: what uvicorn logs of a request that failed comes after, in the same task.
        SERVING.set(serving)
        spans = None if self._tracing is None else self._tracing.request(serving.request_id)
        serving.spans = spans

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (REQUEST_ID, serving.request_id.encode())]
                if serving.seconds:
                    headers.append((b"server-timing", serving.server_timing().encode()))
                message["headers"] = headers
                if spans is not None:
                    spans.answered(*_labels(scope))
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            elapsed = time.perf_counter() - started
            method, route = _labels(scope)
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(route).observe(elapsed)
            if self._access_log:
                answered = {"method": method, "route": route, "status": status, "duration_ms": _ms(elapsed)}
                self._tell(scope, serving, answered)

    def _tell(self, scope: Scope, serving: Serving, answered: Mapping[str, Any]) -> None:
        members: dict[str, Any] = {
            **answered,
            **{f"{part}_ms": _ms(seconds) for part, seconds in serving.seconds.items()},
        }
        if KEY_NAME in scope:
            members["key"] = scope[KEY_NAME]
        if scope.get("client"):
            members["client"] = scope["client"][0]
        if self._log_paths:
            members["path"] = quote(scope["path"])
        line = " ".join([f"{name}={value}" for name, value in members.items()])
        log.info("%s", line, extra={MEMBERS: members})


def _labels(scope: Scope) -> tuple[str, str]:
    """The method and the route: its own path, not the caller's, so that there are few whatever is asked for."""
    route = getattr(scope.get("route"), "path_format", NO_ROUTE)
    return scope["method"] if route != NO_ROUTE and scope["method"] in _METHODS else "other", route


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _callers_id(scope: Scope) -> str | None:
    """What the caller calls the request; None where it says nothing, or nothing that a log should hold."""
    for name, value in scope["headers"]:
        if name == REQUEST_ID:
            return value.decode() if _SANE.fullmatch(value) else None
    return None
