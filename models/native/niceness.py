"""Work that leaves the processors to all others: of a thread, or of what is compiled for it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_thread = threading.local()


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
    _thread.steps = steps


def behind() -> int:
    """The steps of niceness for what the calling thread asks of a compiled library; 0 where it works itself."""
    steps: int = getattr(_thread, "steps", 0)
    return steps
