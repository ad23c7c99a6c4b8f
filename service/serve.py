"""Serves until told to stop, alone or by several workers: says where it is, and in one line why it does not start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.app import create_app
from service.server import Server, begin_logging, greeting
from service.workers.supervisor import supervise

if TYPE_CHECKING:
    import socket

    from service.settings import Settings


def serve(settings: Settings) -> str | None:
    """Serve until told to stop.

    Returns:
        Why the service refused to start; None after it served.
    """
    begin_logging(settings)
    if settings.workers > 1:
        return supervise(settings)
    return GreetingServer(create_app(settings), settings).serve_until_told()


class GreetingServer(Server):
    """A server that says where it is."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say where."""
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(greeting(self.config.host, port), flush=True)  # noqa: T201 - for a person
