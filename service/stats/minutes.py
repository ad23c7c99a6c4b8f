"""What was counted in each minute of the last hour: in this process's memory, or in files that all workers see.

A worker counts in a file of its own and reads those of all: no locks, as each has one writer. Minutes are those of the
system's monotonic clock, which is one for all processes of a machine. A worker that takes the place of one that ended
goes on with its file, so that what that one counted stands for its hour.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MINUTES = 60


class Fellows(NamedTuple):
    """Where the workers of one service count together.

    Attributes:
        directory: The workers' own.
        place: A small number that no other running worker has.
    """

    directory: Path
    place: int

    def own(self, name: str) -> Path:
        """The file in which this worker counts."""
        return self.directory / f"{name}.{self.place}.minutes"

    def all(self, name: str) -> Iterable[Path]:
        """The files of all workers."""
        return self.directory.glob(f"{name}.*.minutes")


class Minutes:
    """Counts of one writer, minute by minute; older ones are overwritten.

    Args:
        bins: How many numbers are counted.
        file: Where it counts, made where it is missing; in memory of its own where None.
    """

    def __init__(self, bins: int, file: Path | None = None) -> None:
        kind = _kind(bins)
        if file is None:
            self._slots = np.zeros(MINUTES, kind)
            return
        if not file.exists():  # whole or not at all, for those who read
            draft = file.with_suffix(".draft")
            draft.write_bytes(bytes(MINUTES * kind.itemsize))
            draft.rename(file)
        self._slots = np.memmap(file, kind, "r+", shape=(MINUTES,))

    def add(self, minute: int, counts: NDArray[np.int64], total: float) -> None:
        """Count in this minute: numbers (bins,), and a sum."""
        slot = self._slots[minute % MINUTES]
        if slot["until"] != minute + 1:
            slot["until"] = 0  # nothing, for those who read meanwhile
            slot["counts"], slot["total"] = 0, 0.0
            slot["until"] = minute + 1
        slot["counts"] += counts
        slot["total"] += total

    def recent(self, minute: int) -> tuple[NDArray[np.int64], float]:
        """The numbers (bins,) and the sum of the hour that ends with this minute."""
        return _recent(self._slots, minute)


def recent_of_all(files: Iterable[Path], bins: int, minute: int) -> tuple[NDArray[np.int64], float]:
    """The same of all writers of these files; what one adds just now may be there in part."""
    counts, total = np.zeros(bins, np.int64), 0.0
    for file in files:
        theirs, their_total = _recent(np.fromfile(file, _kind(bins), MINUTES), minute)
        counts += theirs
        total += their_total
    return counts, total


def _kind(bins: int) -> np.dtype[np.void]:
    """A minute's slot: the minute after it, 0 where nothing was counted yet; the sum; the numbers."""
    return np.dtype([("until", "<i8"), ("total", "<f8"), ("counts", "<i8", (bins,))])


def _recent(slots: NDArray[np.void], minute: int) -> tuple[NDArray[np.int64], float]:
    recent = slots[(slots["until"] > 0) & (slots["until"] > minute + 1 - MINUTES) & (slots["until"] <= minute + 1)]
    return recent["counts"].sum(axis=0), float(recent["total"].sum())
