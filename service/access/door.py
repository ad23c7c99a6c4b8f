"""Asks every request for a key of the scope that it needs, before anything of its body is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from service.access.keys import Keys, Scope
from service.errors import Forbidden, ServiceError, Unauthorized
from service.telemetry.serving import KEY_NAME

# Without a key: whether the service is well, and pages that say nothing of any catalogue.
OPEN = frozenset({"/", "/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
OPEN_BELOW = ("/explorer/", "/static-offline-docs/")
READING_POSTS = frozenset({"/lookup", "/assignments", "/next", "/explain"})
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def scope_of(method: str, path: str) -> Scope | None:
    """What a request needs; None: nothing. What is not known to read alone takes more than a reader's key."""
    if path in OPEN or path.startswith(OPEN_BELOW):
        return None
    if path.startswith("/admin/"):
        return Scope.ADMIN
    return Scope.READ if method in READING_METHODS or path in READING_POSTS else Scope.TOKENIZE


class Door:
    """Lets requests in that bring a key (`Authorization: Bearer`) of their scope.

    Args:
        app: Behind it.
        keys: The keys in force; None: there are none to be had, as the service has not started.
        answer: What answers a request that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Callable[[], Keys],
        answer: Callable[[Request, ServiceError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._keys = keys
        self._answer = answer

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Let in, or answer why not."""
        needed = scope_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if needed is not None:
            request = Request(scope)
            try:
                self._check(request, needed)
            except ServiceError as error:
                await (await self._answer(request, error))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request, needed: Scope) -> None:
        """Let in; whose key it is, is left for the log.

        Raises:
            Unauthorized: It brings no key that is known.
            Forbidden: Its key is for less.
        """
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            msg = f"send a key of the scope {needed.value!r} as `Authorization: Bearer ...`"
            raise Unauthorized(msg)
        key = self._keys().holder(secret.strip())
        if key is None:
            raise Unauthorized("the key is not known, or has expired")
        request.scope[KEY_NAME] = key.name
        if not key.scope.includes(needed):
            msg = f"the key {key.name!r} has the scope {key.scope.value!r}; this needs {needed.value!r}"
            raise Forbidden(msg)
