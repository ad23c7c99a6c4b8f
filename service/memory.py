"""Memory that is given back to the system while the service runs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc


async def give_back(*, of_the_start: bool) -> None:
    """Free what is no longer reachable, such as a model, whose modules hold each other; the search for it is rare else.

    Args:
        of_the_start: Search what was there at start too, which a server leaves out of all searches (`service.server`):
            this takes about half a second, in which no request gets on; without it 40 ms.
    """
    frozen = of_the_start and gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of glibc alone
        await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)  # free pieces between others, two thirds of a model
