"""Small batches of texts by CUDA graphs: all launches of a forward pass recorded once, and started together.

Of one text the launches take several times as long as the work. A graph has fixed shapes and fixed places in memory: so
batches are filled up to one of a few sizes and copied to where the graph reads them, and what it wrote is copied from
there.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain, cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.device.streams import give_back, own_stream
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
        record: `Recorder` of its device.
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
        """Raise ValueError where a replay of any size gives known texts other embeddings than the forward pass."""
        for bucket in self._recorded:
            for first in range(len(known)):
                batch = filling(bucket, known, first)
                error = float((self(batch) - self.forward(batch)).norm(dim=1).max())
                if not error <= tolerance:
                    msg = f"a replay of {bucket.texts} x {bucket.length} word pieces errs by {error:.2g}"
                    raise ValueError(msg)


def filling(bucket: Bucket, known: Sequence[Sequence[int]], first: int) -> list[list[int]]:
    """As many texts as a bucket takes, of known word pieces over and over; the longest as it takes, less `first`."""
    texts = islice(cycle(known), first, first + bucket.texts)
    lengths = (bucket.length - first - number * bucket.length // bucket.texts for number in range(bucket.texts))
    return [[*islice(cycle(text), max(1, length))] for text, length in zip(texts, lengths, strict=True)]


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
        replayed = ReplayedBert(forward, Recorder(forward.device))
        replayed.check(known, tolerance)
    except Exception as fault:  # noqa: BLE001 - whatever a device lacks here, there is the pass as it is
        log.warning("no CUDA graphs in %s on %s: %s", forward.dtype, forward.device, fault)
        return forward
    return replayed


class Recorder:
    """Records work on a GPU; all that one recorder records shares memory, so one replay at a time, in one stream.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._pool = own_stream(device), torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # With the last replay, each of which holds on to this.
        weakref.finalize(self, _drop, self._graphs, self._stream).atexit = False

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Record`."""
        graph, before, number = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device), len(self._graphs)
        with _RECORDING, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(before)
            for _ in range(WARM_UPS):
                work()
            try:
                # Another tokenizer may be at work in another thread, whose allocations would be errors otherwise.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = work()
            except Exception:
                self._end()
                raise
        before.wait_stream(self._stream)
        self._graphs.append(graph)

        def replay() -> Tensor:
            self._graphs[number].replay()
            return result

        return replay

    def _end(self) -> None:
        """Tell torch's allocator that a recording that failed is over.

        Torch does not: the allocator would take it for under way from then on, and give back no memory that two streams
        have worked on, for as long as the process lives.
        """
        with suppress(RuntimeError):  # where torch has done so
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)  # noqa: SLF001
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)  # noqa: SLF001


def _drop(graphs: list[torch.cuda.CUDAGraph], stream: Any) -> None:
    """The graphs first: see `models.device.streams`."""
    graphs.clear()
    give_back(stream)
