"""What the loaded tokenizers share: room in the queue, and turns of the machine."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from service.batching.lanes import Lane
from service.errors import Overloaded

# Of the queue's room: what bulk leaves to small requests. Of the model's time: what each lane has where both wait.
SMALL_ROOM = 1 / 8
SHARES = {Lane.SMALL: 3 / 4, Lane.BULK: 1 / 4}

# What small requests may have beyond their share before bulk goes on: so that some at once do not wait for it.
LEAD_S = 0.25

MAX_RETRY_AFTER_S = 60.0

# After so long without a small request none is expected.
ALONE_AFTER_S = 5.0


class Queue(Protocol):
    """What waits for one model."""

    def waits(self, lane: Lane) -> bool:
        """Whether anything does in that lane; called without a lock."""

    def backlog_s(self, lane: Lane) -> float:
        """Seconds of the model's time that what waits there will take."""

    def forget_leavers(self) -> None:
        """Give back the room of callers who have left."""


class Capacity:
    """Bounds over everything queued for any model, and one forward pass at a time.

    On the same cores two forward passes side by side are no faster than one after the other, and together they would
    run twice as many threads as there are cores. In turns each has them all, and a tokenizer that has nothing to do
    costs the others nothing.

    Whose turn is next: where small requests and bulk wait, the lane that has had less of its share of the time, for
    any model (weighted fair queueing with the measured time as the cost; a lane in which nobody waited saves up
    nothing; small requests may be some way ahead). Within it, the model that waits longest. So a small request goes
    before all bulk, unless small requests alone take three quarters of the time; and bulk always goes on.

    Args:
        queue_tokens: Tokens queued, beyond which callers are refused. An eighth of it is for small requests alone.
        clock: Tells the time in seconds, by which the lanes' shares are measured.
    """

    def __init__(self, queue_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._queue_tokens = queue_tokens
        self._clock = clock
        self._queued = dict.fromkeys(Lane, 0)
        self._small_at = -math.inf  # when a small request came last
        self._queues: list[Queue] = []
        self._changed = threading.Condition()
        self._tickets = itertools.count()
        self._waiting: dict[int, Queue] = {}  # by ticket, so in the order of their coming
        self._turn: tuple[int, Lane] | None = None
        self._had_s = dict.fromkeys(Lane, 0.0)  # the model's time over the lane's share of it

    @property
    def queued_tokens(self) -> int:
        """Tokens queued for all models."""
        return sum(self._queued.values())

    @property
    def bulk_is_alone(self) -> bool:
        """Whether no small request has come lately, for any model."""
        return self._clock() - self._small_at >= ALONE_AFTER_S

    def share(self, queue: Queue) -> None:
        """Take part."""
        self._queues.append(queue)

    def leave(self, queue: Queue) -> None:
        """Take part no longer."""
        if queue in self._queues:
            self._queues.remove(queue)

    def check_room(self, lane: Lane) -> None:
        """Refuse more in a lane while it is full. What room is left takes any one request, so none starves by its size.

        Raises:
            Overloaded: It is full of the work of callers who still wait.
        """
        if self._has_room(lane):
            return
        for queue in self._queues:
            queue.forget_leavers()
        if not self._has_room(lane):
            msg = f"{self.queued_tokens} tokens are queued of at most {self._queue_tokens}"
            raise Overloaded(msg, retry_after_s=min(self._wait_s(lane), MAX_RETRY_AFTER_S))

    def queue(self, lane: Lane, tokens: int) -> None:
        """Count tokens that were queued, or, below 0, that no longer are."""
        with self._changed:
            self._queued[lane] += tokens
            if lane is Lane.SMALL and tokens > 0:
                self._small_at = self._clock()

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
        waits = {lane: [ticket for ticket, queue in self._waiting.items() if queue.waits(lane)] for lane in Lane}
        for lane in Lane:
            if not any(queue.waits(lane) for queue in self._queues):
                self._had_s[lane] = max(self._had_s.values())
        small_first = self._had_s[Lane.SMALL] <= self._had_s[Lane.BULK] + LEAD_S
        lane = Lane.SMALL if waits[Lane.SMALL] and (small_first or not waits[Lane.BULK]) else Lane.BULK
        return next(iter(waits[lane] or self._waiting)), lane  # where its callers have all left it finds nothing

    def _has_room(self, lane: Lane) -> bool:
        reserved = math.ceil(self._queue_tokens * SMALL_ROOM)
        if lane is Lane.SMALL and self._queued[lane] < reserved:
            return True  # also where one large request of bulk went beyond the bound
        return self.queued_tokens < self._queue_tokens - (reserved if lane is Lane.BULK else 0)

    def _wait_s(self, lane: Lane) -> float:
        """Seconds until what is queued in a lane is done, with the other lane taking its share as long as it waits.

        A lane that has nothing queued is refused for what the other has: then that has to get done.
        """
        own, other = (sum(queue.backlog_s(each) for queue in self._queues) for each in (lane, lane.other))
        return min(own + other, own / SHARES[lane]) if own else other
