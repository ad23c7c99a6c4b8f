"""Admission and micro-batching: one worker thread owns the model.

There is no wait timer. A batch forms from what is queued at the moment the worker frees; while it runs, the next one
gathers. Small requests and bulk have a lane each (`lanes`), and a batch is of one lane. A batch is as large as the
model can do in a set time, because a small request that comes meanwhile waits for it. Admission is bounded by tokens,
and the rows of a caller who left are dropped before they reach the model.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch

from models import Encoding
from service.batching.capacity import Capacity
from service.batching.jobs import Content, EncodedRow, Job, Kind, Outcome, Prepared, Row, distribute, rows_of, settle
from service.batching.lanes import SMALL_ROWS, Lane, LaneQueue, lane_of
from service.errors import EncoderStopped, EncodingFailed
from service.metrics import ModelMetrics

log = logging.getLogger(__name__)

# Smaller batches waste the machine. On two cores four texts together go about as fast as a hundred, one alone at half
# that pace: nothing is gained by larger batches there.
MIN_BATCH_TOKENS = 192

# Word pieces are split on a thread for each lane: of bulk, so many texts at a time.
SPLIT_TEXTS = 64
SMALL_CHARACTERS = 8_192


class Encoder(Protocol):
    """What the batcher needs of a tokenizer; `alternatives` is how many codes of the last level to rank for a row."""

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of texts; called from another thread than the model's."""

    def encode(self, embeddings: torch.Tensor, *, alternatives: int = 0) -> Encoding:
        """Codes of embeddings (B, D)."""

    def encode_texts(self, pieces: Sequence[Sequence[int]], *, alternatives: int = 0) -> Encoding:
        """Codes of texts, given as word pieces."""


class Pace:
    """How many tokens a second the model does; later batches count for more, each by its time."""

    REMEMBERED_S = 2.0

    def __init__(self, tokens_per_s: float) -> None:
        self.tokens_per_s = tokens_per_s

    def measure(self, tokens: int, elapsed_s: float) -> None:
        """Learn of a batch."""
        weight = -math.expm1(-elapsed_s / self.REMEMBERED_S)
        self.tokens_per_s += weight * (tokens / elapsed_s - self.tokens_per_s)


class Batcher:
    """Turns concurrent callers' contents into batches for one encoder.

    Args:
        encoder: The tokenizer; only the worker thread runs its model.
        batch_tokens: Padded tokens of one forward pass, at most (a longer single row runs alone).
        batch_s: Seconds that one forward pass should take, at most: batches are made smaller than `batch_tokens` for
            it, by the measured pace of the model, though not below `MIN_BATCH_TOKENS`.
        capacity: Bounds what is queued, here and for the other models, and gives them turns.
        metrics: Where depth, sizes and durations go.
    """

    def __init__(
        self, encoder: Encoder, *, batch_tokens: int, batch_s: float, capacity: Capacity, metrics: ModelMetrics
    ) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._batch_s = batch_s
        self._capacity = capacity
        self._metrics = metrics
        self._queues = {lane: LaneQueue(in_turns=lane is Lane.BULK) for lane in Lane}
        self._counted = dict.fromkeys(Lane, 0)  # tokens of each lane that the capacity knows of
        self._paces = {True: Pace(5_000.0), False: Pace(50_000.0)}  # of texts, and of embeddings
        self._changed = threading.Condition(threading.RLock())
        self._refusal: str | None = None  # why new work is refused, once it is
        self._proven: Row | None = None  # a row that the model could encode: where it no longer can, it is lost
        self._left = False  # whether a caller left since the queue was last searched for such
        self._splitters = {lane: ThreadPoolExecutor(1, thread_name_prefix=f"word-pieces-{lane}") for lane in Lane}
        self._worker = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._capacity.share(self)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._worker.is_alive()

    @property
    def queued_rows(self) -> int:
        """Rows that wait for the model."""
        with self._changed:
            return sum(queue.rows for queue in self._queues.values())

    async def encode(self, contents: Sequence[Content], *, alternatives: int = 0) -> list[Outcome]:
        """The codes of each content, in order; or the error of the one that the model fails on.

        Args:
            contents: Texts and embeddings.
            alternatives: How many codes of the last level to rank for each, at most.

        Raises:
            Overloaded: The queue is full.
            EncoderStopped: The worker has died or is shutting down.
        """
        if not contents:
            return []
        self._check_running()
        self._capacity.check_room(Lane.SMALL if len(contents) <= SMALL_ROWS else Lane.BULK)
        prepared = await self._prepare(contents)
        job = Job.of(len(contents))
        self._enqueue(rows_of(job, prepared, alternatives))
        try:
            return await job.future
        except asyncio.CancelledError:
            self._left = True
            raise

    async def stop(self) -> None:
        """Refuse new work, finish what is queued, end the worker."""
        with self._changed:
            self._refusal = self._refusal or "shutting down"
            self._changed.notify()
        if self.alive:
            await asyncio.to_thread(self._worker.join)
        self._capacity.leave(self)
        for splitter in self._splitters.values():
            splitter.shutdown()

    def waits(self, lane: Lane) -> bool:
        """Whether any rows wait in a lane."""
        return bool(self._queues[lane])

    def backlog_s(self, lane: Lane) -> float:
        """Seconds of the model's time that the rows of a lane will take."""
        with self._changed:
            tokens = self._queues[lane].tokens_by_kind
        return sum(count / self._paces[kind.is_text].tokens_per_s for kind, count in tokens.items())

    def forget_leavers(self) -> None:
        """Take the rows of callers who left out of the queue: they hold no place that others wait for."""
        if not self._left:
            return
        with self._changed:
            self._left = False
            for lane, queue in self._queues.items():
                queue.forget_leavers()
                self._count(lane)

    async def _prepare(self, contents: Sequence[Content]) -> list[Prepared]:
        """Texts to word pieces, off the event loop; embeddings as they are.

        What is long is split a piece at a time, on a thread of its own: neither a new listing nor the feed of another
        caller waits for all of it, and that of a caller who left goes no further.
        """
        texts = [content for content in contents if isinstance(content, str)]
        if not texts:
            return [content for content in contents if not isinstance(content, str)]
        small = len(texts) <= SMALL_ROWS and sum(map(len, texts)) <= SMALL_CHARACTERS
        splitter = self._splitters[Lane.SMALL if small else Lane.BULK]
        split = asyncio.get_running_loop().run_in_executor
        pieces: list[list[int]] = []
        for start in range(0, len(texts), SPLIT_TEXTS):
            pieces += await split(splitter, self._encoder.split, texts[start : start + SPLIT_TEXTS])
        each = iter(pieces)
        return [next(each) if isinstance(content, str) else content for content in contents]

    def _check_running(self) -> None:
        if self._refusal is not None:
            raise EncoderStopped(self._refusal)

    def _enqueue(self, rows: list[Row]) -> None:
        lane = lane_of(rows)
        self._capacity.check_room(lane)
        with self._changed:
            self._check_running()
            self._queues[lane].add(rows)
            self._count(lane)
            self._changed.notify()

    def _count(self, lane: Lane) -> None:
        """Tell the capacity and the metrics how much waits in a lane."""
        tokens = self._queues[lane].tokens
        self._capacity.queue(lane, tokens - self._counted[lane])
        self._counted[lane] = tokens
        self._metrics.queue_tokens[lane].set(tokens)

    def _run(self) -> None:
        """The worker thread: batch after batch until told to stop; however it ends, nobody is left waiting."""
        batch: list[Row] = []
        try:
            while self._wait():
                with self._capacity.turn(self) as lane:
                    batch = self._take(lane)  # only now: what gathered while the others had their turns comes along
                    outcomes = self._encode(batch) if batch else []
                distribute(batch, outcomes)
        finally:
            with self._changed:
                self._refusal = self._refusal or "the model's thread has ended; the process needs a restart"
                orphans = {row.job for row in batch}.union(*(queue.clear() for queue in self._queues.values()))
                for lane in Lane:
                    self._count(lane)
            for job in orphans:
                settle(job, EncoderStopped(self._refusal))

    def _wait(self) -> bool:
        """Wait for rows; False when stopping with none left."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._queues.values()) or self._refusal is not None)
            return any(self._queues.values())

    def _take(self, lane: Lane) -> list[Row]:
        """Rows of one kind within the budget; empty where all callers have left."""
        with self._changed:
            batch = self._queues[lane].take(self._budget)
            self._count(lane)
        now = time.perf_counter()
        for job in {row.job for row in batch}:
            self._metrics.queue_seconds[lane].observe(now - job.queued_at)
        return batch

    def _budget(self, kind: Kind) -> int:
        """Padded tokens of a batch of a kind."""
        within_time = int(self._batch_s * self._paces[kind.is_text].tokens_per_s)
        return min(self._batch_tokens, max(within_time, MIN_BATCH_TOKENS))

    def _encode(self, batch: list[Row]) -> list[Outcome]:
        """What the model makes of a batch. A batch that fails is tried again in halves, down to the row at fault.

        Raises:
            Exception: The model fails on what it could do before as well: the device is lost, and the thread ends.
        """
        started = time.perf_counter()
        try:
            encoding = self._forward(batch)
            outcomes = _outcomes(encoding, len(batch))
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch of %d rows failed, trying it in halves: %r", len(batch), error)
                middle = len(batch) // 2
                return self._encode(batch[:middle]) + self._encode(batch[middle:])
            log.exception("the model failed on one row")
            if self._proven is None:
                raise
            self._forward([self._proven])
            return [EncodingFailed(type(error).__name__)]
        self._proven = batch[0]
        self._measure(batch, encoding, time.perf_counter() - started)
        return outcomes

    def _measure(self, batch: list[Row], encoding: Encoding, elapsed_s: float) -> None:
        tokens = sum(row.tokens for row in batch)
        self._paces[batch[0].kind.is_text].measure(tokens, elapsed_s)
        self._metrics.batch(rows=len(batch), tokens=tokens, seconds=elapsed_s, precision=encoding.precision)

    def _forward(self, batch: list[Row]) -> Encoding:
        is_text, alternatives = batch[0].kind
        if is_text:
            return self._encoder.encode_texts([row.content for row in batch], alternatives=alternatives)  # type: ignore[misc]
        embeddings = torch.from_numpy(np.stack([row.content for row in batch]))
        return self._encoder.encode(embeddings, alternatives=alternatives)


def _outcomes(encoding: Encoding, rows: int) -> list[Outcome]:
    """An encoding row by row."""
    numbers = (tensor.numpy().tolist() for tensor in (encoding.margin, encoding.quantization_error))  # torch's is slow
    codes = map(tuple, encoding.codes.numpy().tolist())
    alternatives = map(tuple, encoding.alternatives.numpy().tolist())
    columns = zip(codes, *numbers, alternatives, strict=True)
    outcomes: list[Outcome] = list(map(partial(tuple.__new__, EncodedRow), columns))  # a fifth of the class's own time
    if len(outcomes) != rows:
        raise RuntimeError(f"{len(outcomes)} rows came back of {rows}")
    return outcomes
