"""Who is next: small requests have a lane of their own beside bulk, and bulk requests take turns.

A new listing comes as a request of one row, a feed as requests of hundreds. In one queue the listing would wait for
all of them. Here it waits for other small requests before it and, where the lanes share their turns, for the batch
that is under way.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from service.batching.jobs import Batch, Job, Kind, Span

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


# Of the model's time: what each lane has where both wait.
SHARES = {Lane.SMALL: 3 / 4, Lane.BULK: 1 / 4}

# Where they go side by side: by how many steps of niceness bulk gives way. It has a fifteenth of a core then.
NICER = 12


def lane_of(job: Job) -> Lane:
    """The lane of a job: of few rows, short together, or of a single one whatever its length; else that of bulk."""
    small = job.rows == 1 or (job.rows <= SMALL_ROWS and job.tokens() <= SMALL_TOKENS)
    return Lane.SMALL if small else Lane.BULK


@dataclass(eq=False)
class _Waiting:
    """The rows of a job that still wait: all from `start` on."""

    job: Job
    turn: int
    start: int = 0

    @property
    def rows(self) -> int:
        return self.job.rows - self.start

    @property
    def tokens(self) -> int:
        return self.job.tokens(self.start)


class _Draft:
    """A batch while it is filled."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._longest = 0
        self._rows = 0
        self.spans: list[Span] = []
        self.tokens = 0

    def fill(self, waiting: _Waiting) -> bool:
        """Move rows of a job here, as far as they fit with their padding; whether all did."""
        job, start = waiting.job, waiting.start
        # Rows become no shorter, so what a batch up to each of them would take only grows.
        padded = lambda place: max(self._longest, job.length(place)) * (self._rows + place - start + 1)  # noqa: E731
        stop = bisect_right(range(job.rows), self._budget, lo=start, key=padded)
        if stop == start and not self._rows:
            stop = start + 1
        if stop > start:
            self.spans.append(Span(job, start, stop))
            self.tokens += job.tokens(start, stop)
            self._longest = max(self._longest, job.length(stop - 1))
            self._rows += stop - start
            waiting.start = stop
        return stop == job.rows


class LaneQueue:
    """What waits in one lane. Not thread-safe.

    Args:
        in_turns: After each batch the next job has its turn (round robin: equal shares for jobs of any size); else the
            jobs are worked off in the order of their coming.
    """

    def __init__(self, *, in_turns: bool) -> None:
        self._in_turns = in_turns
        self._turns = itertools.count()
        self._jobs: dict[Kind, deque[_Waiting]] = {}  # each by turn
        self._tokens: dict[Kind, int] = {}

    def __bool__(self) -> bool:
        return bool(self._jobs)

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
        return sum(waiting.rows for waiting in self._all())

    def add(self, job: Job) -> None:
        """Append a job."""
        self._jobs.setdefault(job.kind, deque()).append(_Waiting(job, next(self._turns)))
        self._tokens[job.kind] = self._tokens.get(job.kind, 0) + job.tokens()

    def take(self, budget: Callable[[Kind], int]) -> Batch | None:
        """The next batch, all of one kind; None where nobody waits. Rows of callers who left are dropped.

        The job whose turn it is fills the batch; what it leaves free goes to the next ones of the same kind.

        Args:
            budget: Padded tokens of a batch of a kind; a longer single row is a batch by itself.
        """
        while self._jobs:
            kind = min(self._jobs, key=lambda kind: self._jobs[kind][0].turn)
            if spans := self._take(kind, budget(kind)):
                return Batch(kind, spans)
        return None

    def forget_leavers(self) -> None:
        """Drop the rows of callers who left."""
        for kind in list(self._jobs):
            stay = deque(waiting for waiting in self._jobs[kind] if not waiting.job.left)
            self._tokens[kind] = sum(waiting.tokens for waiting in stay)
            self._jobs[kind] = stay
            self._forget_if_empty(kind)

    def clear(self) -> set[Job]:
        """Drop everything; whose it was."""
        jobs = {waiting.job for waiting in self._all()}
        self._jobs.clear()
        self._tokens.clear()
        return jobs

    def _take(self, kind: Kind, budget: int) -> list[Span]:
        jobs, draft = self._jobs[kind], _Draft(budget)
        leader = jobs[0]
        while jobs and (jobs[0].job.left or draft.fill(jobs[0])):
            self._tokens[kind] -= jobs.popleft().tokens
        self._tokens[kind] -= draft.tokens
        if self._in_turns and jobs and jobs[0] is leader:
            leader.turn = next(self._turns)
            jobs.rotate(-1)
        self._forget_if_empty(kind)
        return draft.spans

    def _forget_if_empty(self, kind: Kind) -> None:
        if not self._jobs[kind]:
            del self._jobs[kind], self._tokens[kind]

    def _all(self) -> Iterable[_Waiting]:
        return itertools.chain.from_iterable(self._jobs.values())
