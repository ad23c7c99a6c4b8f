"""Routes that read their requests themselves are called without the framework's layers.

Matching a path against every route, solving a route's dependencies, which are none, and a context for what these would
have left open cost more than a small request's own work. FastAPI documents these routes all the same, and has the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ExceptionHandler = Callable[[Request, Exception], Awaitable[Response]]


class DirectRoutes:
    """Calls the endpoints of those routes that take the request and nothing else; passes all other requests on.

    Args:
        app: Where these go.
        routes: Of the API.
        handlers: What answers the errors that an endpoint raises, by their class.
    """

    def __init__(
        self, app: ASGIApp, routes: Iterable[BaseRoute], handlers: Mapping[type[Exception], ExceptionHandler]
    ) -> None:
        self._app = app
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, APIRoute) and _takes_the_request_alone(route)
            for method in route.methods or ()
        }
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on; HEAD as GET (RFC 9110, section 9.3.2), whose body the server leaves out."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            asked = {**scope, "method": "GET"}

            async def answer(message: Message) -> None:
                scope["route"] = asked.get("route")  # for those around, who count by it
                await send(message)

            await self(asked, receive, answer)
            return
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            response: Response = await route.endpoint(request)
            await response(scope, receive, send)
        except tuple(self._handlers) as error:
            handler = next(handler for kind, handler in self._handlers.items() if isinstance(error, kind))
            await (await handler(request, error))(scope, receive, send)


def _takes_the_request_alone(route: APIRoute) -> bool:
    """Whether FastAPI would have nothing to find for the endpoint."""
    asked = route.dependant
    found = (asked.path_params, asked.query_params, asked.header_params, asked.cookie_params, asked.body_params)
    return asked.request_param_name == "request" and not any(found) and not asked.dependencies
