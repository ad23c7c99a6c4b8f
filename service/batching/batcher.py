"""Admission and micro-batching: worker threads that own the model.

There is no wait timer. A batch forms from what is queued at the moment a worker frees; while it runs, the next one
gathers. A worker that has nothing to do is woken once the event loop has read all that had arrived. Small requests and
bulk have a lane each (`lanes`), and a batch is of one lane; on processors each lane has a worker, on a device one has
both (`turns`). A batch is as large as the model can do in a set time, because whoever comes meanwhile waits for it.
Admission is bounded by tokens, and the rows of a caller who left are dropped before they reach the model.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models import Encoding
from service.batching.capacity import Capacity
from service.batching.jobs import Batch, Content, Contents, Encoded, Job, Kind, Outcome, Prepared, settle
from service.batching.lanes import NICER, SMALL_ROWS, SMALL_TOKENS, Lane, LaneQueue, lane_of
from service.batching.turns import Turns
from service.batching.undecided import Undecided
from service.errors import EncoderStopped, EncodingFailed
from service.metrics import ModelMetrics
from service.telemetry.serving import SERVING

log = logging.getLogger(__name__)

# Smaller batches waste the machine: three texts together go about as fast as a hundred (where the forward pass is
# compiled, 9,900 and 10,400 word pieces a second on a core), one alone somewhat slower, by torch at half that pace.
MIN_BATCH_TOKENS = 128

# Of the set time, while bulk is alone: several threads do a quarter more in batches that are longer.
TIMES_ALONE = 4

# The rows that wake a worker who has nothing to do, though more may be arriving just now.
GATHERED_ROWS = 64

# Word pieces are split on a thread for each lane: of bulk, so many texts at a time.
SPLIT_TEXTS = 64
SMALL_CHARACTERS = 8_192
CHARACTERS_ON_THE_LOOP = 1_024  # split in a fraction of a millisecond: a thread's turn costs as much


class Encoder(Protocol):
    """What the batcher needs of a tokenizer; `alternatives` is how many codes of the last level to rank for a row."""

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of texts; called from another thread than the model's."""

    def encode(self, embeddings: torch.Tensor, *, alternatives: int = 0) -> Encoding:
        """Codes of embeddings (B, D)."""

    def encode_texts(
        self, pieces: Sequence[Sequence[int]], *, alternatives: int = 0, leave_undecided: bool = False
    ) -> Encoding:
        """Codes of texts, given as word pieces; those that no fast path decides may be left to `encode_text_alone`."""

    def encode_text_alone(self, pieces: Sequence[int], *, alternatives: int = 0) -> Encoding:
        """Codes of one text, given as word pieces; called from another thread than the model's."""

    def give_way(self, steps: int) -> None:
        """Let all others go before the passes that the calling thread asks for from now on."""


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
        encoder: The tokenizer; only the workers run its model, side by side where the capacity's turns let them.
        batch_tokens: Padded tokens of one forward pass, at most (a longer single row runs alone).
        batch_s: Seconds that one forward pass should take, at most: batches are made smaller than `batch_tokens` for
            it, by the measured pace of the model, though not below `MIN_BATCH_TOKENS`. While no small request comes
            that could have to wait, `TIMES_ALONE` as much.
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
        # What the model could encode: where it no longer can, it is lost.
        self._proven: tuple[Kind, Prepared] | None = None
        self._gathering: asyncio.AbstractEventLoop | None = None  # which is about to wake the worker
        self._texts_in_model: set[Lane] = set()
        self._left = False  # whether a caller left since the queue was last searched for such
        self._splitters = {lane: ThreadPoolExecutor(1, thread_name_prefix=f"word-pieces-{lane}") for lane in Lane}
        self._undecided = {lane: Undecided(encoder, metrics, gives_way=lane is Lane.BULK) for lane in Lane}
        self._workers = [
            threading.Thread(target=self._run, args=(turns,), name="-".join(["model", *turns.lanes]), daemon=True)
            for turns in capacity.turns
        ]

    def start(self) -> None:
        """Start the workers."""
        self._capacity.share(self)
        for worker in self._workers:
            worker.start()

    @property
    def alive(self) -> bool:
        """Whether all workers run."""
        return all(worker.is_alive() for worker in self._workers)

    @property
    def encodes_soon(self) -> bool:
        """Whether a few embeddings would have their codes in less time than a question to the registry takes.

        A text would wait for none before it.
        """
        lanes = self._capacity.sharing(Lane.SMALL)
        waits = not self._texts_in_model.isdisjoint(lanes) or self._capacity.queued_in(lanes) > SMALL_TOKENS
        return self._refusal is None and not waits

    @property
    def queued_rows(self) -> int:
        """Rows that wait for the model."""
        with self._changed:
            return sum(queue.rows for queue in self._queues.values())

    async def encode(self, contents: Sequence[Content], *, alternatives: int = 0) -> list[Outcome]:
        """The codes of each content, in order; or the error of the one that the model fails on.

        Contents of two kinds are two jobs, the embeddings after the texts.

        Args:
            contents: Texts and embeddings.
            alternatives: How many codes of the last level to rank for each, at most.

        Raises:
            Overloaded: The queue is full.
            EncoderStopped: The worker has died or is shutting down.
        """
        texts = [content for content in contents if isinstance(content, str)]
        embeddings = [content for content in contents if not isinstance(content, str)]
        of_texts = (await self.encode_columns(texts, alternatives=alternatives)).rows() if texts else []
        if not embeddings:
            return of_texts
        of_embeddings = (await self.encode_columns(_stacked(embeddings), alternatives=alternatives)).rows()
        if not texts:
            return of_embeddings
        each = {True: iter(of_texts), False: iter(of_embeddings)}
        return [next(each[isinstance(content, str)]) for content in contents]

    async def encode_columns(self, contents: Contents, *, alternatives: int = 0) -> Encoded:
        """The same of contents of one kind, as columns.

        Args:
            contents: Texts, or embeddings (N, D) float32; N is 1 or more.
            alternatives: As in `encode`.

        Raises:
            Overloaded, EncoderStopped: As in `encode`.
        """
        self._check_running()
        kind = Kind(not isinstance(contents, np.ndarray), alternatives)
        self._check_room(Lane.SMALL if len(contents) <= SMALL_ROWS else Lane.BULK, kind)
        if isinstance(contents, np.ndarray):
            return await self._done(contents, kind)
        pieces = await self._split(contents)
        order = sorted(range(len(pieces)), key=lambda place: len(pieces[place]))
        encoded = await self._done([pieces[place] for place in order], kind)
        return encoded.take(np.argsort(order)) if len(order) > 1 else encoded

    async def _done(self, contents: Prepared, kind: Kind) -> Encoded:
        job = Job(kind, contents, asyncio.get_running_loop().create_future())
        self._enqueue(job)
        try:
            encoded = await job.future
        except asyncio.CancelledError:
            self._left = True
            raise
        if (serving := SERVING.get()) is not None:
            job.tell(serving)
        return encoded

    async def stop(self) -> None:
        """Refuse new work, finish what is queued, end the worker."""
        with self._changed:
            self._refusal = self._refusal or "shutting down"
            self._changed.notify_all()
        for worker in self._workers:
            if worker.is_alive():
                await asyncio.to_thread(worker.join)
        for undecided in self._undecided.values():
            await asyncio.to_thread(undecided.close)
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

    async def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of texts, off the event loop unless they are short.

        What is long is split a piece at a time, on a thread of its own: neither a new listing nor the feed of another
        caller waits for all of it, and that of a caller who left goes no further.
        """
        characters = sum(map(len, texts))
        if characters <= CHARACTERS_ON_THE_LOOP and len(texts) <= SMALL_ROWS:
            return self._encoder.split(texts)
        small = len(texts) <= SMALL_ROWS and characters <= SMALL_CHARACTERS
        splitter = self._splitters[Lane.SMALL if small else Lane.BULK]
        split = asyncio.get_running_loop().run_in_executor
        pieces: list[list[int]] = []
        for start in range(0, len(texts), SPLIT_TEXTS):
            pieces += await split(splitter, self._encoder.split, texts[start : start + SPLIT_TEXTS])
        return pieces

    def _check_running(self) -> None:
        if self._refusal is not None:
            raise EncoderStopped(self._refusal)

    def _check_room(self, lane: Lane, kind: Kind) -> None:
        """Raise Overloaded where the queue is full.

        Whoever asks for alternatives had room for the same contents just before, and is not refused in the middle of
        his request: beyond the queue's bound, what is queued so is bounded by the bodies that are held.
        """
        if not kind.alternatives:
            self._capacity.check_room(lane)

    def _enqueue(self, job: Job) -> None:
        lane = lane_of(job)
        self._check_room(lane, job.kind)
        with self._changed:
            self._check_running()
            self._queues[lane].add(job)
            self._count(lane)
        loop = job.future.get_loop()
        if self._gathering is not loop:
            self._gathering = loop
            loop.call_soon(self._gather, loop, 0)

    def _gather(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        """Wake the worker once a turn of the loop brings no more rows: a large batch costs little more than one row."""
        rows = self.queued_rows
        if seen < rows < GATHERED_ROWS:
            loop.call_soon(self._gather, loop, rows)
            return
        self._gathering = None
        with self._changed:
            self._changed.notify_all()

    def _count(self, lane: Lane) -> None:
        """Tell the capacity and the metrics how much waits in a lane."""
        tokens = self._queues[lane].tokens
        self._capacity.queue(lane, tokens - self._counted[lane])
        self._counted[lane] = tokens
        self._metrics.queue_tokens[lane].set(tokens)

    def _run(self, turns: Turns) -> None:
        """A worker: batch after batch until told to stop; however it ends, nobody is left waiting."""
        if Lane.SMALL not in turns.lanes:
            self._encoder.give_way(NICER)
        batch: Batch | None = None
        try:
            while self._wait(turns.lanes):
                with turns.turn(self) as lane:
                    batch = self._take(lane)  # only now: what gathered while the others had their turns comes along
                    if batch is not None:
                        self._encode(batch, lane)
                if batch is not None:
                    self._texts_in_model.discard(lane)
                    settle(batch.ended(time.perf_counter()))
                    batch = None
        finally:
            with self._changed:
                self._refusal = self._refusal or "the model's thread has ended; the process needs a restart"
                orphans = (batch.jobs if batch else set()).union(*(queue.clear() for queue in self._queues.values()))
                for lane in Lane:
                    self._count(lane)
                self._changed.notify_all()
            settle(orphans, EncoderStopped(self._refusal))

    def _wait(self, lanes: Sequence[Lane]) -> bool:
        """Wait for rows in these lanes; False when stopping with none left."""
        with self._changed:
            self._changed.wait_for(lambda: any(map(self.waits, lanes)) or self._refusal is not None)
            return any(map(self.waits, lanes))

    def _take(self, lane: Lane) -> Batch | None:
        """A batch within the budget; None where all callers have left."""
        with self._changed:
            batch = self._queues[lane].take(self._budget)
            if batch is not None and batch.kind.is_text:
                self._texts_in_model.add(lane)
            self._count(lane)
        now = time.perf_counter()
        for job in batch.jobs if batch else ():
            job.taken_at = job.taken_at or now
            self._metrics.queue_seconds[lane].observe(now - job.queued_at)
        return batch

    def _budget(self, kind: Kind) -> int:
        """Padded tokens of a batch of a kind."""
        batch_s = self._batch_s * (TIMES_ALONE if self._capacity.bulk_is_alone else 1)
        within_time = int(batch_s * self._paces[kind.is_text].tokens_per_s)
        return min(self._batch_tokens, max(within_time, MIN_BATCH_TOKENS))

    def _encode(self, batch: Batch, lane: Lane) -> None:
        """Encode a batch. One that fails is tried again in halves, down to the row at fault.

        Args:
            batch: Of rows of one kind.
            lane: Theirs; its texts that no fast path decides are decided beside the model.

        Raises:
            Exception: The model fails on what it could do before as well: the device is lost, and the thread ends.
        """
        started = time.perf_counter()
        try:
            contents = batch.contents()
            encoding = self._forward(batch.kind, contents)
            encoded = Encoded.of(encoding, batch.rows)
        except Exception as error:
            if batch.rows > 1:
                log.warning("a batch of %d rows failed, trying it in halves: %r", batch.rows, error)
                for half in batch.halves():
                    self._encode(half, lane)
                return
            log.exception("the model failed on one row", extra={"request_id": batch.spans[0].job.request_id})
            if self._proven is None:
                raise
            self._forward(*self._proven)
            batch.fail(EncodingFailed(type(error).__name__))
            return
        undecided = batch.put(encoded, encoding.undecided.tolist() if batch.kind.is_text else ())
        self._proven = batch.kind, contents[:1].copy()
        self._measure(batch, encoding, time.perf_counter() - started)
        self._undecided[lane].decide(undecided)

    def _measure(self, batch: Batch, encoding: Encoding, elapsed_s: float) -> None:
        tokens = batch.tokens
        self._paces[batch.kind.is_text].measure(tokens, elapsed_s)
        batch.took(elapsed_s)
        self._metrics.batch(rows=batch.rows, tokens=tokens, seconds=elapsed_s, precision=encoding.precision)

    def _forward(self, kind: Kind, contents: Prepared) -> Encoding:
        if isinstance(contents, np.ndarray):
            return self._encoder.encode(torch.from_numpy(contents), alternatives=kind.alternatives)
        return self._encoder.encode_texts(contents, alternatives=kind.alternatives, leave_undecided=True)


def _stacked(embeddings: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows as columns; a single one as it is, of which there are many requests."""
    return embeddings[0][np.newaxis] if len(embeddings) == 1 else np.stack(embeddings)
