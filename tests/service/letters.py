"""An encoder whose codes say which content they were made of, and callers of a batcher around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from models import Encoding, Precision
from models.native.niceness import give_way
from service.batching.batcher import Batcher
from service.batching.capacity import Capacity
from service.batching.jobs import Content, EncodedRow, Outcome
from service.metrics import Metrics

STEP_S = 0.02


class LetterEncoder:
    """A text's word pieces are its letters; its codes are its length and its letters' sum. It can be held and broken.

    Attributes:
        batches: The contents of every batch that reached the model.
        free: The model runs while this is set.
        fault: Raised in place of an encoding.
        poison: A content whose batch fails.
        doubtful: Texts that no fast path decides.
        deciding: They are decided while this is set.
        alone: The texts that were decided alone.
    """

    def __init__(self) -> None:
        self.batches: list[list[object]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.lost_rows = 0
        self.poison: list[object] = []
        self.doubtful: set[str] = set()
        self.deciding = threading.Event()
        self.deciding.set()
        self.alone: list[str] = []

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    def encode_texts(
        self, pieces: Sequence[Sequence[int]], *, alternatives: int = 0, leave_undecided: bool = False
    ) -> Encoding:
        encoding = self._encode([list(row) for row in pieces], [(len(row), sum(row)) for row in pieces], alternatives)
        doubtful = [leave_undecided and "".join(map(chr, row)) in self.doubtful for row in pieces]
        encoding.codes[doubtful] = -1
        encoding.precision[doubtful] = Precision.UNDECIDED
        return encoding

    def encode_text_alone(self, pieces: Sequence[int], *, alternatives: int = 0) -> Encoding:
        assert self.deciding.wait(30)
        text = "".join(map(chr, pieces))
        self.alone.append(text)
        if text == "wrong":
            raise RuntimeError("wrong")
        codes = torch.tensor([[len(pieces), sum(pieces)]])
        measure = codes[:, 1].to(torch.float64)
        ranked = codes[:, 1:] + torch.arange(alternatives)
        return Encoding(codes, measure, measure / 2, torch.tensor([int(Precision.CANONICAL)]), ranked)

    def give_way(self, steps: int) -> None:
        give_way(steps)

    def encode(self, embeddings: torch.Tensor, *, alternatives: int = 0) -> Encoding:
        rows = embeddings.tolist()
        return self._encode(rows, [(len(row), int(sum(row))) for row in rows], alternatives)

    def _encode(self, contents: list[list[object]], codes: list[tuple[int, int]], alternatives: int) -> Encoding:
        self.batches.append(contents)
        self.entered.release()
        assert self.free.wait(30)
        if self.fault is not None:
            raise self.fault
        if self.poison in contents:
            raise RuntimeError("poison")
        rows = torch.tensor(codes[self.lost_rows :])
        measure = rows[:, 1].to(torch.float64)
        ranked = rows[:, 1:] + torch.arange(alternatives)
        return Encoding(rows, measure, measure / 2, torch.zeros(len(rows), dtype=torch.int64), ranked)


def row_of(content: Content) -> EncodedRow:
    numbers = [ord(letter) for letter in content] if isinstance(content, str) else content.tolist()
    total = int(sum(numbers))
    return EncodedRow((len(numbers), total), float(total), total / 2)


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def batcher_of(
    encoder: LetterEncoder,
    batch_tokens: int,
    capacity: Capacity,
    metrics: Metrics | None = None,
    batch_s: float = 3600.0,
) -> Batcher:
    measured = (metrics or Metrics()).of_model("letters@0")
    return Batcher(encoder, batch_tokens=batch_tokens, batch_s=batch_s, capacity=capacity, metrics=measured)


MakeBatcher = Callable[..., tuple[Batcher, LetterEncoder]]


async def hold(batcher: Batcher, encoder: LetterEncoder) -> asyncio.Task[list[Outcome]]:
    """A request that keeps the model busy until it is set free."""
    encoder.free.clear()
    while encoder.entered.acquire(blocking=False):
        pass
    busy = asyncio.create_task(batcher.encode(["busy"]))
    await asyncio.to_thread(encoder.entered.acquire, timeout=10)
    return busy


async def queued(batcher: Batcher, *requests: Sequence[Content]) -> list[asyncio.Task[list[Outcome]]]:
    """Requests that wait in the queue, in this order."""
    tasks = []
    for request in requests:
        before = batcher.queued_rows
        tasks.append(asyncio.create_task(batcher.encode(request)))
        while batcher.queued_rows < before + len(request) and not tasks[-1].done():  # noqa: ASYNC110 - a thread counts
            await asyncio.sleep(0.001)
    return tasks
