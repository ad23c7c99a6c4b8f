"""One of several processes behind one socket: its own model and registry connections, watched by `supervisor`.

The two speak over a pipe:
    worker      Ready(...) or Refused(...), once; then the echo of each PING
    supervisor  PING, LEAVE: take no more connections, let those that there are come to their end; its end is the end
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from email.utils import formatdate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI

from service.app import create_app
from service.errors import EncoderStopped
from service.listening import CannotListen
from service.metrics import shared_metrics
from service.server import Server
from service.settings import Settings
from service.state import State
from service.telemetry.logs import begin_logging
from service.workers.acceptor import Acceptor, Counts

log = logging.getLogger(__name__)

PING = "ping"
LEAVE = "leave"
TICKS_PER_LOOK = 10  # of a tenth of a second
KEEP_ALIVE_MARGIN_S = 1.0
PLACES_PER_WORKER = 4  # while some are renewed, others may have died
CONNECTION_CLOSE = (b"connection", b"close")


class Ready(NamedTuple):
    """A worker serves.

    Attributes:
        tokenizers: The full names of those that its settings name.
    """

    tokenizers: tuple[str, ...]


class Refused(NamedTuple):
    """A worker does not start.

    Attributes:
        reason: In words.
    """

    reason: str


class Post(NamedTuple):
    """What a worker is given.

    Attributes:
        settings: The service's; the registry's URL is always there.
        place: A small number that no other running worker has.
        directory: Of all workers, where they count.
    """

    settings: Settings
    place: int
    directory: Path

    def counts(self) -> Counts:
        """How many connections each worker has."""
        return Counts(self.directory / "connections", PLACES_PER_WORKER * self.settings.workers)


def work(post: Post, listeners: list[socket.socket], channel: Connection) -> None:
    """Serve until told to leave or to end, or until the supervisor is gone; a process of its own runs this."""
    os.setsid()  # Ctrl-C is for the supervisor, which lets the requests under way be answered
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as is the request to renew the workers
    begin_logging(post.settings.log_level, post.settings.log_format, processes=True)
    app = create_app(post.settings, shared_metrics(post.directory, post.place))
    server = WorkerServer(app, post, channel)
    refusal = server.serve_until_told(listeners)
    if refusal is not None:
        channel.send(Refused(refusal))
        sys.exit(1)


class WorkerServer(Server):
    """A server that reports, leaves without losing a request, and ends when its model or its supervisor has ended."""

    def __init__(self, app: FastAPI, post: Post, channel: Connection) -> None:
        super().__init__(app, post.settings)
        self._post = post
        self._channel = channel
        self._leaving = False
        self._acceptor: Acceptor | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take a share of the connections, and report."""
        await super().startup(sockets=[])
        if not self.started:
            return
        self._acceptor = Acceptor(
            sockets or [],
            self.protocol,
            self._post.counts(),
            self._post.place,
            connections=lambda: len(self.server_state.connections),
        )
        try:
            self._acceptor.start()
        except CannotListen as error:
            await self.refuse(error)
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)
        self._tell(Ready(self._state.swap.settings))

    @property
    def _state(self) -> State:
        state: State = self.app.state.semid
        return state

    def _hear(self) -> None:
        try:
            word = self._channel.recv()
        except (EOFError, OSError):
            log.warning("The supervisor is gone: this worker drains and ends")
            self._hang_up()
            self.should_exit = True
            return
        if word == PING:
            self._tell(PING)
        elif word == LEAVE:
            self._leaving = self.should_exit = True

    def _tell(self, word: object) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone: heard in a moment
            self._channel.send(word)

    def _hang_up(self) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.fileno())

    async def on_tick(self, counter: int) -> bool:
        """Look now and then whether the models run: a worker without one is of no use, and another takes its place."""
        told = await super().on_tick(counter)
        if self._acceptor is None:
            return told
        self._acceptor.count()
        if counter % TICKS_PER_LOOK == 0:  # as often as uvicorn makes these headers
            if self._acceptor.lets_callers_go():
                self.server_state.default_headers.append(CONNECTION_CLOSE)
            try:
                self._state.check_alive()
            except EncoderStopped as error:
                log.error("This worker ends: %s", error.detail)  # noqa: TRY400 - the model's thread had the traceback
                return True
        return told

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; a worker that leaves while others stay lets its callers go first."""
        if self._acceptor is not None:
            self._acceptor.stop()
        self.begin_drain()
        if self._leaving:
            await self._let_callers_go()
        await super().shutdown(sockets)

    async def _let_callers_go(self) -> None:
        """Returns when all connections have gone, or have been idle for as long as is allowed.

        A connection closed while idle may cross a request on its way, which is then lost. So each is told by its next
        answer that it ends (RFC 9112, section 9.6), and the idle ones end by their own time limit, as ever.
        """
        date = (b"date", formatdate(time.time(), usegmt=True).encode())
        self.server_state.default_headers = [date, *self.config.encoded_headers, CONNECTION_CLOSE]
        deadline = time.monotonic() + self.config.timeout_keep_alive + KEEP_ALIVE_MARGIN_S
        while self.server_state.connections and not self.force_exit and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
