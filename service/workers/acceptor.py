"""Spreads connections evenly over the workers that listen on one socket.

Left to themselves, the worker that wakes first takes all connections of a client that opens many at once, and a
connection that is kept alive stays where it is. So each worker takes one at a time, and one that has more than
another steps back for a moment; one that has far more lets some of its callers connect anew.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from service.listening import listen

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

log = logging.getLogger(__name__)

STEP_BACK_S = 0.005  # an idle worker wakes in much less; a busy one should not be waited for
PAUSE_S = 1.0  # where the process has no file descriptor left
LOOKS_OF_PATIENCE = 5
ABSENT = -1
BYTES = 4


class Counts:
    """How many connections each worker has, in memory that all of them see."""

    def __init__(self, path: Path, places: int) -> None:
        """Opens the file; it is made where it is missing, with every worker absent.

        Args:
            path: The workers' own.
            places: How many workers there may be at once.
        """
        if not path.exists():
            path.write_bytes(ABSENT.to_bytes(BYTES, "little", signed=True) * places)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), BYTES * places)

    def put(self, place: int, count: int) -> None:
        """This worker has so many."""
        self._memory[BYTES * place : BYTES * (place + 1)] = count.to_bytes(BYTES, "little", signed=True)

    def remove(self, place: int) -> None:
        """This worker takes no connections."""
        self.put(place, ABSENT)

    def present(self) -> list[int]:
        """How many each worker has that takes connections."""
        found = memoryview(self._memory).cast("i")
        try:
            return [count for count in found if count != ABSENT]
        finally:
            found.release()


class Acceptor:
    """A worker's part of the connections."""

    def __init__(
        self,
        listeners: list[socket.socket],
        protocol: Callable[[], asyncio.Protocol],
        counts: Counts,
        place: int,
        *,
        connections: Callable[[], int],
    ) -> None:
        """Takes nothing yet.

        Args:
            listeners: Shared with the other workers.
            protocol: Makes what speaks on a new connection.
            counts: Of all workers.
            place: This worker's.
            connections: How many connections it has.
        """
        self._listeners = listeners
        self._protocol = protocol
        self._counts = counts
        self._place = place
        self._connections = connections
        self._opening: set[asyncio.Task[object]] = set()
        self._taking = False
        self._looks = 0  # one after another at which it had far more than its share

    def start(self) -> None:
        """Listen.

        Raises:
            CannotListen: Another service listens there.
        """
        listen(self._listeners)
        self._taking = True
        self.count()
        for listener in self._listeners:
            listener.setblocking(False)
            self._watch(listener)

    def stop(self) -> None:
        """Take no more; the listeners stay open."""
        self._taking = False
        self._counts.remove(self._place)
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def count(self) -> int:
        """How many connections this worker has; the others are told."""
        count = self._connections() + len(self._opening)
        if self._taking:
            self._counts.put(self._place, count)
        return count

    def lets_callers_go(self) -> bool:
        """Whether callers are to connect anew, as this worker has had far more than its share for a while.

        So it is after another died and came back. To be asked at every look, which are `LOOKS_OF_PATIENCE` to a while.
        """
        counts = self._counts.present()
        far_more = self._taking and self.count() > 1 + 1.5 * sum(counts) / max(1, len(counts))
        self._looks = self._looks + 1 if far_more else 0
        return self._looks > 0 and self._looks % LOOKS_OF_PATIENCE == 0

    def _watch(self, listener: socket.socket) -> None:
        if self._taking:
            asyncio.get_running_loop().add_reader(listener, self._ready, listener)

    def _ready(self, listener: socket.socket) -> None:
        if self.count() <= min(self._counts.present()):
            self._take(listener)
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(STEP_BACK_S, self._take_what_is_left, listener)

    def _take_what_is_left(self, listener: socket.socket) -> None:
        if self._taking:
            self._watch(listener)
            self._take(listener)

    def _take(self, listener: socket.socket) -> None:
        """One connection, where another worker has not taken it."""
        loop = asyncio.get_running_loop()
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("No connection can be taken: %s", error.strerror)  # noqa: TRY400 - no fault of the code's
            loop.remove_reader(listener)
            loop.call_later(PAUSE_S, self._watch, listener)
            return
        connection.setblocking(False)
        opening = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opened)
        self.count()

    def _opened(self, opening: asyncio.Task[object]) -> None:
        self._opening.discard(opening)
        self.count()
        if not opening.cancelled() and opening.exception() is not None:
            log.info("A connection ended at once: %s", opening.exception())
