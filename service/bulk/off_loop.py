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
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_THREAD = ThreadPoolExecutor(1, thread_name_prefix="bulk-rows")


async def off_loop(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the work returns or raises, as by `asyncio.to_thread`."""
    called = partial(copy_context().run, work, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, called)
