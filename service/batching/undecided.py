"""Texts that no fast path decides: each alone on the canonical path, beside the model, which goes on meanwhile.

One in some hundreds of texts, where the forward pass has no float64, takes as long as several batches together. In the
model's thread it would keep all who come meanwhile waiting, a new listing too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeAlias

from models import Encoding
from models.native.niceness import give_way
from service.batching.jobs import Encoded, Job, settle
from service.batching.lanes import NICER
from service.errors import EncodingFailed
from service.metrics import ModelMetrics

log = logging.getLogger(__name__)

# Texts that wait or are being computed here, at most: what waits here is no longer counted in the queue's room.
ROOM = 4

Row: TypeAlias = tuple[Job, int]
"""A job, and the place of one of its rows."""


class CanonicalEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode_text_alone(self, pieces: Sequence[int], *, alternatives: int = 0) -> Encoding:
        """Codes of one text, given as word pieces; called from another thread than the model's."""


class Undecided:
    """Decides rows of jobs, one text after the other, on a thread of its own.

    Args:
        encoder: The tokenizer.
        metrics: Where the paths on which rows were final are counted.
        gives_way: Whether the thread gives way to the others, see `niceness.give_way`.
    """

    def __init__(self, encoder: CanonicalEncoder, metrics: ModelMetrics, *, gives_way: bool) -> None:
        self._encoder = encoder
        self._metrics = metrics
        begin = partial(give_way, NICER) if gives_way else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="canonical", initializer=begin)
        self._room = threading.Semaphore(ROOM)

    def decide(self, rows: Iterable[Row]) -> None:
        """Have rows of texts decided; jobs of which all is known then are settled. Equal texts cost one.

        Where too many wait already, this returns when the rest of them are decided.
        """
        by_text: dict[Hashable, list[Row]] = {}
        for job, place in rows:
            by_text.setdefault((job.kind, tuple(job.contents[place])), []).append((job, place))
        for equal in by_text.values():
            if self._room.acquire(blocking=False):
                self._thread.submit(self._decide_beside, equal)
            else:
                self._decide(equal)

    def close(self) -> None:
        """Returns when all rows are decided."""
        self._thread.shutdown()

    def _decide_beside(self, rows: Sequence[Row]) -> None:
        try:
            self._decide(rows)
        finally:
            self._room.release()

    def _decide(self, rows: Sequence[Row]) -> None:
        waited_for = [(job, place) for job, place in rows if not job.left]
        if not waited_for:
            return
        job, place = waited_for[0]
        started = time.perf_counter()
        try:
            encoding = self._encoder.encode_text_alone(job.contents[place], alternatives=job.kind.alternatives)
            row = Encoded.of(encoding, 1)
        except Exception as error:  # whatever it is, it is this text's
            log.exception("the model failed on one row alone", extra={"request_id": job.request_id})
            for job, place in waited_for:
                job.fail(place, EncodingFailed(type(error).__name__))
        else:
            ended = time.perf_counter()
            self._metrics.rows_final(encoding.precision.repeat(len(waited_for)))
            for job, place in waited_for:
                job.decide(place, row, ended - started)
        known = {job for job, _ in waited_for if job.missing == 0}
        for job in known:
            job.encoded_at = time.perf_counter()
        settle(known)
