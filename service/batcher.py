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
from service.errors import EncoderStopped, Overloaded
from service.metrics import Metrics

log = logging.getLogger(__name__)

# So many failed batches in a row mean that the device is lost: the thread ends, and liveness says so.
MAX_FAILURES = 3

Content = str | NDArray[np.float32]
"""What is tokenized: a text, or an embedding (D,) float32."""


class Encoder(Protocol):
    """What the batcher needs of a tokenizer."""

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of texts; called from another thread than the model's."""

    def encode(self, embeddings: torch.Tensor) -> Encoding:
        """Codes of embeddings (B, D)."""

    def encode_texts(self, pieces: Sequence[Sequence[int]]) -> Encoding:
        """Codes of texts, given as word pieces."""


class EncodedRow(NamedTuple):
    """One content's codes, its smallest margin and its quantization error."""

    codes: tuple[int, ...]
    margin: float
    quantization_error: float


@dataclass(eq=False)
class _Job:
    """One caller's contents on their way through the model."""

    future: asyncio.Future[list[EncodedRow]]
    results: list[EncodedRow | None]
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
        queue_tokens: Tokens queued, beyond which callers are refused.
        metrics: Where depth, sizes and durations go.
    """

    def __init__(self, encoder: Encoder, *, batch_tokens: int, queue_tokens: int, metrics: Metrics) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._queue_tokens = queue_tokens
        self._metrics = metrics
        self._rows: deque[_Row] = deque()
        self._queued_tokens = 0
        self._tokens_per_s = 5_000.0
        self._changed = threading.Condition()
        self._refusal: str | None = None  # why new work is refused, once it is
        self._failures = 0
        self._splitter = ThreadPoolExecutor(1, thread_name_prefix="word-pieces")
        self._worker = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._worker.is_alive()

    async def encode(self, contents: Sequence[Content]) -> list[EncodedRow]:
        """The codes of each content, in order.

        Raises:
            Overloaded: The queue is full.
            EncoderStopped: The worker has died or is shutting down.
        """
        if not contents:
            return []
        self._check_running()
        self._check_room()
        rows = await self._prepare(contents)
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future(), [None] * len(contents), len(contents))
        # Rows of like length side by side: the padding of a batch is what its longest row exceeds the others by.
        self._enqueue(sorted((_Row(job, i, row) for i, row in enumerate(rows)), key=lambda row: row.tokens))
        return await job.future

    async def stop(self) -> None:
        """Refuse new work, finish what is queued, end the worker."""
        with self._changed:
            self._refusal = self._refusal or "shutting down"
            self._changed.notify()
        if self.alive:
            await asyncio.to_thread(self._worker.join)
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

    def _check_room(self, tokens: int = 0) -> None:
        """Refuse what would overfill the queue; an empty queue takes any one request."""
        if self._rows and self._queued_tokens + tokens > self._queue_tokens:
            wait_s = self._queued_tokens / self._tokens_per_s
            msg = f"{self._queued_tokens} tokens are queued of at most {self._queue_tokens}"
            raise Overloaded(msg, retry_after_s=min(wait_s, 60.0))

    def _enqueue(self, rows: list[_Row]) -> None:
        tokens = sum(row.tokens for row in rows)
        with self._changed:
            self._check_running()
            self._check_room(tokens)
            self._rows.extend(rows)
            self._count(tokens)
            self._changed.notify()

    def _count(self, tokens: int) -> None:
        self._queued_tokens += tokens
        self._metrics.queue_tokens.set(self._queued_tokens)

    def _run(self) -> None:
        """The worker thread: batch after batch until told to stop; however it ends, nobody is left waiting."""
        batch: list[_Row] = []
        try:
            while batch := self._next_batch():
                self._encode(batch)
        finally:
            with self._changed:
                self._refusal = self._refusal or "the model's thread has ended; the process needs a restart"
                orphans = {row.job for row in (*batch, *self._rows)}
                self._rows.clear()
                self._count(-self._queued_tokens)
            for job in orphans:
                _settle(job, EncoderStopped(self._refusal))

    def _next_batch(self) -> list[_Row]:
        """Rows of one kind within the token budget; empty when stopping with nothing left."""
        with self._changed:
            while True:
                batch = self._take()
                if batch or self._refusal is not None:
                    return batch
                self._changed.wait()

    def _take(self) -> list[_Row]:
        batch: list[_Row] = []
        longest = 0
        while self._rows:
            row = self._rows[0]
            if not row.job.left:
                longest = max(longest, row.tokens)
                fits = not batch or (
                    row.is_text == batch[0].is_text and longest * (len(batch) + 1) <= self._batch_tokens
                )
                if not fits:
                    break
                batch.append(row)
            self._rows.popleft()
            self._count(-row.tokens)
        return batch

    def _encode(self, batch: list[_Row]) -> None:
        """Run the model on a batch and hand each caller its rows; a failure is the batch's, not the thread's."""
        started = time.perf_counter()
        try:
            encoding = self._forward(batch)
            self._measure(batch, encoding, time.perf_counter() - started)
            _distribute(batch, encoding)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(batch))
            for job in {row.job for row in batch}:
                _settle(job, EncoderStopped(f"the model failed on this batch: {type(error).__name__}"))
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise
        else:
            self._failures = 0

    def _measure(self, batch: list[_Row], encoding: Encoding, elapsed_s: float) -> None:
        tokens = sum(row.tokens for row in batch)
        self._tokens_per_s += 0.1 * (tokens / elapsed_s - self._tokens_per_s)
        self._metrics.batch(
            rows=len(batch), tokens=tokens, seconds=elapsed_s, recomputed=int(encoding.recomputed.sum())
        )

    def _forward(self, batch: list[_Row]) -> Encoding:
        if batch[0].is_text:
            return self._encoder.encode_texts([row.content for row in batch])  # type: ignore[misc]
        return self._encoder.encode(torch.from_numpy(np.stack([row.content for row in batch])))


def _distribute(batch: list[_Row], encoding: Encoding) -> None:
    """Split a batch's rows back to their callers."""
    rows = zip(encoding.codes.tolist(), encoding.margin.tolist(), encoding.quantization_error.tolist(), strict=True)
    finished = []
    for row, (codes, margin, error) in zip(batch, rows, strict=True):
        row.job.results[row.place] = EncodedRow(tuple(codes), margin, error)
        row.job.missing -= 1
        if row.job.missing == 0:
            finished.append(row.job)
    for job in finished:
        _settle(job, [result for result in job.results if result is not None])


def _settle(job: _Job, outcome: list[EncodedRow] | Exception) -> None:
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
