"""Runs the app: says where it is once it listens, and in one line why it does not start."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING

import uvicorn

from service.app import create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.settings import Settings


def serve(settings: Settings) -> str | None:
    """Serve until told to stop.

    Returns:
        Why the service refused to start; None after it served.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("sentence_transformers", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    app = create_app(settings)
    server = Server(app, settings)
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _end)
    logging.getLogger("uvicorn.error").addFilter(lambda record: not (_refusal(app) and "Traceback" in str(record.msg)))
    try:
        server.run()
    except SystemExit:  # how uvicorn says that start-up failed, and how a drained service ends
        if _refusal(app) is None:
            raise
    return _refusal(app)


class Server(uvicorn.Server):
    """A uvicorn server that greets."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._host = settings.host
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain_s,
        )
        super().__init__(config)

    async def startup(self, *arguments: object, **options: object) -> None:
        """Listen, then say where."""
        await super().startup(*arguments, **options)  # type: ignore[arg-type]
        if self.started:
            print(_greeting(self._host, self.servers[0].sockets[0].getsockname()[1]), flush=True)  # noqa: T201 - for a person


def _end(*_: object) -> None:
    """End with 0. uvicorn takes the signal and drains, then puts this handler back and raises the signal again."""
    raise SystemExit(0)


def _refusal(app: FastAPI) -> str | None:
    refusal: str | None = getattr(app.state, "refusal", None)
    return refusal


def _greeting(host: str, port: int) -> str:
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    body = '{"items": [{"item_id": "kettle-1", "text": "Cordless electric kettle, stainless steel, 1.7 l"}]}'
    return (
        "\nsemid is ready.\n"
        f"  page   {base}/\n"
        f"  docs   {base}/docs\n"
        f"  first  curl -s {base}/tokenize -H 'content-type: application/json' \\\n"
        f"           -d '{body}'\n"
    )
