"""What the loaded tokenizers share: room in the queue, and turns of the machine."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import Overloaded


class Capacity:
    """One bound over everything queued for any model, and one forward pass at a time.

    On the same cores two forward passes side by side are no faster than one after the other, and together they would
    run twice as many threads as there are cores. In turns each has them all, and a tokenizer that has nothing to do
    costs the others nothing. Turns are given in the order in which they were asked for, so that a busy model does not
    keep the others out.

    Args:
        queue_tokens: Tokens queued, beyond which callers are refused.
    """

    def __init__(self, queue_tokens: int) -> None:
        self._queue_tokens = queue_tokens
        self._queued_tokens = 0
        self._tokens_per_s = 5_000.0
        self._reclaims: set[Callable[[], None]] = set()
        self._changed = threading.Condition()
        self._tickets = itertools.count()
        self._next_ticket = 0

    @property
    def queued_tokens(self) -> int:
        """Tokens queued for all models."""
        return self._queued_tokens

    def share(self, reclaim: Callable[[], None]) -> None:
        """Take part; `reclaim` gives back the room of callers who have left."""
        self._reclaims.add(reclaim)

    def leave(self, reclaim: Callable[[], None]) -> None:
        """Take part no longer."""
        self._reclaims.discard(reclaim)

    def check_room(self) -> None:
        """Refuse more while the queue is full. What room is left takes any one request, so none starves by its size.

        Raises:
            Overloaded: It is full of the work of callers who still wait.
        """
        if self._queued_tokens < self._queue_tokens:
            return
        for reclaim in self._reclaims:
            reclaim()
        if self._queued_tokens >= self._queue_tokens:
            wait_s = self._queued_tokens / self._tokens_per_s
            msg = f"{self._queued_tokens} tokens are queued of at most {self._queue_tokens}"
            raise Overloaded(msg, retry_after_s=min(wait_s, 60.0))

    def queue(self, tokens: int) -> None:
        """Count tokens that were queued, or, below 0, that no longer are."""
        with self._changed:
            self._queued_tokens += tokens

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for this model's turn, and ends it."""
        with self._changed:
            ticket = next(self._tickets)
            self._changed.wait_for(lambda: self._next_ticket == ticket)
        try:
            yield
        finally:
            with self._changed:
                self._next_ticket += 1
                self._changed.notify_all()

    def measure(self, tokens: int, elapsed_s: float) -> None:
        """Learn how fast tokens are worked through, for what refused callers are told."""
        self._tokens_per_s += 0.1 * (tokens / elapsed_s - self._tokens_per_s)
