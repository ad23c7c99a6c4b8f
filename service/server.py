"""The app behind a socket: what a service alone and each of several workers have in common."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from service.http.protocol import ConnectionLimits, protocol_of
from service.listening import BACKLOG
from service.telemetry.logs import MEMBERS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.errors import SemidError
    from service.settings import Settings
    from service.state import State

log = logging.getLogger(__name__)


def protocol_for(settings: Settings) -> type[asyncio.Protocol]:
    """What speaks HTTP with a caller, within the settings' limits."""
    limits = ConnectionLimits(settings.max_head_bytes, settings.head_timeout_s, settings.stream_timeout_s)
    return protocol_of(limits)


NEW_OBJECTS = 10_000  # between two searches for garbage among them: of some hundred requests


class Server(uvicorn.Server):
    """A uvicorn server with our settings."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=protocol_for(settings),
            h11_max_incomplete_event_size=settings.max_head_bytes,
            ws="none",  # there are no routes for them
            backlog=BACKLOG,
            log_level=settings.log_level,
            access_log=False,
            log_config=None,  # uvicorn's lines are written as all others
            server_header=False,
            timeout_graceful_shutdown=settings.drain_s,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. What was loaded until now stays: to search all of it for garbage takes a quarter of a second.

        What comes after is searched seldom, as hardly any of it is garbage that lies in a circle.
        """
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])

    @property
    def refusal(self) -> str | None:
        """Why the app refused to start; None where it did not."""
        refusal: str | None = getattr(self.app.state, "refusal", None)
        return refusal

    def serve_until_told(self, sockets: list[socket.socket]) -> str | None:
        """Serve, then drain.

        Args:
            sockets: Bound, to be listened on.

        Returns:
            Why the app refused to start; None after it served.
        """
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, _end)
        logging.getLogger("uvicorn.error").addFilter(self._is_news)
        try:
            self.run(sockets)
        except SystemExit:  # how uvicorn says that start-up failed, and how a drained service ends
            if self.refusal is None:
                raise
        return self.refusal

    def protocol(self) -> asyncio.Protocol:
        """As uvicorn makes it for a socket of its own."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )
        return protocol

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain."""
        self.begin_drain()
        await super().shutdown(sockets)

    def begin_drain(self) -> None:
        """Let streams, which may be of any length, end in time."""
        state: State | None = getattr(self.app.state, "semid", None)
        if state is not None:
            state.terms.drain.begin(self.config.timeout_graceful_shutdown or 0)

    async def refuse(self, error: SemidError) -> NoReturn:
        """Do not start after all.

        Raises:
            SystemExit: As uvicorn does where start-up fails.
        """
        self.app.state.refusal = str(error)
        await self.lifespan.shutdown()
        raise SystemExit(1)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether the log has to have a line; a refusal is told by whoever started the server."""
        return self.refusal is None or not ("Traceback" in str(record.msg) or "startup failed" in str(record.msg))


def greet(settings: Settings, port: int) -> None:
    """Say where the service is: to a person, or in a line of the log where that is for programs."""
    base = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
    if settings.log_format == "json":
        log.info("semid is ready at %s", base, extra={MEMBERS: {"address": base}})
    else:
        print(_greeting(base), flush=True)  # noqa: T201 - for a person


def _greeting(base: str) -> str:
    """Where the service is, and a first request."""
    body = '{"items": [{"item_id": "kettle-1", "text": "Cordless electric kettle, stainless steel, 1.7 l"}]}'
    return (
        "\nsemid is ready.\n"
        f"  page   {base}/\n"
        f"  docs   {base}/docs\n"
        f"  first  curl -s {base}/tokenize -H 'content-type: application/json' \\\n"
        f"           -d '{body}'\n"
    )


def _end(*_: object) -> None:
    """End with 0. uvicorn takes the signal and drains, then puts this handler back and raises the signal again."""
    raise SystemExit(0)
