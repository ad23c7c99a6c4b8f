"""Admission and micro-batching: one worker thread owns the model.

There is no wait timer. A batch forms from what is queued at the moment the worker frees, up to a budget of padded
tokens; while it runs, the next one gathers. Admission is bounded by tokens, and the rows of a caller who left are
dropped before they reach the model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models import Encoding
from service.capacity import Capacity
from service.errors import EncoderStopped, EncodingFailed
from service.metrics import ModelMetrics

log = logging.getLogger(__name__)

Content = str | NDArray[np.float32]
"""What is tokenized: a text, or an embedding (D,) float32."""


class Encoder(Protocol):
    """What the batcher needs of a tokenizer; `alternatives` is how many codes of the last level to rank for a row."""

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of texts; called from another thread than the model's."""

    def encode(self, embeddings: torch.Tensor, *, alternatives: int = 0) -> Encoding:
        """Codes of embeddings (B, D)."""

    def encode_texts(self, pieces: Sequence[Sequence[int]], *, alternatives: int = 0) -> Encoding:
        """Codes of texts, given as word pieces."""


class EncodedRow(NamedTuple):
    """One content's codes, its smallest margin and its quantization error.

    `alternatives` are codes of the last level by their distance, its own first; none where none were asked for.
    """

    codes: tuple[int, ...]
    margin: float
    quantization_error: float
    alternatives: tuple[int, ...] = ()


Outcome = EncodedRow | EncodingFailed


@dataclass(eq=False)
class _Job:
    """One caller's contents on their way through the model."""

    future: asyncio.Future[list[Outcome]]
    results: list[Outcome | None]
    missing: int
    queued_at: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> bool:
        """Whether the caller has gone."""
        return self.future.done()


class _Row(NamedTuple):
    job: _Job
    place: int
    content: list[int] | NDArray[np.float32]
    alternatives: int

    @property
    def kind(self) -> tuple[bool, int]:
        """What the rows of a batch have in common."""
        return self.is_text, self.alternatives

    @property
    def is_text(self) -> bool:
        return isinstance(self.content, list)

    @property
    def tokens(self) -> int:
        return len(self.content) if self.is_text else 1


class Batcher:
    """Turns concurrent callers' contents into batches for one encoder.

    Args:
        encoder: The tokenizer; only the worker thread runs its model.
        batch_tokens: Padded tokens of one forward pass, at most (a longer single row runs alone).
        capacity: Bounds what is queued, here and for the other models, and gives them turns.
        metrics: Where depth, sizes and durations go.
    """

    def __init__(self, encoder: Encoder, *, batch_tokens: int, capacity: Capacity, metrics: ModelMetrics) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._capacity = capacity
        self._metrics = metrics
        self._rows: deque[_Row] = deque()
        self._queued_tokens = 0
        self._changed = threading.Condition(threading.RLock())
        self._refusal: str | None = None  # why new work is refused, once it is
        self._proven: _Row | None = None  # a row that the model could encode: where it no longer can, it is lost
        self._left = False  # whether a caller left since the queue was last searched for such
        self._splitter = ThreadPoolExecutor(1, thread_name_prefix="word-pieces")
        self._worker = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._capacity.share(self._forget_leavers)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._worker.is_alive()

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
        self._capacity.check_room()
        rows = await self._prepare(contents)
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future(), [None] * len(contents), len(contents))
        # Rows of like length side by side: the padding of a batch is what its longest row exceeds the others by.
        queued = [_Row(job, i, row, alternatives) for i, row in enumerate(rows)]
        self._enqueue(sorted(queued, key=lambda row: row.tokens))
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
        self._capacity.leave(self._forget_leavers)
        self._splitter.shutdown()

    async def _prepare(self, contents: Sequence[Content]) -> list[list[int] | NDArray[np.float32]]:
        """Texts to word pieces, off the event loop; embeddings as they are."""
        texts = [content for content in contents if isinstance(content, str)]
        if not texts:
            return [content for content in contents if not isinstance(content, str)]
        loop = asyncio.get_running_loop()
        pieces = iter(await loop.run_in_executor(self._splitter, self._encoder.split, texts))
        return [next(pieces) if isinstance(content, str) else content for content in contents]

    def _check_running(self) -> None:
        if self._refusal is not None:
            raise EncoderStopped(self._refusal)

    def _forget_leavers(self) -> None:
        """Take the rows of callers who left out of the queue: they hold no place that others wait for."""
        if not self._left:
            return
        with self._changed:
            self._left = False
            stay = [row for row in self._rows if not row.job.left]
            self._rows = deque(stay)
            self._count(sum(row.tokens for row in stay) - self._queued_tokens)

    def _enqueue(self, rows: list[_Row]) -> None:
        tokens = sum(row.tokens for row in rows)
        with self._changed:
            self._check_running()
            self._capacity.check_room()
            self._rows.extend(rows)
            self._count(tokens)
            self._changed.notify()

    def _count(self, tokens: int) -> None:
        self._queued_tokens += tokens
        self._capacity.queue(tokens)
        self._metrics.queue_tokens.set(self._queued_tokens)

    def _run(self) -> None:
        """The worker thread: batch after batch until told to stop; however it ends, nobody is left waiting."""
        batch: list[_Row] = []
        try:
            while self._wait():
                with self._capacity.turn():
                    batch = self._take()  # only now: what gathered while the others had their turns comes along
                    for job in {row.job for row in batch}:
                        self._metrics.queue_seconds.observe(time.perf_counter() - job.queued_at)
                    outcomes = self._encode(batch) if batch else []
                _distribute(batch, outcomes)
        finally:
            with self._changed:
                self._refusal = self._refusal or "the model's thread has ended; the process needs a restart"
                orphans = {row.job for row in (*batch, *self._rows)}
                self._rows.clear()
                self._count(-self._queued_tokens)
            for job in orphans:
                _settle(job, EncoderStopped(self._refusal))

    def _wait(self) -> bool:
        """Wait for rows; False when stopping with none left."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._refusal is not None)
            return bool(self._rows)

    def _take(self) -> list[_Row]:
        """Rows of one kind within the token budget; empty where all callers have left."""
        batch: list[_Row] = []
        longest = 0
        with self._changed:
            while self._rows:
                row = self._rows[0]
                if not row.job.left:
                    longest = max(longest, row.tokens)
                    padded = longest * (len(batch) + 1)
                    if batch and (row.kind != batch[0].kind or padded > self._batch_tokens):
                        break
                    batch.append(row)
                self._rows.popleft()
                self._count(-row.tokens)
        return batch

    def _encode(self, batch: list[_Row]) -> list[Outcome]:
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

    def _measure(self, batch: list[_Row], encoding: Encoding, elapsed_s: float) -> None:
        tokens = sum(row.tokens for row in batch)
        self._capacity.measure(tokens, elapsed_s)
        self._metrics.batch(
            rows=len(batch), tokens=tokens, seconds=elapsed_s, recomputed=int(encoding.recomputed.sum())
        )

    def _forward(self, batch: list[_Row]) -> Encoding:
        is_text, alternatives = batch[0].kind
        if is_text:
            return self._encoder.encode_texts([row.content for row in batch], alternatives=alternatives)  # type: ignore[misc]
        embeddings = torch.from_numpy(np.stack([row.content for row in batch]))
        return self._encoder.encode(embeddings, alternatives=alternatives)


def _outcomes(encoding: Encoding, rows: int) -> list[Outcome]:
    """An encoding row by row."""
    codes, alternatives = (map(tuple, tensor.tolist()) for tensor in (encoding.codes, encoding.alternatives))
    columns = (codes, encoding.margin.tolist(), encoding.quantization_error.tolist(), alternatives)
    outcomes = list(map(EncodedRow, *columns))
    if len(outcomes) != rows:
        raise RuntimeError(f"{len(outcomes)} rows came back of {rows}")
    return [*outcomes]


def _distribute(batch: Sequence[_Row], outcomes: Sequence[Outcome]) -> None:
    """Hand each caller its rows."""
    finished = []
    for row, outcome in zip(batch, outcomes, strict=True):
        row.job.results[row.place] = outcome
        row.job.missing -= 1
        if row.job.missing == 0:
            finished.append(row.job)
    for job in finished:
        _settle(job, [result for result in job.results if result is not None])


def _settle(job: _Job, outcome: list[Outcome] | Exception) -> None:
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
