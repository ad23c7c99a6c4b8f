"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from service.client.errors import ClientClosed

T = TypeVar("T")


class Background:
    """Runs coroutines in one thread, from the first of them until it is closed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin it.

        Raises:
            ClientClosed: The thread has ended.
        """
        with self._starting:
            if self._closed:
                work.close()
                raise ClientClosed("the client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="semid-client", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(_looked_at(work), self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; a caller who is interrupted ends it."""
        return self.result(self.start(work))

    def result(self, future: Future[T]) -> T:
        """What `start` began; a caller who is interrupted ends it."""
        try:
            return future.result()
        finally:
            future.cancel()

    def iterate(self, generator: AsyncGenerator[T]) -> Iterator[T]:
        """What an asynchronous generator yields; it is closed with this one."""
        try:
            while True:
                try:
                    value = self.run(anext(generator))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self.run(generator.aclose())

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run a last coroutine, and end the thread; at once where it was closed."""
        with self._starting:
            loop, thread, closed, self._closed = self._loop, self._thread, self._closed, True
        if closed or loop is None or thread is None:
            last.close()
            return
        asyncio.run_coroutine_threadsafe(last, loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _looked_at(work: Coroutine[Any, Any, T]) -> T:
    """The same; how it ends is no news where the caller has left meanwhile."""
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return await work
