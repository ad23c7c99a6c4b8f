"""Small batches of texts by CUDA graphs: all launches of a forward pass recorded once, and started together.

Of one text the launches take several times as long as the work. A graph has fixed shapes and fixed places in memory: so
batches are filled up to one of a few sizes and copied to where the graph reads them, and what it wrote is copied from
there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from models.device.unpadded_bert import UnpaddedBert

log = logging.getLogger(__name__)

# Work of fixed shapes on fixed places in memory -> what does it again on what stands there then.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Bucket(NamedTuple):
    """Texts of a batch, and word pieces of each, that a graph is recorded for."""

    texts: int
    length: int


# Not tuned on any device. Of more word pieces the work is expected to take longer than its launches.
BUCKETS = tuple(Bucket(texts, length) for texts in (1, 4, 16) for length in (16, 32, 64, 128) if texts * length <= 512)

# Runs before a recording: libraries set themselves up in the first.
WARM_UPS = 3

# Torch records one graph at a time in a process.
_RECORDING = threading.Lock()


class ReplayedBert:
    """A forward pass that replays what was recorded of it where a batch fits, and runs as it is elsewhere.

    Args:
        forward: The forward pass.
        record: `recorder` of its device.
        buckets: What to record.
    """

    def __init__(self, forward: UnpaddedBert, record: Record, buckets: Iterable[Bucket] = BUCKETS) -> None:
        self.forward = forward
        self._recorded: dict[Bucket, tuple[Tensor, Callable[[], Tensor]]] = {}
        # The smallest first, which is the first to be looked at.
        for bucket in sorted(bucket for bucket in buckets if bucket.length <= forward.longest):
            with torch.inference_mode(mode=False):
                numbers = torch.ones(bucket.texts * (bucket.length + 1), dtype=torch.int64, device=forward.device)
            self._recorded[bucket] = (
                numbers,
                record(
                    lambda numbers=numbers, bucket=bucket: forward.padded(numbers, *bucket)  # type: ignore[misc]
                ),
            )

    @property
    def attention(self) -> str:
        """How word pieces attend to each other, in words for a person."""
        return f"{self.forward.attention}, small batches by CUDA graphs"

    def bucket(self, pieces: Sequence[Sequence[int]]) -> Bucket | None:
        """The smallest that holds these texts; None: they are too many or too long."""
        longest = max(map(len, pieces))
        return next((one for one in self._recorded if len(pieces) <= one.texts and longest <= one.length), None)

    def __call__(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """As `UnpaddedBert`: embeddings (B, D) of texts as word pieces, each of one piece at least."""
        if (bucket := self.bucket(pieces)) is None:
            return self.forward(pieces)
        numbers, replay = self._recorded[bucket]
        here = torch.tensor(filled(pieces, bucket))
        # All in the current stream, one after the other: the next batch is copied in after this one was copied out.
        numbers.copy_(here.pin_memory() if numbers.is_cuda else here, non_blocking=True)
        return replay()[: len(pieces)].clone()

    def check(self, known: Sequence[Sequence[int]], tolerance: float) -> None:
        """Raise ValueError where known texts have other embeddings by replay, in turn, than without it."""
        for texts, length in self._recorded:
            for first in range(len(known)):
                batch = [row[:length] for row in (*known[first:], *known[:first])][:texts]
                error = float((self(batch) - self.forward(batch)).norm(dim=1).max())
                if not error <= tolerance:
                    msg = f"a replay of {texts} x {length} word pieces errs by {error:.2g}"
                    raise ValueError(msg)


def filled(pieces: Sequence[Sequence[int]], bucket: Bucket) -> list[int]:
    """What `UnpaddedBert.padded` takes for texts that fit a bucket; texts that are not there have one word piece, 0."""
    rows = [*pieces, *[[0]] * (bucket.texts - len(pieces))]
    return [*chain.from_iterable([*row, *[0] * (bucket.length - len(row))] for row in rows), *map(len, rows)]


def with_graphs(forward: UnpaddedBert, known: Sequence[Sequence[int]], tolerance: float) -> UnpaddedBert | ReplayedBert:
    """The same forward pass with graphs of small batches, on a GPU and where they work; the log says why they do not.

    Args:
        forward: On any device; of float64, which few rows come to, no graph is made.
        known: Texts as word pieces, to compare replays by.
        tolerance: How far embeddings may be apart.
    """
    if forward.device.type != "cuda" or forward.dtype == torch.float64:
        return forward
    try:
        replayed = ReplayedBert(forward, recorder(forward.device))
        replayed.check(known, tolerance)
    except Exception as fault:  # noqa: BLE001 - whatever a device lacks here, there is the pass as it is
        log.warning("no CUDA graphs in %s on %s: %s", forward.dtype, forward.device, fault)
        return forward
    return replayed


def recorder(device: torch.device) -> Record:
    """Records work on a GPU; all that one recorder records shares memory, so one replay at a time, in one stream."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        with _RECORDING, torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_stream(before)
            for _ in range(WARM_UPS):
                work()
            # Another tokenizer may be at work in another thread, whose allocations would be errors otherwise.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = work()
        before.wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record
