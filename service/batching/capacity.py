"""What the loaded tokenizers share: room in the queue, and turns of the machine (`turns`)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from service.batching import turns
from service.batching.lanes import SHARES, Lane
from service.batching.turns import Turns
from service.errors import Overloaded

# Of the queue's room: what bulk leaves to small requests.
SMALL_ROOM = 1 / 8

MAX_RETRY_AFTER_S = 60.0

# After so long without a small request none is expected.
ALONE_AFTER_S = 5.0


class Queue(turns.Queue, Protocol):
    """What waits for one model."""

    def backlog_s(self, lane: Lane) -> float:
        """Seconds of the model's time that what waits there will take."""

    def forget_leavers(self) -> None:
        """Give back the room of callers who have left."""


class Capacity:
    """Bounds over everything queued for any model, and the turns in which forward passes are made.

    Args:
        queue_tokens: Tokens queued, beyond which callers are refused. An eighth of it is for small requests alone.
        clock: Tells the time in seconds.
        side_by_side: Whether a forward pass of small requests may go beside one of bulk: on processors, which the
            system can take from the latter for the former. Else all take turns.

    Attributes:
        turns: Those of the lanes that share some; each model has a thread for each.
    """

    def __init__(
        self, queue_tokens: int, clock: Callable[[], float] = time.perf_counter, *, side_by_side: bool = False
    ) -> None:
        self._queue_tokens = queue_tokens
        self._clock = clock
        self._queued = dict.fromkeys(Lane, 0)
        self._small_at = -math.inf  # when a small request came last
        self._queues: list[Queue] = []
        self._counting = threading.Lock()
        groups = [[lane] for lane in Lane] if side_by_side else [list(Lane)]
        self.turns = [Turns(lanes, self._queues, clock) for lanes in groups]

    @property
    def queued_tokens(self) -> int:
        """Tokens queued for all models."""
        return self.queued_in(Lane)

    def queued_in(self, lanes: Iterable[Lane]) -> int:
        """The same in some lanes."""
        return sum(self._queued[lane] for lane in lanes)

    def sharing(self, lane: Lane) -> Sequence[Lane]:
        """The lanes that share their turns with one; it is one of them."""
        return next(turns.lanes for turns in self.turns if lane in turns.lanes)

    @property
    def bulk_is_alone(self) -> bool:
        """Whether no small request waits for bulk: it has turns of its own, or none has come lately, for any model."""
        return len(self.turns) > 1 or self._clock() - self._small_at >= ALONE_AFTER_S

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
        with self._counting:
            self._queued[lane] += tokens
            if lane is Lane.SMALL and tokens > 0:
                self._small_at = self._clock()

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
