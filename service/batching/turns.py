"""Turns of the machine: one forward pass at a time of those that share it, whichever model's.

Several processors let lanes go side by side, the system dividing between them; a device is shared by all.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from service.batching.lanes import SHARES, Lane

# What small requests may have beyond their share before bulk goes on: so that some at once do not wait for it.
LEAD_S = 0.25


class Queue(Protocol):
    """What waits for one model."""

    def waits(self, lane: Lane) -> bool:
        """Whether anything does in that lane; called without a lock."""


class Turns:
    """One forward pass at a time of what waits in some lanes.

    On the same cores two forward passes of bulk are no faster side by side than one after the other, and together they
    would run twice as many threads as there are cores. In turns each has them all, and a tokenizer that has nothing to
    do costs the others nothing.

    Whose turn is next: where small requests and bulk wait, the lane that has had less of its share of the time, for
    any model (weighted fair queueing with the measured time as the cost; a lane in which nobody waited saves up
    nothing; small requests may be some way ahead). Within it, the model that waits longest. So a small request goes
    before all bulk, unless small requests alone take three quarters of the time; and bulk always goes on.

    Args:
        lanes: Those that share the turns.
        queues: Of all models, those that come later too.
        clock: Tells the time in seconds, by which the lanes' shares are measured.
    """

    def __init__(self, lanes: Sequence[Lane], queues: Sequence[Queue], clock: Callable[[], float]) -> None:
        self.lanes = lanes
        self._queues = queues
        self._clock = clock
        self._changed = threading.Condition()
        self._tickets = itertools.count()
        self._waiting: dict[int, Queue] = {}  # by ticket, so in the order of their coming
        self._turn: tuple[int, Lane] | None = None
        self._had_s = dict.fromkeys(lanes, 0.0)  # the model's time over the lane's share of it

    @contextmanager
    def turn(self, queue: Queue) -> Iterator[Lane]:
        """Waits for this queue's turn, yields the lane that it is for, and ends it."""
        with self._changed:
            ticket = next(self._tickets)
            self._waiting[ticket] = queue
            if self._turn is None:
                self._turn = self._next()
            self._changed.wait_for(lambda: self._turn is not None and self._turn[0] == ticket)
            _, lane = self._turn
            del self._waiting[ticket]
        started = self._clock()
        try:
            yield lane
        finally:
            with self._changed:
                self._had_s[lane] += (self._clock() - started) / SHARES[lane]
                self._turn = self._next() if self._waiting else None
                self._changed.notify_all()

    def _next(self) -> tuple[int, Lane]:
        """The ticket of those waiting whose turn is next, and the lane that it is for."""
        waits = {lane: [ticket for ticket, queue in self._waiting.items() if queue.waits(lane)] for lane in self.lanes}
        for lane in self.lanes:
            if not any(queue.waits(lane) for queue in self._queues):
                self._had_s[lane] = max(self._had_s.values())
        wanted = [lane for lane in self.lanes if waits[lane]] or self.lanes  # all callers may have left
        lane = min(wanted, key=lambda lane: self._had_s[lane] - (LEAD_S if lane is Lane.SMALL else 0.0))
        return next(iter(waits[lane] or self._waiting)), lane
