"""Rows of bulk are read and written off the event loop, on one thread.

Nearly all of that work holds the interpreter, so several threads are no sooner through with it: they take the
interpreter from each other and from the loop, and each handing over wakes somebody. Four requests at a time of 512
embeddings in base64, dry runs, go up to a sixth faster on one thread than on several, and nothing was slower, on two
cores. What small requests are read by is not in its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class RowThread:
    """The thread of one app: begins with the first work, ends with the context."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bulk-rows")

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """What has begun is done; nobody waits for the rest any more."""
        self._thread.shutdown(cancel_futures=True)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the work returns or raises, once its turn has come, as by `asyncio.to_thread`."""
        called = partial(copy_context().run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, called)
