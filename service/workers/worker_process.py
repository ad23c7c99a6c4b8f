"""A worker as its supervisor sees it: begun, heard, told, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import time
from typing import TYPE_CHECKING, Any

from service.workers.worker import LEAVE, PING, Post, Ready, Refused, work

if TYPE_CHECKING:
    import socket
    from multiprocessing.context import BaseContext

log = logging.getLogger(__name__)

PING_INTERVAL_S = 5.0
SILENCE_S = 30.0
REAP_S = 5.0


class WorkerProcess:
    """One process.

    Attributes:
        place: A small number that no other running worker has.
        serving: Whether it said that it serves.
        leaving: Whether it was told to end.
        refusal: Why it did not start, or may not stay.
        tokenizers: The full names of those that its settings name.
        ended: Set when its end of the pipe is closed, as the system does however it dies.
    """

    def __init__(self, post: Post) -> None:
        """Nothing is started yet."""
        self.place = post.place
        self.serving = False
        self.leaving = False
        self.refusal: str | None = None
        self.tokenizers: tuple[str, ...] = ()
        self.ended = asyncio.Event()
        self._post = post
        self._channel, self._theirs = multiprocessing.Pipe()
        self._process: Any = None
        self._begun: asyncio.Future[None] | None = None
        self._decided = asyncio.Event()
        self._answered = True
        self._asked_at = 0.0
        self._watching: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid if self._process is not None else None

    async def start(self, context: BaseContext, listeners: list[socket.socket]) -> None:
        """Returns when it serves, or has ended; `refusal` says why."""
        self._process = context.Process(  # type: ignore[attr-defined]
            target=work, args=(self._post, listeners, self._theirs), name=f"semid worker {self.place}"
        )
        # In a thread, as the first waits for the fork server, and whole whatever becomes of the caller.
        self._begun = asyncio.ensure_future(asyncio.to_thread(self._process.start))
        try:
            await asyncio.shield(self._begun)
        except (OSError, EOFError) as error:
            self.refusal = f"no process can be started: {error}"
            self.ended.set()
            return
        finally:
            if self._begun.done():
                self._theirs.close()
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)
        await self._decided.wait()

    def leave(self) -> None:
        """Tell it to take no more connections, and to end when those that there are have come to their end."""
        self.leaving = True
        self._tell(LEAVE)

    def terminate(self) -> None:
        """Tell it to drain and end."""
        self.leaving = True
        if self.pid is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        self.leaving = True
        if self.pid is not None:
            self._process.kill()

    async def end_within(self, allowed_s: float) -> None:
        """Returns when it has ended; it is killed after that time."""
        if self._begun is not None:
            await asyncio.wait([self._begun])
        if self.pid is None:
            return
        if self._theirs.closed:  # else nobody hears it yet
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), allowed_s)
        if not self.ended.is_set():
            if self.serving:
                log.warning("Worker %s did not end in time: killed", self.pid)
            self._process.kill()
        await self.exit_status()

    async def exit_status(self) -> str:
        """How its process ended, for people; it is waited for, and killed if it only closed the pipe."""
        await asyncio.to_thread(self._process.join, REAP_S)
        if self._process.exitcode is None:
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        code = self._process.exitcode
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name

    def _tell(self, word: str) -> None:
        with contextlib.suppress(OSError):  # it has just ended: heard in a moment
            self._channel.send(word)

    def _hear(self) -> None:
        try:
            word = self._channel.recv()
        except (EOFError, OSError):
            self._hang_up()
            return
        if isinstance(word, Ready):
            self.serving = True
            self.tokenizers = word.tokenizers
            self._decided.set()
            self._watching = asyncio.create_task(self._watch())
        elif isinstance(word, Refused):
            self.refusal = word.reason
            self._decided.set()
        elif word == PING:
            self._answered = True

    def _hang_up(self) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._channel.close()
        if self._watching is not None:
            self._watching.cancel()
        if not self._decided.is_set():
            self.refusal = "a worker ended before it served; the log may say why"
        self._decided.set()
        self.ended.set()

    async def _watch(self) -> None:
        """Kills it when it no longer answers: its callers are answered by another sooner than by this one."""
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            if self._answered:
                self._answered, self._asked_at = False, time.monotonic()
                self._tell(PING)
            elif time.monotonic() - self._asked_at > SILENCE_S:
                log.error("Worker %s has said nothing for %.0f s: killed", self.pid, SILENCE_S)
                self._process.kill()
                return
