"""Several workers behind one socket: started, watched, replaced when they die, renewed one after another, drained.

semid serve --workers N
    supervisor      owns the socket and the embedded registry; loads no model
      fork server   where the models run on the CPU: has imported what workers need, so that they share its memory
        worker      see `worker`

SIGTERM, SIGINT     all workers drain; the embedded registry ends last. A second SIGINT does not wait
SIGHUP              a new worker for each, one at a time; the old one leaves when the new one serves
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models import CheckpointError, read_manifest
from service.app import open_records, plan_of
from service.errors import SemidError
from service.listening import bind
from service.metrics import forget_gauges
from service.registry.embedded import EmbeddedValkey
from service.server import greet
from service.workers.worker import Post
from service.workers.worker_process import WorkerProcess

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine
    from multiprocessing.context import BaseContext
    from typing import Any

    from service.settings import Settings

log = logging.getLogger(__name__)

END_MARGIN_S = 15.0  # beyond the time to drain: closing what is open
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 10.0
STEADY_S = 60.0  # a worker that lived as long did not die of its start


def supervise(settings: Settings) -> str | None:
    """Serve by several workers until told to stop.

    Returns:
        Why the service refused to start; None after it served.
    """
    return asyncio.run(_supervise(settings))


async def _supervise(settings: Settings) -> str | None:
    told = Told()
    try:
        async with AsyncExitStack() as stack:
            listeners = bind(settings.host, settings.port)
            for listener in listeners:
                stack.callback(listener.close)
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="semid-workers-"))
            if settings.redis_url is None:
                embedded = EmbeddedValkey(settings.data_dir)
                stack.push_async_callback(embedded.stop)
                await embedded.start()
                settings = settings.model_copy(update={"redis_url": embedded.url})
            if await told.before(_examine(settings)):
                return None
            return await Supervisor(settings, listeners, Path(directory), told).run()
    except (CheckpointError, SemidError) as error:
        return str(error)


async def _examine(settings: Settings) -> None:
    """Whatever would be refused and needs no model to be found out: once, not by each worker."""
    async with AsyncExitStack() as stack:
        manifests, _, _ = await open_records(settings, stack)
        plan_of(settings, manifests).begin()


class Told:
    """What the process was told by signals.

    Attributes:
        stop: To end.
        hurry: To end at once.
        renew: To renew the workers.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.renew = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGHUP, self.renew.set)

    def _interrupt(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    async def before(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether the end was told before this work was done; it is given up then.

        Raises:
            Exception: The work's own.
        """
        working, stopping = asyncio.create_task(work), asyncio.create_task(self.stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in (working, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return self.stop.is_set()


class Supervisor:
    """The workers of one service."""

    def __init__(self, settings: Settings, listeners: list[socket.socket], directory: Path, told: Told) -> None:
        """No worker is started yet.

        Args:
            settings: With the URL of a registry that runs.
            listeners: Bound; the workers listen.
            directory: In which the workers count.
            told: What the process is told.
        """
        self._settings = settings
        self._listeners = listeners
        self._directory = directory
        self._told = told
        self._context = _context(settings)
        self._counts = Post(settings, 0, directory).counts()
        self._workers: set[WorkerProcess] = set()
        self._keepers: set[asyncio.Task[None]] = set()
        self._tokenizers: tuple[str, ...] = ()
        self._failure: str | None = None

    async def run(self) -> str | None:
        """Serve until told to stop; why not, where the first workers do not start, or are no longer watched."""
        try:
            refusals = asyncio.create_task(self._first_refusal())
            stopping = asyncio.create_task(self._told.stop.wait())
            await asyncio.wait([refusals, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not refusals.done():
                refusals.cancel()
                return None
            if refusal := refusals.result():
                return refusal
            greet(self._settings, self._listeners[0].getsockname()[1])
            renewing = asyncio.create_task(self._renew_when_told())
            renewing.add_done_callback(self._kept)
            await stopping
            renewing.cancel()
            return self._failure
        finally:
            await self._stop()

    async def _first_refusal(self) -> str | None:
        """Starts all workers at once; None when they serve, the first refusal as soon as there is one."""
        starting = [asyncio.create_task(self._begin()) for _ in range(self._settings.workers)]
        try:
            for one in asyncio.as_completed(starting):
                worker = await one
                if worker.refusal is not None:
                    return worker.refusal
        finally:
            for task in starting:
                task.cancel()
        for worker in self._workers:
            self._keep(worker)
        return None

    async def _begin(self) -> WorkerProcess:
        """A new worker, once it serves or has refused."""
        taken = {worker.place for worker in self._workers}
        place = next(place for place in count() if place not in taken)
        self._clear(place)
        worker = WorkerProcess(Post(self._settings, place, self._directory))
        self._workers.add(worker)
        try:
            await worker.start(self._context, self._listeners)
        except OSError:
            self._workers.discard(worker)
            raise
        self._tokenizers = self._tokenizers or worker.tokenizers
        if worker.refusal is None and worker.tokenizers != self._tokenizers:
            worker.refusal = (
                f"its settings name {', '.join(worker.tokenizers)}, those of the others {', '.join(self._tokenizers)}: "
                "another checkpoint needs another start of the service"
            )
        if worker.refusal is not None:
            await self._end(worker)
        return worker

    def _keep(self, worker: WorkerProcess) -> None:
        keeper = asyncio.create_task(self._replace_whenever_it_dies(worker))
        self._keepers.add(keeper)
        keeper.add_done_callback(self._kept)

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """A keeper has ended; with a fault, nobody keeps its worker any longer, and a service that is not kept ends."""
        self._keepers.discard(keeper)
        if not keeper.cancelled() and (fault := keeper.exception()) is not None:
            log.critical("A worker is no longer watched: the service ends", exc_info=fault)
            self._failure = f"the supervisor failed: {fault!r}; the log has it"
            self._told.stop.set()

    async def _replace_whenever_it_dies(self, worker: WorkerProcess) -> None:
        delay_s = FIRST_DELAY_S
        while True:
            began = time.monotonic()
            await worker.ended.wait()
            if worker.leaving:
                return
            self._workers.discard(worker)
            self._clear(worker.place)
            why = worker.refusal or f"ended with {await worker.exit_status()}"
            if time.monotonic() - began > STEADY_S:
                delay_s = FIRST_DELAY_S
            log.error("Worker %s: %s. Another is started in %.1f s", worker.pid, why, delay_s)
            worker = await self._another(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            if worker.refusal is None:
                log.info("Worker %s serves", worker.pid)

    async def _another(self, delay_s: float) -> WorkerProcess:
        """A new worker after that time, or as soon as the system lets one be begun."""
        while True:
            await asyncio.sleep(delay_s)
            try:
                return await self._begin()
            except OSError as error:  # no file descriptor, no memory
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
                log.error("No worker can be begun: %s. Tried again in %.1f s", error, delay_s)  # noqa: TRY400

    async def _renew_when_told(self) -> None:
        while True:
            await self._told.renew.wait()
            self._told.renew.clear()
            log.info("The workers are renewed one after another")
            for old in sorted(self._workers, key=lambda worker: worker.place):
                if old.ended.is_set() or old.leaving:
                    continue  # it died meanwhile, and its successor is new
                try:
                    new = await self._begin()
                except OSError as error:
                    log.error("A new worker cannot be begun, the old ones stay: %s", error)  # noqa: TRY400
                    break
                if new.refusal is not None:
                    log.error("A new worker does not start, the old ones stay: %s", new.refusal)
                    break
                self._keep(new)
                old.leave()
                await self._end(old)
                log.info("Worker %s serves in the place of worker %s", new.pid, old.pid)

    async def _end(self, worker: WorkerProcess) -> None:
        """Returns when a worker that was told to end has ended; it is killed if it takes too long."""
        await worker.end_within(self._settings.drain_s + END_MARGIN_S if worker.serving else 0.0)
        self._workers.discard(worker)
        self._clear(worker.place)

    def _clear(self, place: int) -> None:
        """A worker that has ended has nothing any more."""
        forget_gauges(self._directory, place)
        self._counts.remove(place)

    async def _stop(self) -> None:
        """All workers drain at once."""
        for keeper in self._keepers:
            keeper.cancel()
        for listener in self._listeners:
            listener.close()
        for worker in self._workers:
            worker.terminate()
        hurrying = asyncio.create_task(self._hurry_when_told())
        await asyncio.gather(*map(self._end, list(self._workers)))
        hurrying.cancel()

    async def _hurry_when_told(self) -> None:
        await self._told.hurry.wait()
        for worker in list(self._workers):
            worker.kill()


def _context(settings: Settings) -> BaseContext:
    """How processes are begun.

    On the CPU they are forked from a server that has imported what takes seconds, and has one thread: they share the
    memory of it, and start at once. CUDA does not outlive a fork, nor does every library of other systems.
    """
    if sys.platform != "linux" or settings.device.startswith("cuda"):
        return multiprocessing.get_context("spawn")
    if settings.device == "auto" and torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    # Threads of numpy and of pyarrow, which begin with their import and which no fork takes along.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    context = multiprocessing.get_context("forkserver")
    takes_text = any("text_encoder" in read_manifest(path).components for path in settings.checkpoints)
    context.set_forkserver_preload(["service.workers.worker", *(["sentence_transformers"] if takes_text else [])])
    return context
