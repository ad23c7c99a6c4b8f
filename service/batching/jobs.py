"""A caller's contents on their way through the model, row by row, and back to the caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.errors import EncodingFailed

Content: TypeAlias = str | NDArray[np.float32]
"""What is tokenized: a text, or an embedding (D,) float32."""


Prepared: TypeAlias = list[int] | NDArray[np.float32]
"""The same as the model takes it: word pieces, or an embedding."""


class EncodedRow(NamedTuple):
    """One content's codes, its smallest margin and its quantization error.

    `alternatives` are codes of the last level by their distance, its own first; none where none were asked for.
    """

    codes: tuple[int, ...]
    margin: float
    quantization_error: float
    alternatives: tuple[int, ...] = ()


Outcome: TypeAlias = EncodedRow | EncodingFailed


@dataclass(eq=False)
class Job:
    """One caller's contents."""

    future: asyncio.Future[list[Outcome]]
    results: list[Outcome | None]
    missing: int
    queued_at: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, size: int) -> Job:
        """A job of so many contents, for a caller on the running loop."""
        return cls(asyncio.get_running_loop().create_future(), [None] * size, size)

    @property
    def left(self) -> bool:
        """Whether the caller has gone."""
        return self.future.done()


class Kind(NamedTuple):
    """What the rows of a batch have in common."""

    is_text: bool
    alternatives: int


class Row(NamedTuple):
    """One content of a job, as the model takes it.

    Attributes:
        job: Whose it is.
        place: Which of the job's contents.
        content: Word pieces, or an embedding (D,) float32.
        kind: Whose batches it can be part of.
        tokens: Its word pieces; 1 for an embedding.
    """

    job: Job
    place: int
    content: Prepared
    kind: Kind
    tokens: int


def rows_of(job: Job, contents: Sequence[Prepared], alternatives: int = 0) -> list[Row]:
    """The rows of a job; there may be a hundred thousand a second of them, so each costs as little as can be."""
    text, embedding = Kind(True, alternatives), Kind(False, alternatives)
    return [
        Row(job, place, content, text, len(content))
        if isinstance(content, list)
        else Row(job, place, content, embedding, 1)
        for place, content in enumerate(contents)
    ]


def distribute(batch: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """Hand each caller its rows."""
    finished = []
    for row, outcome in zip(batch, outcomes, strict=True):
        row.job.results[row.place] = outcome
        row.job.missing -= 1
        if row.job.missing == 0:
            finished.append(row.job)
    for job in finished:
        settle(job, [result for result in job.results if result is not None])


def settle(job: Job, outcome: list[Outcome] | Exception) -> None:
    """Resolve a caller's future on its loop; a caller who left, or a loop that closed, is no error."""

    def resolve() -> None:
        if job.future.done():
            return
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    loop = job.future.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(resolve)
