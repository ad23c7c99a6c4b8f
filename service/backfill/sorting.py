"""One order over all blocks: runs of the sorted blocks' rows, each small enough to be sorted in memory.

    sorted blocks --a sample--> splitters --bisection--> cuts --slices of all blocks--> runs

A sample of the blocks' keys says where runs begin; as no two keys are equal, items of equal codes are no exception.
What a run has of a block is one slice, so nothing is written for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from service.backfill.code_files import SORT_KEYS, CodeFile

ROWS_PER_RUN = 131_072
MAX_RUNS = 2048  # runs times blocks are held in memory
SAMPLES_PER_RUN = 64

_Key = tuple[bytes, tuple[Any, ...]]


class Run(NamedTuple):
    """Rows that follow each other in the order over all blocks.

    Attributes:
        rows: In that order, see `CodeFile`.
        places: (n,) int64. Where each stands among the slices of the blocks, one behind the other.
    """

    rows: pa.Table
    places: NDArray[np.int64]


def run_rows(rows: int) -> int:
    """About how many rows a run of so many has."""
    return max(ROWS_PER_RUN, rows // MAX_RUNS)


def cut(paths: list[Path], rows_per_run: int) -> NDArray[np.int64]:
    """Cuts (R + 1, K) of K sorted blocks into R runs: of block k, run r has the rows `cuts[r, k]` to `cuts[r + 1, k]`.

    Args:
        paths: The files of codes, by block.
        rows_per_run: About.
    """
    stride = max(1, rows_per_run // SAMPLES_PER_RUN)
    sample: list[_Key] = []
    ends = np.zeros(len(paths), np.int64)
    at = stride
    for number, path in enumerate(paths):
        file = CodeFile.open(path)
        keys = file.keys()
        ends[number] = file.valid
        while at < file.valid:
            sample.append((_padded(keys, at), file.key(at)))
            at += stride
        at -= file.valid
    sample.sort()
    splitters = sample[SAMPLES_PER_RUN - 1 :: SAMPLES_PER_RUN]
    cuts = np.zeros((len(splitters) + 2, len(paths)), np.int64)
    cuts[-1] = ends
    for number, path in enumerate(paths):
        cuts[1:-1, number] = _cuts_of(CodeFile.open(path), splitters)
    return cuts


def _cuts_of(file: CodeFile, splitters: list[_Key]) -> list[int]:
    """Where the splitters stand in a block: by their codes, and where it has these, by what sorts within them."""
    keys = file.keys()
    codes = np.array([codes for codes, _ in splitters], keys.dtype)
    firsts, lasts = (np.searchsorted(keys, codes, side).tolist() for side in ("left", "right"))
    return [
        bisect_left(range(last), key, first, last, key=file.key)
        for first, last, (_, key) in zip(firsts, lasts, splitters, strict=True)
    ]


def _padded(keys: NDArray[np.bytes_], place: int) -> bytes:
    """Packed codes; numpy leaves zeros at their end out."""
    return bytes(keys[place]).ljust(keys.dtype.itemsize, b"\0")


def runs_of(cuts: NDArray[np.int64]) -> list[int]:
    """The runs that have rows: there are none where all were rejected."""
    return np.flatnonzero(np.diff(cuts, axis=0).any(axis=1)).tolist()


def run_of(paths: list[Path], cuts: NDArray[np.int64], number: int) -> Run:
    """A run, in order."""
    slices = [
        CodeFile.open(path).rows.slice(first, last - first)
        for path, first, last in zip(paths, cuts[number].tolist(), cuts[number + 1].tolist(), strict=True)
        if last > first
    ]
    rows = pa.concat_tables(slices)
    keys = [key for key in SORT_KEYS if rows[key[0]].type != pa.null()]
    order = pc.sort_indices(rows, sort_keys=keys)
    return Run(rows.take(order), order.to_numpy().astype(np.int64))


class Slices:
    """Where the blocks' rows stand in the runs."""

    def __init__(self, cuts: NDArray[np.int64]) -> None:
        self._lengths = np.diff(cuts, axis=0)
        self._firsts = np.cumsum(self._lengths, axis=1) - self._lengths

    def of(self, block: int) -> Iterator[tuple[int, int, int]]:
        """A block's rows, in its own order: run, the first among the slices of that run, how many."""
        lengths, firsts = self._lengths[:, block], self._firsts[:, block]
        for run in np.flatnonzero(lengths).tolist():
            yield run, int(firsts[run]), int(lengths[run])
