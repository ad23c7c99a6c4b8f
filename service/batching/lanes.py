"""Who is next: small requests have a lane of their own beside bulk, and bulk requests take turns.

A new listing comes as a request of one row, a feed as requests of hundreds. In one queue the listing would wait for
all of them. Here it waits for the batch that is under way, and for other small requests before it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter

from service.batching.jobs import Job, Kind, Row

SMALL_ROWS = 16
SMALL_TOKENS = 512


class Lane(StrEnum):
    """Of two: each has room in the queue and a share of the model's time that the other cannot take from it."""

    SMALL = "small"
    BULK = "bulk"

    @property
    def other(self) -> Lane:
        """The one beside it."""
        return Lane.BULK if self is Lane.SMALL else Lane.SMALL


def lane_of(rows: Sequence[Row]) -> Lane:
    """The lane of a request's rows: few, and short together; a single one is small whatever its length."""
    small = len(rows) <= SMALL_ROWS and sum(row.tokens for row in rows) <= SMALL_TOKENS
    return Lane.SMALL if small or len(rows) == 1 else Lane.BULK


@dataclass(eq=False)
class _Part:
    """A job's rows of one kind that still wait, the shortest first.

    Of like length side by side, rows need little padding: it is what the longest of a batch exceeds the others by.
    """

    job: Job
    rows: deque[Row]
    turn: int

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)


class LaneQueue:
    """What waits in one lane. Not thread-safe.

    Args:
        in_turns: After each batch the next job has its turn (round robin: equal shares for jobs of any size); else the
            jobs are worked off in the order of their coming.
    """

    def __init__(self, *, in_turns: bool) -> None:
        self._in_turns = in_turns
        self._turns = itertools.count()
        self._parts: dict[Kind, deque[_Part]] = {}  # each by turn
        self._tokens: dict[Kind, int] = {}

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(self._tokens.values())

    @property
    def tokens_by_kind(self) -> Mapping[Kind, int]:
        """The same of each kind."""
        return dict(self._tokens)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(len(part.rows) for part in self._all_parts())

    def add(self, rows: Iterable[Row]) -> None:
        """Append the rows of a job."""
        by_kind: dict[Kind, list[Row]] = {}
        for row in rows:
            by_kind.setdefault(row.kind, []).append(row)
        for kind, of_kind in by_kind.items():
            of_kind.sort(key=attrgetter("tokens"))
            part = _Part(of_kind[0].job, deque(of_kind), next(self._turns))
            self._parts.setdefault(kind, deque()).append(part)
            self._tokens[kind] = self._tokens.get(kind, 0) + part.tokens

    def take(self, budget: Callable[[Kind], int]) -> list[Row]:
        """The rows of the next batch, all of one kind; none where nobody waits. Rows of callers who left are dropped.

        The job whose turn it is fills the batch; what it leaves free goes to the next ones of the same kind.

        Args:
            budget: Padded tokens of a batch of a kind; a longer single row is a batch by itself.
        """
        while self._parts:
            kind = min(self._parts, key=lambda kind: self._parts[kind][0].turn)
            if batch := self._take(kind, budget(kind)):
                return batch
        return []

    def forget_leavers(self) -> None:
        """Drop the rows of callers who left."""
        for kind in list(self._parts):
            stay = deque(part for part in self._parts[kind] if not part.job.left)
            self._tokens[kind] = sum(part.tokens for part in stay)
            self._parts[kind] = stay
            self._forget_if_empty(kind)

    def clear(self) -> set[Job]:
        """Drop everything; whose it was."""
        jobs = {part.job for part in self._all_parts()}
        self._parts.clear()
        self._tokens.clear()
        return jobs

    def _take(self, kind: Kind, budget: int) -> list[Row]:
        parts = self._parts[kind]
        leader = parts[0]
        batch: list[Row] = []
        while parts and (parts[0].job.left or self._move(parts[0], batch, budget)):
            self._tokens[kind] -= parts.popleft().tokens
        self._tokens[kind] -= sum(row.tokens for row in batch)
        if self._in_turns and parts and parts[0] is leader:
            leader.turn = next(self._turns)
            parts.rotate(-1)
        self._forget_if_empty(kind)
        return batch

    def _move(self, part: _Part, batch: list[Row], budget: int) -> bool:
        """Rows of a part into a batch, as far as they fit; whether all did."""
        longest = max((row.tokens for row in batch), default=0)
        rows = part.rows
        while rows:
            longest = max(longest, rows[0].tokens)
            if batch and longest * (len(batch) + 1) > budget:
                return False
            batch.append(rows.popleft())
        return True

    def _forget_if_empty(self, kind: Kind) -> None:
        if not self._parts[kind]:
            del self._parts[kind], self._tokens[kind]

    def _all_parts(self) -> Iterable[_Part]:
        return itertools.chain.from_iterable(self._parts.values())
