"""The quantization errors of what came in lately, against those of the training items.

A content that is unlike all that the tokenizer was trained on is far from every codeword: what no level takes of it is
large. So the share of contents beyond the error that 95% of the training items stay below tells of drift. It is 5%
where nothing has changed, and a few contents more or less are chance, so it is judged by its lower confidence bound.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from models import Encoding
from service.batching.batcher import Encoder
from service.metrics import Ranks
from service.stats.minutes import MINUTES, Fellows, Minutes, recent_of_all
from service.stats.training import QUANTILES, TAIL, TrainingErrors, expected_shares, share_beyond_tail

MINUTE_S = 60
WINDOW_S = MINUTES * MINUTE_S
MIN_ROWS = 100
WATCH_BEYOND = 2 * share_beyond_tail()
RETRAIN_BEYOND = 4 * share_beyond_tail()
DEVIATIONS = 3.0  # of the confidence bound: about one false alarm in a thousand looks

Verdict = Literal["as_trained", "further", "retrain", "too_few", "unknown"]


class Seen(NamedTuple):
    """What came in within the window.

    Attributes:
        rows: Contents that were encoded.
        mean: Of their quantization errors; None where there are none.
        counts: How many lie below the first training quantile, between each two, and beyond the last; one number where
            the manifest tells no quantiles.
    """

    rows: int
    mean: float | None
    counts: tuple[int, ...]


class ErrorWindow:
    """Counts the quantization errors of the last hour, minute by minute, in a few kilobytes; any thread may call it.

    Args:
        training: What to count against.
        clock: Tells the time in seconds.
    """

    def __init__(self, training: TrainingErrors | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.training = training
        self._clock = clock
        self._edges = np.array(training.quantiles if training else ())
        self._minutes = Minutes(self._bins)
        self._fellows: Callable[[], Iterable[Path]] | None = None
        self._lock = threading.Lock()
        self._ranks: Ranks | None = None  # where they are counted for good, beside the window

    @property
    def _bins(self) -> int:
        return len(self._edges) + 1

    def begin(self, name: str, ranks: Ranks | None = None, fellows: Fellows | None = None) -> None:
        """Forget what was counted so far; from now on count together with the other workers, where there are any.

        Args:
            name: Of what is counted, the same in all workers.
            ranks: Where it is counted for good too.
            fellows: Where they count.
        """
        minutes = Minutes(self._bins, fellows and fellows.own(name))
        with self._lock:
            self._minutes, self._ranks = minutes, ranks
            self._fellows = partial(fellows.all, name) if fellows else None

    def observe(self, errors: Tensor) -> None:
        """Count the quantization errors (B,) of contents that were encoded just now."""
        values = errors.numpy()
        places = np.searchsorted(self._edges, values, side="left")
        counts = np.bincount(places, minlength=self._bins)
        with self._lock:
            self._minutes.add(int(self._clock() // MINUTE_S), counts, float(values.sum()))
        if self._ranks is not None and len(self._edges):
            ranks = np.interp(values, self._edges, list(QUANTILES.values()), left=0.0, right=1.0)
            self._ranks.count(counts.tolist(), float(ranks.sum()))

    def seen(self) -> Seen:
        """What came in within the window, to all workers of the service."""
        minute = int(self._clock() // MINUTE_S)
        with self._lock:
            if self._fellows is None:
                counts, total = self._minutes.recent(minute)
            else:
                counts, total = recent_of_all(self._fellows(), self._bins, minute)
        rows = int(counts.sum())
        return Seen(rows, total / rows if rows else None, tuple(counts.tolist()))


class WatchedEncoder:
    """An encoder whose quantization errors are counted."""

    def __init__(self, encoder: Encoder, window: ErrorWindow) -> None:
        """Counts what this encoder encodes in this window."""
        self._encoder = encoder
        self._window = window

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Encoder.split`."""
        return self._encoder.split(texts)

    def encode(self, embeddings: Tensor, *, alternatives: int = 0) -> Encoding:
        """See `Encoder.encode`."""
        return self._counted(self._encoder.encode(embeddings, alternatives=alternatives), alternatives)

    def encode_texts(
        self, pieces: Sequence[Sequence[int]], *, alternatives: int = 0, leave_undecided: bool = False
    ) -> Encoding:
        """See `Encoder.encode_texts`."""
        encode = partial(self._encoder.encode_texts, alternatives=alternatives, leave_undecided=leave_undecided)
        return self._counted(encode(pieces), alternatives)

    def encode_text_alone(self, pieces: Sequence[int], *, alternatives: int = 0) -> Encoding:
        """See `Encoder.encode_text_alone`; counted when it was encoded in a batch."""
        return self._encoder.encode_text_alone(pieces, alternatives=alternatives)

    def give_way(self, steps: int) -> None:
        """See `Encoder.give_way`."""
        self._encoder.give_way(steps)

    def _counted(self, encoding: Encoding, alternatives: int) -> Encoding:
        if not alternatives:  # whoever asks for them has encoded the same contents just before
            self._window.observe(encoding.quantization_error)
        return encoding


class Drift(NamedTuple):
    """What came in against what was trained on.

    Attributes:
        seen: What came in.
        training: What was trained on; None where the manifest does not tell.
    """

    seen: Seen
    training: TrainingErrors | None

    @property
    def beyond(self) -> float | None:
        """The share of what came in beyond the error that 95% of the training items stay below."""
        if self.training is None or not self.seen.rows:
            return None
        first = list(QUANTILES).index(TAIL) + 1
        return sum(self.seen.counts[first:]) / self.seen.rows

    @property
    def stability_index(self) -> float | None:
        """The population stability index over the training quantiles: 0 where both distributions are one."""
        if self.training is None or not self.seen.rows:
            return None
        pairs = zip(self.seen.counts, expected_shares(), strict=True)
        # Half a content for none, as its logarithm would be infinite.
        shares = [(max(count, 0.5) / self.seen.rows, expected) for count, expected in pairs]
        return sum((share - expected) * math.log(share / expected) for share, expected in shares)

    @property
    def verdict(self) -> Verdict:
        """What to make of it."""
        if self.training is None:
            return "unknown"
        if self.beyond is None or self.seen.rows < MIN_ROWS:
            return "too_few"
        surely = _lower_bound(self.beyond, self.seen.rows)
        if surely > RETRAIN_BEYOND:
            return "retrain"
        return "further" if surely > WATCH_BEYOND else "as_trained"

    @property
    def meaning(self) -> str:
        """The verdict in a sentence or two."""
        return _MEANINGS[self.verdict].format(rows=self.seen.rows, beyond=self.beyond or 0.0, min_rows=MIN_ROWS)


_LARGER = (
    "{beyond:.0%} of the {rows:,} contents encoded in the last hour have a larger quantization error than 95% of the "
    "training items; 5% were to be expected."
)
_MEANINGS: dict[Verdict, str] = {
    "as_trained": _LARGER + " What comes in is like what the tokenizer was trained on: there is no need to retrain.",
    "further": _LARGER
    + " What comes in has begun to differ from what the tokenizer was trained on: keep watching, and "
    "compare it with a newly trained one by semid evaluate.",
    "retrain": _LARGER + " The catalogue has moved away from what the tokenizer was trained on: train a new one on it "
    "with semid train. IDs that were given out stay valid.",
    "too_few": "{rows:,} contents were encoded in the last hour; fewer than {min_rows} say nothing of drift. Known "
    "content is answered without being encoded, and does not count.",
    "unknown": "The tokenizer's manifest does not tell the quantization errors of its training items, so there is "
    "nothing to compare what comes in with. semid train writes them.",
}


def _lower_bound(share: float, rows: int) -> float:
    """The lower end of the Wilson score interval of a share."""
    spread = DEVIATIONS**2 / rows
    centre = share + spread / 2
    radius = math.sqrt(share * (1 - share) * spread + spread**2 / 4)
    return (centre - radius) / (1 + spread)
