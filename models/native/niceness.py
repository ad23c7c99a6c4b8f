"""Work that leaves the processors to all others: of a thread, or of what is compiled for it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

_thread = threading.local()

# More steps than there are: where no other thread wants a processor, and else next to never (SCHED_IDLE).
LAST = 20

# A piece of work that took so long there was kept from the processors. It has to end all the same, as no thread comes
# back from there: those that follow are done as many steps nicer as was asked for, for so many times as long; and for
# twice as many wherever the next one that comes last starves again.
STARVED_S = 1.0
TIMES_STARVED = 10
MOST_TIMES_STARVED = 320


def give_way(steps: int) -> None:
    """Let the other threads of this process go before the calling one, and before those that it starts from now on.

    Where the system has no such thing for a thread, they are as before.

    Args:
        steps: Of niceness.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + steps)


def send_behind(steps: int) -> None:
    """Have what is compiled done by threads that give way, while the calling one waits, whenever it asks from now on.

    It keeps its own niceness for its Python: a thread that gives way and is kept from a processor while it holds the
    interpreter's lock keeps all others from it.

    Args:
        steps: Of niceness.
    """
    _thread.steps, _thread.starves_until, _thread.times = steps, 0.0, TIMES_STARVED


def steps_behind() -> int:
    """The steps of niceness for what the calling thread asks of a compiled library; 0 where it works itself."""
    steps: int = getattr(_thread, "steps", 0)
    return steps


def behind(work: Callable[[int], R], clock: Callable[[], float] = time.monotonic) -> R:
    """What a compiled library is asked for that takes long: it comes last; where that starves it, it is just nicer.

    Args:
        work: Asks for it, by the steps of niceness; 0 where the calling thread works itself.
        clock: Seconds.
    """
    steps = steps_behind()
    if steps == 0:
        return work(0)
    began = clock()
    if began < _thread.starves_until:
        return work(steps)
    result = work(LAST)
    ended = clock()
    if ended - began > STARVED_S:
        _thread.starves_until = ended + _thread.times * (ended - began)
        _thread.times = min(2 * _thread.times, MOST_TIMES_STARVED)
    else:
        _thread.times = TIMES_STARVED
    return result
