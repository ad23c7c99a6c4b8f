"""Serves until told to stop, alone or by several workers: says where it is, and in one line why it does not start."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from typing import TYPE_CHECKING

from service.app import create_app
from service.listening import CannotListen, bind, listen
from service.server import Server, greet
from service.telemetry.logs import begin_logging
from service.workers.supervisor import supervise

if TYPE_CHECKING:
    from service.settings import Settings

log = logging.getLogger(__name__)


def serve(settings: Settings) -> str | None:
    """Serve until told to stop.

    Returns:
        Why the service refused to start; None after it served.
    """
    begin_logging(settings.log_level, settings.log_format, processes=settings.workers > 1)
    if settings.workers > 1:
        return supervise(settings)
    signal.signal(signal.SIGHUP, _stay)
    try:
        listeners = bind(settings.host, settings.port)
    except CannotListen as error:
        return str(error)
    try:
        return GreetingServer(create_app(settings), settings).serve_until_told(listeners)
    finally:
        for listener in listeners:
            listener.close()


class GreetingServer(Server):
    """A server that says where it is."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen once the app can answer, then say where."""
        await super().startup(sockets=[])
        if not self.started:
            return
        listeners, loop = sockets or [], asyncio.get_running_loop()
        try:
            listen(listeners)
        except CannotListen as error:
            await self.refuse(error)
        for listener in listeners:
            self.servers.append(await loop.create_server(self.protocol, sock=listener, backlog=self.config.backlog))
        greet(self.settings, listeners[0].getsockname()[1])


def _stay(*_: object) -> None:
    """SIGHUP renews the workers of a service that has several; alone there is none to serve meanwhile."""
    log.warning("SIGHUP: nothing is renewed, as this service has one worker; see --workers")
