"""A caller's contents on their way through the model, span by span, and what became of them, as columns.

    contents of one kind --> Job --spans--> Batch, of one job or several --model--> columns of each job, in place

A job is what one caller waits for: its contents, and a place for what the model makes of each. Of embeddings there may
be a hundred thousand a second, so nothing here costs an object for a row.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models import Encoding
from service.errors import EncodingFailed
from service.telemetry.serving import Part, Serving, request_id

Content: TypeAlias = str | NDArray[np.float32]
"""What is tokenized: a text, or an embedding (D,) float32."""

Contents: TypeAlias = Sequence[str] | NDArray[np.float32]
"""Several of one kind: texts, or embeddings (N, D) float32."""

Prepared: TypeAlias = list[list[int]] | NDArray[np.float32]
"""The same as the model takes them: word pieces, or embeddings (N, D) float32."""


class EncodedRow(NamedTuple):
    """One content's codes, its smallest margin and its quantization error.

    `alternatives` are codes of the last level by their distance, its own first; none where none were asked for.
    """

    codes: tuple[int, ...]
    margin: float
    quantization_error: float
    alternatives: tuple[int, ...] = ()


Outcome: TypeAlias = EncodedRow | EncodingFailed


@dataclass(frozen=True)
class Encoded:
    """What the model made of N contents, in their order; where it failed on one, its numbers say nothing.

    Attributes:
        codes: (N, L) int64.
        margins: (N,) float64.
        quantization_errors: (N,) float64.
        alternatives: (N, n) int64, codes of the last level by their distance, the chosen one first; n is 0 where none
            were asked for.
        failures: The errors of contents that the model failed on, by their places.
    """

    codes: NDArray[np.int64]
    margins: NDArray[np.float64]
    quantization_errors: NDArray[np.float64]
    alternatives: NDArray[np.int64]
    failures: dict[int, EncodingFailed] = field(default_factory=dict)

    @classmethod
    def of(cls, encoding: Encoding, rows: int) -> Encoded:
        """An encoding of so many rows.

        Raises:
            RuntimeError: It has another number of them.
        """
        columns = cls(
            encoding.codes.numpy(),
            encoding.margin.numpy(),
            encoding.quantization_error.numpy(),
            encoding.alternatives.numpy(),
        )
        if len(columns) != rows:
            raise RuntimeError(f"{len(columns)} rows came back of {rows}")
        return columns

    @classmethod
    def like(cls, other: Encoded, rows: int) -> Encoded:
        """So many rows of the same widths, of which nothing is known yet."""
        return other._each(lambda column: np.zeros((rows, *column.shape[1:]), column.dtype))

    def __len__(self) -> int:
        """N."""
        return len(self.codes)

    def put(self, at: slice, part: Encoded) -> None:
        """Write what is known of some rows."""
        for whole, some in zip(self._columns, part._columns, strict=True):
            whole[at] = some

    def part(self, rows: slice) -> Encoded:
        """Some rows, of which none failed: views, no copies."""
        return self._each(lambda column: column[rows])

    def take(self, places: NDArray[np.int64]) -> Encoded:
        """The rows at these places, each once, in this order."""
        failures = {i: self.failures[place] for i, place in enumerate(places.tolist()) if place in self.failures}
        return self._each(lambda column: column[places], failures)

    def rows(self) -> list[Outcome]:
        """The same row by row."""
        codes, margins, errors, alternatives = (column.tolist() for column in self._columns)
        columns = zip(map(tuple, codes), margins, errors, map(tuple, alternatives), strict=True)
        # A fifth of the time that the class's own call takes.
        found: list[Outcome] = list(map(partial(tuple.__new__, EncodedRow), columns))
        for place, failure in self.failures.items():
            found[place] = failure
        return found

    @property
    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.codes, self.margins, self.quantization_errors, self.alternatives

    def _each(
        self, change: Callable[[NDArray[Any]], NDArray[Any]], failures: dict[int, EncodingFailed] | None = None
    ) -> Encoded:
        columns = map(change, self._columns)
        return Encoded(next(columns), next(columns), next(columns), next(columns), failures or {})


class Kind(NamedTuple):
    """What the rows of a batch have in common."""

    is_text: bool
    alternatives: int


@dataclass(eq=False)
class Job:
    """One caller's contents, all of one kind, and what became of them.

    Attributes:
        kind: Whose batches they can be part of.
        contents: As the model takes them; of texts the shortest first, as rows of like length need little padding.
        future: Done once all is known, or failed; done before that where the caller has gone.
        rows: How many contents there are.
        missing: How many rows are not known yet.
        encoded: What is known; None before the first row is.
        failures: The errors of rows that the model failed on, by their places.
        queued_at: When it came, as all times here by `time.perf_counter`.
        taken_at: When the first of its rows went to the model.
        encoded_at: When the last of them came back.
        model_s: How long the batches took that its rows were in, and its undecided rows.
        request_id: Of the request that it is part of, where it is of one.
    """

    kind: Kind
    contents: Prepared
    future: asyncio.Future[Encoded]
    rows: int = field(init=False)
    missing: int = field(init=False)
    encoded: Encoded | None = None
    failures: dict[int, EncodingFailed] = field(default_factory=dict)
    queued_at: float = field(default_factory=time.perf_counter)
    taken_at: float = 0.0
    encoded_at: float = 0.0
    model_s: float = 0.0
    request_id: str | None = field(default_factory=request_id)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Nothing is known yet."""
        self.rows = self.missing = len(self.contents)

    @property
    def left(self) -> bool:
        """Whether the caller has gone."""
        return self.future.done()

    def length(self, place: int) -> int:
        """Word pieces of a row; 1 of an embedding."""
        return len(self.contents[place]) if self.kind.is_text else 1

    def tokens(self, start: int = 0, stop: int | None = None) -> int:
        """Those of several rows."""
        some = self.contents[start:stop]
        return sum(map(len, some)) if self.kind.is_text else len(some)

    def put(self, start: int, part: Encoded, undecided: int = 0) -> None:
        """What became of the rows from here on, of which so many are still to be decided."""
        if len(part) == self.rows:
            self.encoded = part
        else:
            if self.encoded is None:
                self.encoded = Encoded.like(part, self.rows)
            self.encoded.put(slice(start, start + len(part)), part)
        self._known(len(part) - undecided)

    def decide(self, place: int, row: Encoded, model_s: float) -> None:
        """What became of a row that was undecided, after so long."""
        assert self.encoded is not None
        self.encoded.put(slice(place, place + 1), row)
        self.took(model_s)
        self._known(1)

    def fail(self, place: int, failure: EncodingFailed) -> None:
        """The model failed on this row."""
        self.failures[place] = failure
        self._known(1)

    def took(self, seconds: float) -> None:
        """The model's time for some of the rows."""
        with self._counting:
            self.model_s += seconds

    def _known(self, rows: int) -> None:
        with self._counting:  # the model's thread does, and that of undecided rows
            self.missing -= rows

    def tell(self, serving: Serving) -> None:
        """Tell the request that it is part of where its time went."""
        whole_s = self.encoded_at - self.queued_at
        model_s = min(self.model_s, whole_s)  # undecided rows take theirs while batches take theirs
        serving.waited(Part.QUEUE, whole_s - model_s)
        serving.waited(Part.MODEL, model_s)
        if serving.spans is not None:
            serving.spans.add("queue", self.queued_at, self.taken_at)
            serving.spans.add("encode", self.taken_at, self.encoded_at)

    def settle(self, error: Exception | None = None) -> None:
        """Tell the caller, on its own loop: that all is known, or why it never will be."""
        if self.left:
            return
        if error is not None:
            self.future.set_exception(error)
            return
        if self.encoded is None:  # the model failed on all of them
            nothing = np.zeros((self.rows, 0), np.int64), np.zeros(self.rows), np.zeros(self.rows)
            self.encoded = Encoded(*nothing, nothing[0])
        self.future.set_result(replace(self.encoded, failures=self.failures) if self.failures else self.encoded)


class Span(NamedTuple):
    """Some rows of a job, side by side."""

    job: Job
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


class Batch:
    """What the model is given at once: spans of jobs, all of one kind."""

    def __init__(self, kind: Kind, spans: Sequence[Span]) -> None:
        self.kind = kind
        self.spans = spans
        self.rows = sum(span.rows for span in spans)

    @property
    def tokens(self) -> int:
        """Word pieces, without padding; of embeddings their number."""
        return sum(span.job.tokens(span.start, span.stop) for span in self.spans)

    @property
    def jobs(self) -> set[Job]:
        """Whose rows these are."""
        return {span.job for span in self.spans}

    def contents(self) -> Prepared:
        """What the model takes; a copy."""
        parts = [job.contents[start:stop] for job, start, stop in self.spans]
        if self.kind.is_text:
            return list(itertools.chain.from_iterable(parts))
        return np.concatenate(parts)

    def halves(self) -> tuple[Batch, Batch]:
        """Two batches of the same rows."""
        middle = self.rows // 2
        halves: tuple[list[Span], list[Span]] = ([], [])
        at = 0
        for job, start, stop in self.spans:
            cut = min(max(start + middle - at, start), stop)
            for half, span in zip(halves, (Span(job, start, cut), Span(job, cut, stop)), strict=True):
                if span.rows:
                    half.append(span)
            at += stop - start
        return Batch(self.kind, halves[0]), Batch(self.kind, halves[1])

    def took(self, seconds: float) -> None:
        """The model's time, of which each of the jobs waited for all."""
        for span in self.spans:
            span.job.took(seconds)

    def ended(self, at: float) -> list[Job]:
        """The jobs that are done with it, at this time."""
        done = [job for job in self.jobs if job.missing == 0]
        for job in done:
            job.encoded_at = at
        return done

    def put(self, encoded: Encoded, undecided: Sequence[int] = ()) -> list[tuple[Job, int]]:
        """Hand each job its rows; returns the job and the place of each row that is undecided."""
        places: list[tuple[Job, int]] = []
        at = 0
        for span in self.spans:
            later = [row - at + span.start for row in undecided if at <= row < at + span.rows]
            span.job.put(span.start, encoded.part(slice(at, at + span.rows)), len(later))
            places += [(span.job, place) for place in later]
            at += span.rows
        return places

    def fail(self, failure: EncodingFailed) -> None:
        """The model failed on its only row."""
        ((job, place, _),) = self.spans
        job.fail(place, failure)


def settle(jobs: Iterable[Job], error: Exception | None = None) -> None:
    """Tell the callers of these jobs; who left, or whose loop has closed, hears nothing. One wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        by_loop.setdefault(job.future.get_loop(), []).append(job)
    for loop, of_loop in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, of_loop, error)


def _settle(jobs: Sequence[Job], error: Exception | None) -> None:
    for job in jobs:
        job.settle(error)
